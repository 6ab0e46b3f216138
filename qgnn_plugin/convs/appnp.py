"""APPNP and SMPropagation, quantized and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch_geometric.nn import APPNP

from ..config import SMPConfig
from ..graph.adjacency import NormalizedGraph, NormalizedOperator
from ..graph.samples import Samples
from ..kernels.smp_step import smp_step, step_factors
from ..layers.base import SiteFactory
from ..layers.registry import register_layer
from ..packing.layers.base import LayerSpec, register_packed
from ..packing.layers.ranges import PackedRange
from ..smp.constraint import attach_constraint
from ..smp.descent import Meter, StepFactors
from ..smp.propagation import SMPropagation
from .steps import PackedSteps, QuantizedPropagation

__all__ = ["PackedPropagation", "QuantizedAPPNP", "QuantizedSMPropagation"]


class QuantizedAPPNP(NormalizedOperator, QuantizedPropagation):
    r"""Quantized :class:`torch_geometric.nn.APPNP`: :math:`x \leftarrow (1 - \alpha) \hat A Q_k(x) + \alpha Q(h)`."""

    alpha: float
    step_meter: Callable[[Tensor], None] | None  # while its own loop runs, measured

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        super().attach(layer, sites)
        attach_constraint(layer, sites.config.smp, sites.device)
        layer.step_meter = None

    @property
    def step_factors(self) -> StepFactors:
        return StepFactors(0.0, 1 - self.alpha, self.alpha)

    def unquantized(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        if not self._measures or not x.is_floating_point():
            return super().unquantized(x, edge_index, edge_weight)
        graph, samples = self.normalized(x, edge_index, edge_weight), Samples.of(self, x)
        meter = Meter(self._smp, graph.apply, graph.plan.num_edges)
        self.step_meter = lambda state: meter.observe(samples.rows(state))
        try:
            out = super().unquantized(x, edge_index, edge_weight)
        finally:
            self.step_meter = None
        meter.observe(samples.rows(out))
        self._constraint_state = meter.state()
        return out

    def quantized_propagate(self: Any, edge_index: Any, size: Any = None, **kwargs: Any) -> Tensor:
        """One step of PyG's own loop."""
        if self.step_meter is not None:
            self.step_meter(kwargs["x"])
        return self.float_propagate(edge_index, size=size, **kwargs)


class QuantizedSMPropagation(QuantizedPropagation):
    r"""Quantized :class:`qgnn_plugin.SMPropagation`, which keeps its own constraint, multiplier and slack."""

    @classmethod
    def settings(cls, layer: Any, sites: SiteFactory) -> SMPConfig | None:
        return layer._smp


class PackedPropagation(PackedSteps):
    r"""Packed APPNP and SMPropagation; without correction, a step is one kernel."""

    input_quantizer: PackedRange
    _eta: float
    _mu: float | None  # infinite without teleport: None

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        if isinstance(layer, SMPropagation):
            self._eta, self._mu = layer._smp.eta, layer._smp.mu
        else:
            self._eta, self._mu = layer.alpha, None if layer.alpha == 0 else (1 - layer.alpha) / layer.alpha

    def upgrade(self, state: dict[str, Any]) -> None:
        super().upgrade(state)
        state["_eta"], state["_mu"] = state["eta"], state["mu"]
        if state.get("smp", state) is None:  # of one that did not act nothing else was kept
            state["smp"] = SMPConfig(eta=state["eta"], mu=state["mu"])

    @property
    def step_factors(self) -> StepFactors:
        if self._mu is None:
            return StepFactors(0.0, 1.0, 0.0)
        return StepFactors(*step_factors(self._eta, self._mu, 0.0)[:2], self._eta)

    def result(self, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        ranges = [self.step_quantizers[str(k)] for k in range(self.K)]
        symmetric = graph.weight is None and graph.source is not None and graph.source is graph.target
        plain_steps = not self._is_smoothing and self.state_quantizers is None and self._mu is not None
        by_kernel = plain_steps and symmetric and graph.propagate is None
        if by_kernel and all(sent.spec.is_fixed and not sent.has_multipliers for sent in ranges):
            return self._steps_in_kernel(x0, graph, ranges)
        return self.steps(x0, graph)

    def _steps_in_kernel(self, x0: Tensor, graph: NormalizedGraph, ranges: list[PackedRange]) -> Tensor:
        """A kernel per step, which also packs what the next one sends."""
        assert graph.source is not None
        assert self._mu is not None
        h, norm = x0, graph.source.view(-1)
        words = None if not ranges else ranges[0](x0 * graph.source).words
        for k, sent in enumerate(ranges):
            target = ranges[k + 1].output_range() if k + 1 < self.K else {}
            h, words, _ = smp_step(
                h, x0, graph.plan, norm, eta=self._eta, mu=self._mu, words=words, scale=sent.scale,
                offset=sent.lower, bits=sent.bits, **target,
            )  # fmt: skip
        return h


register_layer(APPNP, QuantizedAPPNP)
register_layer(SMPropagation, QuantizedSMPropagation)
register_packed(QuantizedAPPNP, PackedPropagation)
register_packed(QuantizedSMPropagation, PackedPropagation)
