"""SAGEConv: one quantized input feeds both linear maps; the cheaper order of transform and aggregation is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import SAGEConv

from ..config import OFF, Granularity
from ..graph.adjacency import NormalizedGraph, graph_size, is_sparse, mean_graph, plain_graph
from ..graph.samples import Pair, Samples
from ..layers.arithmetic import own_copy
from ..layers.base import SiteFactory
from ..layers.linear import QuantizedLinear
from ..layers.registry import convert_layer, register_layer
from ..layers.watched import is_watched, observed, pair_of, source_side, through_pyg, values_mapped
from ..packing.direct.convs import direct_sage
from ..packing.layers.base import LayerSpec, register_packed
from ..packing.layers.guard import inference
from ..smp.constraint import attach_constraint
from .base import Codes, Convolution, Frozen, Mapped, Result, Trainable, trainable

__all__ = ["SAGE", "PackedSAGEConv", "QuantizedSAGEConv"]

SUMS = ("mean", "add", "sum")


class Sampled(NamedTuple):
    """A graph as the caller gave it, its numbers of sources and targets, and the samples whose features it carries.

    Where somebody looks into the layer, ``propagate`` computes its sums.
    """

    edge_index: Any
    size: tuple[int, int]
    samples: Samples
    propagate: Callable[[Tensor], Tensor] | None = None

    def watched(self, layer: Any, pair: Pair) -> Sampled:
        """The same, where ``layer`` is watched by its own ``propagate``."""
        if not is_watched(layer):
            return self

        def propagate(values: Tensor) -> Tensor:
            x = pair_of(layer, self.samples, values, values if pair.own is pair.sent else pair.own)
            size = self.size[::-1] if source_side(layer) else self.size
            given = None if is_sparse(self.edge_index) else size
            return self.samples.rows(through_pyg(layer, self.edge_index, given, x=x))

        return self._replace(propagate=propagate)

    @classmethod
    def of(cls, layer: Any, edge_index: Any, pair: Pair, size: Any) -> Sampled:
        """That of ``pair``, in a SAGEConv."""
        # Without a share of their own, targets need not fit what a matrix, or the flow, says about their number.
        fitting = layer.root_weight or not (is_sparse(edge_index) or layer.flow != "source_to_target")
        num_dst = pair.num_dst if fitting else None
        return cls(edge_index, graph_size(layer, edge_index, pair.num_src, num_dst, size), pair.samples)


class SAGE(Convolution):
    r"""One quantized input for ``W_l`` and ``W_r``.

    A mean or a sum commutes with ``lin_l``: where that does not widen the messages, the layer transforms first and
    sends quantized ``W_l x``, as GCNConv does.  Otherwise it sends the quantized features and quantizes their sum.
    """

    uncalled_maps = ("lin_l",)
    input_quantizer: Any
    message_quantizer: Any
    target_quantizer: Any
    lin_l: Any
    lin_r: Any
    _maps_first: bool

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        shared = isinstance(layer.in_channels, int) and not layer.project
        # Codes of different multiples of a range do not compare as the values do.
        one: Granularity | None = "tensor" if layer.aggr not in SUMS and sites.config.granularity == "row" else None
        layer.input_quantizer = sites.features("input", layer.in_channels if shared else None, granularity=one)
        first = _transforms_first(layer)
        layer.message_quantizer = sites.message("message", layer.out_channels) if first else None
        layer.target_quantizer = None if shared else sites.make("activation", "target")
        inner = [("lin_l", not first), ("lin_r", False)] if layer.root_weight else [("lin_l", not first)]
        for child, own_input in inner:
            convert_layer(getattr(layer, child), QuantizedLinear, sites.within(child), own_input=own_input)
        attach_constraint(layer, sites.config.smp, sites.device)

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        inner = [layer.lin_l, layer.lin_r] if layer.root_weight else [layer.lin_l]
        if layer.explain:
            return "explain mode"
        if layer.is_off and all(lin.is_off for lin in inner):
            return "32 bits"
        if any(lin.weight.dtype != torch.float32 for lin in inner):
            return "its weights are not float32"
        if layer.aggr not in (*SUMS, "max"):
            return f"aggregation {layer.aggr!r}"
        rows = layer.input_quantizer.granularity in ("node", "row") or layer.input_quantizer.is_zero_one
        if layer.aggr == "max" and (rows or layer.input_quantizer.bits == OFF):
            return "a maximum over ranges per node"
        return None

    def forward(self: Any, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        """As :class:`torch_geometric.nn.SAGEConv`; ``x`` may be a pair."""
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        if self.project and getattr(self, "lin", None) is not None:
            x_src = self.lin(x_src).relu()
        pair = Pair.of(self, (x_src, x_dst))
        # The map of a node's own features keeps these in any case.
        x_sent = pair.sent if self.root_weight else own_copy(pair.sent)
        sent = self.input_quantizer(x_sent, codes_kept=self._maps_first or self.root_weight)
        graph = Sampled.of(self, edge_index, pair, size).watched(self, pair)
        out = self._brought(sent, graph, smooth=x_dst is x_src)
        if self.root_weight and pair.own is not None:
            shared = pair.own is pair.sent and self.target_quantizer is None
            own = sent if shared else (self.target_quantizer or self.input_quantizer)(pair.own)
            out = self._plus(out, self._product(self.lin_r, own))
        if self.normalize:
            out = self._then(out, partial(F.normalize, p=2.0, dim=-1))
        return pair.samples.shaped(self._finished(out))

    def _graph(self: Any, sampled: Sampled) -> NormalizedGraph:
        if self.aggr != "mean":
            return plain_graph(sampled.edge_index, sampled.size, self.flow, copies=sampled.samples.copies)
        return self._smoother(sampled, self._precision(self.lin_l))

    def _smoother(self: Any, sampled: Sampled, dtype: torch.dtype) -> NormalizedGraph:
        """The mean over neighbours, whatever the aggregation."""
        return mean_graph(sampled.edge_index, sampled.size, self.flow, dtype, copies=sampled.samples.copies)

    def _brought(self: Any, sent: Codes, sampled: Sampled, smooth: bool) -> Result:
        """What neighbours bring, transformed, with the bias."""
        if not self._maps_first:
            return self._product(self.lin_l, self._aggregated(sent, sampled))
        mapped, smooth = Mapped(self.lin_l, sent), smooth and self._minds_change
        if sampled.propagate is not None:
            observed(self.message_quantizer, mapped.floats)
            z = mapped.floats() if smooth else None
            out = values_mapped(self.lin_l, sampled.propagate(sent.dequantize()))
        else:
            graph = self._graph(sampled)
            messages, z = self._coded(self.message_quantizer, mapped, floats=smooth)
            if not smooth:
                return self._sums(messages, graph, self.lin_l.bias)
            out = self._sums(messages, graph)
        if not smooth:
            return out if self.lin_l.bias is None else out + self.lin_l.bias
        assert z is not None
        return self._corrected(z, out, self._smoother(sampled, z.dtype), self.lin_l.bias, self.aggr == "mean")

    def _aggregated(self: Any, sent: Codes, sampled: Sampled) -> Result:
        """What neighbours bring, as it is."""
        if sampled.propagate is not None:
            return sampled.propagate(sent.dequantize())
        if self.aggr in SUMS:
            return self._sums(sent, self._graph(sampled))
        return self._compared(sent, sampled)

    def _compared(self: Any, sent: Codes, sampled: Sampled) -> Result:
        """The largest of what neighbours send, or whatever else PyG makes of rows of values."""
        size = None if is_sparse(sampled.edge_index) else sampled.size
        x = (sampled.samples.shaped(sent.dequantize()), None)
        return sampled.samples.rows(through_pyg(self, sampled.edge_index, size, x=x))


def _transforms_first(layer: Any) -> bool:
    """Whether sending ``W_l x`` is exact and no wider than sending ``x``."""
    return layer.aggr in SUMS and layer.out_channels <= layer.lin_l.weight.size(1)


class QuantizedSAGEConv(SAGE, Trainable):
    """Quantized :class:`torch_geometric.nn.SAGEConv`."""

    units = ("lin_l", "lin_r")
    aggregations = (*SUMS, "max")
    forward = trainable(SAGE.forward)

    @property
    def _maps_first(self) -> bool:  # type: ignore[override]
        return _transforms_first(self)

    @property
    def follows_autocast(self) -> bool:
        return self._runs_floats(None)

    def _runs_floats(self, x: Any) -> bool:
        inner = (getattr(self, unit, None) for unit in self.units)
        return self.is_off and all(lin is None or lin.is_off for lin in inner)


class PackedSAGEConv(SAGE, Frozen):
    """Packed :class:`torch_geometric.nn.SAGEConv`."""

    _convolved = inference(SAGE.forward, direct_sage)

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        self._maps_first = _transforms_first(layer)
        if "target_quantizer" not in spec.sites:
            self.target_quantizer = None

    def upgrade(self, state: dict[str, Any]) -> None:
        super().upgrade(state)
        state["_maps_first"] = state["transforms_first"]

    def forward(self, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        few = direct_sage(self, x, edge_index, size)
        return self._convolved(x, edge_index, size) if few is None else few

    def _compared(self, sent: Codes, sampled: Sampled) -> Result:
        graph = self._graph(sampled)
        if graph.weight is not None:  # values of a matrix multiply what the maximum is of
            return super()._compared(sent, sampled)
        return self.aggregation(sent, graph, reduce="max")


register_layer(SAGEConv, QuantizedSAGEConv)
register_packed(QuantizedSAGEConv, PackedSAGEConv)
