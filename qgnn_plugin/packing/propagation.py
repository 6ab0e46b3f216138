"""Packed propagations: APPNP, SMPropagation, SGConv, SSGConv, TAGConv and LGConv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import SMPConfig
from ..convs.appnp import QuantizedAPPNP, QuantizedSMPropagation
from ..convs.hops import (
    LGHops,
    QuantizedLGConv,
    QuantizedSGConv,
    QuantizedSSGConv,
    QuantizedTAGConv,
    SGHops,
    SSGHops,
    TAGHops,
)
from ..kernels.smp_step import smp_step, step_factors
from ..layers.graph import NormalizedGraph, gcn_graph
from ..layers.samples import Samples
from ..layers.watched import is_watched, values_entering, watched_graph
from ..smp.constraint import BUFFERS
from ..smp.propagation import Descent, PropagationLayer, SMPropagation, Visit
from .base import LayerSpec, PackedConv, inference, register_packed
from .deferred import plain
from .ranges import PackedRange

__all__ = ["PackedHops", "PackedPropagation", "PackedSteps"]


class PackedSteps(PropagationLayer, PackedConv):
    """Base of packed propagations: K steps, a range for what each sends; the state stays float32."""

    step_quantizers: Any
    gap_quantizer: PackedRange | None
    state_quantizers: Any
    add_self_loops: bool
    normalize: bool
    flow: str
    K: int

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        if isinstance(layer, SMPropagation):  # what is its own stays, whether it acts or not
            kept = [name for name in BUFFERS if name in self._buffers]
            self._non_persistent_buffers_set.update(name for name in kept if not spec.smooth or name != "multiplier")
        for site in ("gap_quantizer", "state_quantizers"):
            if not hasattr(self, site):
                setattr(self, site, None)

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        if layer.explain:
            return "explain mode"
        if layer.is_off:
            return "32 bits"
        if layer._moves_itself or (layer._smp is not None and layer._smp.algorithm == "reference"):
            return "a multiplier that moves within the forward pass"
        dtypes = {quantizer.log_scale.dtype for _, quantizer in layer.own_quantizers()}
        return None if dtypes == {torch.float32} else "its ranges are not float32"

    def normalized(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> NormalizedGraph:
        """``A~`` for node features ``x`` [*, N, F]."""
        samples = Samples.of(self, x)
        return gcn_graph(
            edge_index,
            edge_weight,
            samples.num_nodes,
            add_self_loops=self.add_self_loops,
            normalize=self.normalize,
            flow=self.flow,
            dtype=torch.float32,
            copies=samples.copies,
        )

    def steps(self, x0: Tensor, graph: NormalizedGraph, visit: Visit | None = None) -> Tensor:
        """The last state of all steps from ``x0`` [N, F]."""
        if self.K:
            self.step_quantizers["0"].expect(x0)
            if x0.layout != torch.strided:
                raise ValueError(f"Expected dense features, which every step keeps (got {x0.layout}); use .to_dense()")
            self.step_quantizers["0"].expect_finite(x0)
        unwatched = replace(graph, propagate=None)
        return self.propagate_steps(
            x0, graph, lambda k, h: self.average(k, h, graph),
            lambda k, change: self._averaged(change, unwatched, self.gap_quantizer), exact=False, visit=visit,
        )  # fmt: skip

    def average(self, k: int, h: Tensor, graph: NormalizedGraph) -> Tensor:
        """``A~ Q_k(h)``."""
        return self._averaged(h, graph, self.step_quantizers[str(k)])

    def _averaged(self, h: Tensor, graph: NormalizedGraph, sent: PackedRange | None) -> Tensor:
        """``A~ Q(h)``."""
        if sent is None:
            return graph.apply(h)
        return self.aggregated(sent(h if graph.source is None else h * graph.source, is_finite=True), graph)

    def stored(self, k: int, h: Tensor) -> Tensor:
        states = self.state_quantizers
        return h if k == 0 or states is None else states[str(k)](h).dequantize()


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
    def descent(self) -> Descent:
        if self._mu is None:
            return Descent(0.0, 1.0, 0.0)
        return Descent(*step_factors(self._eta, self._mu, 0.0)[:2], self._eta)

    @inference
    def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """``[N, F]`` to ``[N, F]``, as :class:`torch_geometric.nn.APPNP`."""
        samples = Samples.of(self, x)
        graph = self.normalized(x, edge_index, edge_weight)
        x0 = self.input_quantizer(samples.rows(x)).dequantize()
        if is_watched(self):
            return samples.shaped(self.steps(x0, watched_graph(self, graph, samples, edge_index, edge_weight)))
        ranges = [self.step_quantizers[str(k)] for k in range(self.K)]
        symmetric = graph.weight is None and graph.source is not None and graph.source is graph.target
        plain_steps = not self._is_smoothing and self.state_quantizers is None and self._mu is not None
        if plain_steps and symmetric and all(sent.spec.is_fixed and not sent.has_multipliers for sent in ranges):
            return samples.shaped(self._steps_in_kernel(x0, graph, ranges))
        return samples.shaped(self.steps(x0, graph))

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


class PackedHops(PackedSteps):
    """Base of packed SGConv, SSGConv, TAGConv and LGConv: sums of packed states, integer products of these."""

    maps_first: Callable[[Any], bool]

    @inference
    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """``[N, F]`` to ``[N, out_channels]``, or ``[N, F]`` without a linear map."""
        samples = Samples.of(self, x)
        x0 = self.entered(samples.rows(plain(x)))
        graph = self.normalized(x, edge_index, edge_weight)
        if is_watched(self):
            graph = watched_graph(self, graph, samples, edge_index, edge_weight)
        return samples.shaped(self.result(x0, graph))

    def average(self: Any, k: int, h: Tensor, graph: NormalizedGraph) -> Tensor:
        if graph.propagate is None or not self.maps_first(self):
            return super().average(k, h, graph)
        return graph.propagate(values_entering(self.lin, h) if k == 0 else h)  # unmapped, which no range is for

    def entered(self, x: Tensor) -> Tensor:
        """``X0``, as the steps read it."""
        return x


class PackedSGConv(SGHops, PackedHops):
    """Packed SGConv."""


class PackedSSGConv(SSGHops, PackedHops):
    """Packed SSGConv."""


class PackedTAGConv(TAGHops, PackedHops):
    """Packed TAGConv."""


class PackedLGConv(LGHops, PackedHops):
    """Packed LGConv."""


for _mixin, _packed in {
    QuantizedAPPNP: PackedPropagation,
    QuantizedSMPropagation: PackedPropagation,
    QuantizedSGConv: PackedSGConv,
    QuantizedSSGConv: PackedSSGConv,
    QuantizedTAGConv: PackedTAGConv,
    QuantizedLGConv: PackedLGConv,
}.items():
    register_packed(_mixin, _packed)
