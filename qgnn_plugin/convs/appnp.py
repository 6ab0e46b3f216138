"""Quantized propagations, a range of its own for every step: their base, APPNP and SMPropagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import APPNP

from ..config import MULTILEVEL_BITS, OFF, SMPConfig
from ..layers.arithmetic import own_copy
from ..layers.base import QuantizerDict, SiteFactory
from ..layers.errors import names_layer
from ..layers.graph import NormalizedGraph, NormalizedOperator
from ..layers.message_passing import QuantizedConv, require_sum
from ..layers.registry import register_layer
from ..layers.samples import Samples
from ..layers.watched import is_watched, watched_graph
from ..quantizers import QLRQuantizer
from ..quantizers.autocast import full_precision
from ..smp.constraint import attach_constraint
from ..smp.propagation import Descent, Meter, PropagationLayer, SMPropagation, StepOperator, Visit, dropped_edges
from .gcn import propagate_codes

__all__ = ["QuantizedAPPNP", "QuantizedPropagation", "QuantizedSMPropagation"]


class QuantizedPropagation(PropagationLayer, QuantizedConv):
    r"""Base of quantized propagations, :math:`U = c_0 H + c_1 \tilde A Q_k(H) + \eta Q(X_0)`, and their correction.

    Sites: ``input`` (``X0``, where it enters every step), ``step.k`` (messages), ``gap`` (the changes that neighbours
    exchange while the multiplier is positive, relative to each node's own largest change, so that it fits every step)
    and, where ``SMPConfig.state_bits`` asks for it, ``state.k``.
    """

    input_quantizer: QLRQuantizer | None
    step_quantizers: QuantizerDict
    gap_quantizer: QLRQuantizer | None
    state_quantizers: QuantizerDict | None
    dropout: float

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.input_quantizer = sites.features("input")
        cls.attach_steps(layer, sites, [sites.message(f"step{k}") for k in range(layer.K)])

    @classmethod
    def attach_steps(cls, layer: Any, sites: SiteFactory, steps: list[QLRQuantizer]) -> None:
        """Add what every step needs; ``steps`` are the sites of the messages.

        Raises:
            ValueError: If ``layer`` does not sum.
        """
        require_sum(layer, sites)
        layer.step_quantizers = QuantizerDict({str(k): site for k, site in enumerate(steps)})
        smp = cls.settings(layer, sites)
        layer.gap_quantizer = None if smp is None else _gap_site(sites, smp)
        layer.state_quantizers = None
        if smp is not None and smp.state_bits != OFF:
            stored = replace(sites, config=replace(sites.config, message_bits=smp.state_bits))
            names = {str(k): stored.make("message", f"state{k}") for k in range(1, len(steps))}
            layer.state_quantizers = QuantizerDict(names)

    @classmethod
    def settings(cls, layer: Any, sites: SiteFactory) -> SMPConfig | None:
        """The constraint that the converted layer will have."""
        return sites.config.smp

    @property
    def follows_autocast(self) -> bool:
        return self.is_plain

    @names_layer
    @full_precision
    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        if not x.is_floating_point():  # counts, say, which sums leave what they are
            return super().forward(x, edge_index, edge_weight)  # type: ignore[misc]
        if self.is_plain and not (self._smp is not None and (self._is_smoothing or self._moves_itself)):
            return self.unquantized(x, edge_index, edge_weight)
        samples = Samples.of(self, x)
        graph = self.normalized(x, edge_index, edge_weight)
        if is_watched(self):
            graph = watched_graph(self, graph, samples, edge_index, edge_weight)
        return samples.shaped(self.result(samples.rows(self.entered(x)), graph))

    @property
    def is_plain(self) -> bool:
        """Whether the layer's own forward is right: nothing that it would pass by is quantized."""
        return self.is_off

    def entered(self, x: Tensor) -> Tensor:
        """``X0``, as the steps read it."""
        return x if self.input_quantizer is None else self.input_quantizer(own_copy(x)).dequantize()

    def steps(self, x0: Tensor, graph: NormalizedGraph, visit: Visit | None = None) -> Tensor:
        """The last state of all steps from ``x0`` [N, F]."""
        if self.input_quantizer is None and graph.source is None:
            x0 = own_copy(x0)
        exact = self.is_off and not (self.training and self.dropout > 0)
        return self.propagate_steps(x0, graph, self.averages(graph), self.gaps(graph), exact=exact, visit=visit)

    def result(self, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        """What the layer makes of its states."""
        return self.steps(x0, graph)

    def unquantized(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        """The layer's own forward, where nothing is quantized and nothing corrected."""
        return super().forward(x, edge_index, edge_weight)  # type: ignore[misc]

    def stored(self, k: int, h: Tensor) -> Tensor:
        states = self.state_quantizers
        return h if k == 0 or states is None else states[str(k)](h).dequantize()

    def averages(self: Any, graph: NormalizedGraph) -> StepOperator:
        r"""``A~ Q_k(H)``, by step."""

        def average(k: int, h: Tensor) -> Tensor:
            if graph.propagate is not None:
                return self.watched_average(k, h, graph)
            step = dropped_edges(graph, self.dropout, self.training)
            return propagate_codes(h, step, self.step_quantizers[str(k)])

        return average

    def watched_average(self, k: int, h: Tensor, graph: NormalizedGraph) -> Tensor:
        """``A~ Q_k(H)`` by PyG's ``propagate``."""
        return propagate_codes(h, graph, self.step_quantizers[str(k)])  # type: ignore[arg-type]

    def gaps(self, graph: NormalizedGraph) -> StepOperator:
        r"""``A~ Q(D)``, by step."""
        quantizer, graph = self.gap_quantizer, replace(graph, propagate=None)

        def gap(k: int, change: Tensor) -> Tensor:
            return graph.apply(change) if quantizer is None else propagate_codes(change, graph, quantizer)

        return gap

    def proposed(self, h: Tensor, u: Tensor, graph: NormalizedGraph) -> None:
        """Show the gap site what would pass it, so that its range is known before the multiplier first rises."""
        quantizer = self.gap_quantizer
        if quantizer is not None and (quantizer.is_observing or (self.training and not quantizer.is_set)):
            with torch.no_grad():
                change = u - h
                quantizer(change if graph.source is None else change * graph.source)


def _gap_site(sites: SiteFactory, smp: SMPConfig) -> QLRQuantizer:
    """Zero is a level, so no change stays no change; the range does not learn, as it may long be out of use."""
    width = max(sites.config.bits_for("message"), MULTILEVEL_BITS[0]) if smp.gap_bits is None else smp.gap_bits
    fixed = replace(sites, config=replace(sites.config, message_bits=width, learn_ranges=False, truncation=None))
    return fixed.make("message", "gap", levels="symmetric", granularity="node")


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
    def descent(self) -> Descent:
        return Descent(0.0, 1 - self.alpha, self.alpha)

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


register_layer(APPNP, QuantizedAPPNP)
register_layer(SMPropagation, QuantizedSMPropagation)
