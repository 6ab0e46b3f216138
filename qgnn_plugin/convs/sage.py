"""SAGEConv: one quantized input feeds both linear maps; the cheaper order of transform and aggregation is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import SAGEConv

from ..config import Granularity
from ..layers.arithmetic import aggregate_sum, own_copy
from ..layers.base import SiteFactory
from ..layers.errors import names_layer
from ..layers.graph import NormalizedGraph, graph_size, is_sparse, mean_graph, plain_graph
from ..layers.linear import QuantizedLinear
from ..layers.message_passing import QuantizedConv
from ..layers.registry import convert_layer, register_layer
from ..layers.samples import Pair, Samples
from ..layers.watched import is_watched, mapped_by_call, observed, pair_of, source_side, through_pyg, values_mapped
from ..quantizers import QLRQuantizer, QuantizedTensor
from ..quantizers.autocast import full_precision
from ..smp.constraint import attach_constraint

__all__ = ["SUMS", "QuantizedSAGEConv"]

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


class QuantizedSAGEConv(QuantizedConv):
    r"""Quantized :class:`torch_geometric.nn.SAGEConv`.

    A mean or a sum commutes with ``lin_l``: where that does not widen the messages, the layer transforms first and
    sends quantized ``W_l x``, as GCNConv does.  Otherwise it sends the quantized features and quantizes their sum.
    """

    units = ("lin_l", "lin_r")
    uncalled_maps = ("lin_l",)
    input_quantizer: QLRQuantizer
    message_quantizer: QLRQuantizer | None

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

    @property
    def follows_autocast(self: Any) -> bool:
        inner = (getattr(self, unit, None) for unit in self.units)
        return self.is_off and all(lin is None or lin.is_off for lin in inner)

    @names_layer
    @full_precision
    def forward(self: Any, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        if self.is_off and self.lin_l.is_off and (not self.root_weight or self.lin_r.is_off):
            return super().forward(x, edge_index, size)  # type: ignore[misc]
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        if self.project and hasattr(self, "lin"):
            x_src = self.lin(x_src).relu()
        pair = Pair.of(self, (x_src, x_dst))
        # The map of a node's own features keeps these in any case.
        x_sent = pair.sent if self.root_weight else own_copy(pair.sent)
        sent = self.input_quantizer(x_sent, codes_kept=_transforms_first(self) or self.root_weight)
        graph = Sampled.of(self, edge_index, pair, size)
        graph = graph.watched(self, pair)
        if _transforms_first(self):
            out = self._transform_first(sent, graph, smooth=x_dst is x_src)
        else:
            out = self.lin_l(self._aggregate(sent, graph))
        if self.root_weight and pair.own is not None:
            shared = pair.own is pair.sent and self.target_quantizer is None
            own = sent if shared else (self.target_quantizer or self.input_quantizer)(pair.own)
            out = out + mapped_by_call(self.lin_r, own)
        return pair.samples.shaped(F.normalize(out, p=2.0, dim=-1) if self.normalize else out)

    def _graph(self: Any, graph: Sampled) -> NormalizedGraph:
        copies = graph.samples.copies
        if self.aggr == "mean":
            return mean_graph(graph.edge_index, graph.size, self.flow, self.lin_l.weight.dtype, copies=copies)
        return plain_graph(graph.edge_index, graph.size, self.flow, copies=copies)

    def _transform_first(self: Any, sent: QuantizedTensor, sampled: Sampled, smooth: bool) -> Tensor:
        z = self.lin_l.apply_to(sent, None)
        graph = self._graph(sampled)
        if sampled.propagate is not None:
            observed(self.message_quantizer, lambda: z)
            out = values_mapped(self.lin_l, sampled.propagate(sent.dequantize()))
        else:
            out = aggregate_sum(self.message_quantizer(z), graph.plan, graph.weight, exact=not self.training)
            out = out if graph.target is None else out * graph.target
        if smooth and self._minds_change:
            smoother = mean_graph(sampled.edge_index, sampled.size, self.flow, z.dtype, copies=sampled.samples.copies)
            out = self._smooth(z, out, smoother.apply, graph.plan.num_edges, averaged=self.aggr == "mean")
        return out if self.lin_l.bias is None else out + self.lin_l.bias

    def _aggregate(self: Any, sent: QuantizedTensor, sampled: Sampled) -> Tensor:
        if sampled.propagate is not None:
            return sampled.propagate(sent.dequantize())
        if self.aggr in SUMS:
            graph = self._graph(sampled)
            out = aggregate_sum(sent, graph.plan, graph.weight, exact=not self.training)
            return out if graph.target is None else out * graph.target
        return self._propagated(sent.dequantize(), sampled)

    def _propagated(self: Any, values: Tensor, sampled: Sampled) -> Tensor:
        """What PyG makes of rows of ``values``, whatever the aggregation."""
        size = None if is_sparse(sampled.edge_index) else sampled.size
        x = (sampled.samples.shaped(values), None)
        return sampled.samples.rows(through_pyg(self, sampled.edge_index, size, x=x))


def _transforms_first(layer: Any) -> bool:
    """Whether sending ``W_l x`` is exact and no wider than sending ``x``."""
    return layer.aggr in SUMS and layer.out_channels <= layer.lin_l.weight.size(1)


register_layer(SAGEConv, QuantizedSAGEConv)
