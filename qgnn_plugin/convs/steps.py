"""Quantized propagations, a range of its own for every step: what all of them share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import MULTILEVEL_BITS, OFF, SMPConfig
from ..graph.adjacency import NormalizedGraph, NormalizedOperator
from ..graph.samples import Samples
from ..layers.arithmetic import own_copy
from ..layers.base import QuantizerDict, SiteFactory
from ..layers.errors import names_layer
from ..layers.message_passing import SUM
from ..layers.watched import is_watched, watched_graph
from ..packing.layers.base import LayerSpec
from ..packing.layers.guard import inference
from ..quantizers import QLRQuantizer
from ..quantizers.autocast import full_precision
from ..smp.constraint import BUFFERS
from ..smp.descent import PropagationLayer, Visit
from ..smp.propagation import SMPropagation, dropped_edges
from .base import Convolution, Frozen, Trainable

__all__ = ["PackedSteps", "Propagation", "QuantizedPropagation"]


class Propagation(PropagationLayer, Convolution):
    r""":math:`U = c_0 H + c_1 \tilde A Q_k(H) + \eta Q(X_0)`, step by step, and its correction.

    Sites: ``input`` (``X0``, where it enters every step), ``step.k`` (messages), ``gap`` (the changes that neighbours
    exchange while the multiplier is positive, relative to each node's own largest change, so that it fits every step)
    and, where ``SMPConfig.state_bits`` asks for it, ``state.k``.
    """

    input_quantizer: Any
    step_quantizers: Any
    gap_quantizer: Any
    state_quantizers: Any
    dropout: float

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.input_quantizer = sites.features("input")
        cls.attach_steps(layer, sites, [sites.message(f"step{k}") for k in range(layer.K)])

    @classmethod
    def attach_steps(cls, layer: Any, sites: SiteFactory, steps: list[QLRQuantizer]) -> None:
        """Add what every step needs; ``steps`` are the sites of the messages."""
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

    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """``[N, F]`` to ``[N, F]``, or ``[N, out_channels]`` with a linear map."""
        samples = Samples.of(self, x)
        graph = self.normalized(x, edge_index, edge_weight)
        if is_watched(self):
            graph = watched_graph(self, graph, samples, edge_index, edge_weight)
        return samples.shaped(self.result(self.initial_state(samples.rows(x)), graph))

    def initial_state(self, x: Tensor) -> Tensor:
        """``X0``, as the steps read it."""
        return self.input_quantizer(own_copy(x)).dequantize()

    def result(self, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        """What the layer makes of its states."""
        return self.steps(x0, graph)

    def steps(self: Any, x0: Tensor, graph: NormalizedGraph, visit: Visit | None = None) -> Tensor:
        """The last state of all steps from ``x0`` [N, F]."""
        unwatched = replace(graph, propagate=None)
        return self.propagate_steps(
            self._start(x0, graph), graph, lambda k, h: self.average(k, h, graph),
            lambda k, change: self.average_change(change, unwatched), exact=self._is_exact, visit=visit,
        )  # fmt: skip

    def average(self: Any, k: int, h: Tensor, graph: NormalizedGraph) -> Tensor:
        r"""``A~ Q_k(H)``."""
        if graph.propagate is None:
            graph = dropped_edges(graph, self.dropout, self.training)
        return self._floats(self._averaged(h, graph, self.step_quantizers[str(k)]))

    def average_change(self: Any, change: Tensor, graph: NormalizedGraph) -> Tensor:
        r"""``A~ Q(D)``."""
        if self.gap_quantizer is None:
            return graph.apply(change)
        return self._floats(self._averaged(change, graph, self.gap_quantizer))

    def stored(self, k: int, h: Tensor) -> Tensor:
        states = self.state_quantizers
        return h if k == 0 or states is None else states[str(k)](h).dequantize()

    def _start(self, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        """``X0`` as the first step may have it."""
        raise NotImplementedError


class QuantizedPropagation(Propagation, Trainable):
    """Base of quantized propagations."""

    aggregations = SUM

    @property
    def follows_autocast(self) -> bool:
        return self.is_plain

    @names_layer
    @full_precision
    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        if not x.is_floating_point():  # counts, say, which sums leave what they are
            return type(self).float_class.forward(self, x, edge_index, edge_weight)
        if self.is_plain and not (self._smp is not None and (self._is_smoothing or self._moves_itself)):
            return self.unquantized(x, edge_index, edge_weight)
        return super().forward(x, edge_index, edge_weight)

    @property
    def is_plain(self) -> bool:
        """Whether the layer's own forward is right: nothing that it would pass by is quantized."""
        return self.is_off

    def unquantized(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        """The layer's own forward, where nothing is quantized and nothing corrected."""
        return type(self).float_class.forward(self, x, edge_index, edge_weight)

    @property
    def _is_exact(self) -> bool:
        return self.is_off and not (self.training and self.dropout > 0)

    def _start(self, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        return own_copy(x0) if self.input_quantizer is None and graph.source is None else x0

    def proposed(self, h: Tensor, u: Tensor, graph: NormalizedGraph) -> None:
        """Show the gap site what would pass it, so that its range is known before the multiplier first rises."""
        quantizer = self.gap_quantizer
        if quantizer is not None and (quantizer.is_observing or (self.training and not quantizer.is_set)):
            with torch.no_grad():
                change = u - h
                quantizer(change if graph.source is None else change * graph.source)


class PackedSteps(Propagation, Frozen):
    """Base of packed propagations: the state stays float32."""

    _known: ClassVar[dict[str, bool]] = {"is_finite": True}  # of every state, once that of X0 was looked at
    _is_exact = False

    forward = inference(Propagation.forward)
    normalized: Any = NormalizedOperator.normalized  # of SMPropagation too, whose own may be cached
    operator: Any = NormalizedOperator.operator

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        if isinstance(layer, SMPropagation):  # what is its own stays, whether it acts or not
            kept = [name for name in BUFFERS if name in self._buffers]
            self._non_persistent_buffers_set.update(name for name in kept if not spec.smooth or name != "multiplier")
        for site in ("gap_quantizer", "state_quantizers"):
            if not hasattr(self, site):
                setattr(self, site, None)

    def _start(self, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        if self.K:
            self.step_quantizers["0"].expect(x0)
            if x0.layout != torch.strided:
                raise ValueError(f"Expected dense features, which every step keeps (got {x0.layout}); use .to_dense()")
            self.step_quantizers["0"].expect_finite(x0)
        return x0


def _gap_site(sites: SiteFactory, smp: SMPConfig) -> QLRQuantizer:
    """Zero is a level, so no change stays no change; the range does not learn, as it may long be out of use."""
    width = max(sites.config.bits_for("message"), MULTILEVEL_BITS[0]) if smp.gap_bits is None else smp.gap_bits
    fixed = replace(sites, config=replace(sites.config, message_bits=width, learn_ranges=False, truncation=None))
    return fixed.make("message", "gap", levels="symmetric", granularity="node")
