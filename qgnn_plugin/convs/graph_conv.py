"""GraphConv: quantize node features once, sum integer codes, then a map of the sum and one of the node itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch_geometric.nn import GraphConv

from ..config import OFF
from ..graph.adjacency import NormalizedGraph, graph_size, is_sparse, mean_graph, plain_graph
from ..graph.samples import Pair
from ..layers.arithmetic import own_copy
from ..layers.message_passing import QuantizedMessagePassing
from ..layers.registry import register_deep, register_layer
from ..layers.watched import is_watched
from ..packing.layers.base import register_packed
from ..packing.layers.guard import inference
from ..packing.message_passing.generic import PackedMessagePassing
from .base import Convolution, Frozen, Trainable, trainable
from .deep import DeepMessagePassing

__all__ = ["GraphSum", "PackedGraphConv", "QuantizedGraphConv"]

SUMS = ("add", "sum", "mean")


class GraphSum(Convolution):
    r""":math:`W_1 \sum_j w_{ij} Q(x_j) + b + W_2 x_i`, or the mean over neighbours.

    Its sites and its state are those of any ``MessagePassing``, and so is what it does where its sums are not of codes:
    with another aggregation, without quantized messages, on a ``SparseTensor``, and where somebody looks into it.
    """

    argument_quantizers: Any
    lin_rel: Any
    lin_root: Any
    aggr: Any

    def forward(self: Any, x: Any, edge_index: Any, edge_weight: Tensor | None = None, size: Any = None) -> Tensor:
        """As :class:`torch_geometric.nn.GraphConv`; ``x`` may be a pair."""
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        if not self._sums_codes or not _is_summed(x_src, edge_index) or is_watched(self):
            return type(self).float_class.forward(self, x, edge_index, edge_weight, size)
        pair = Pair.of(self, (x_src, x_dst))
        graph = self._graph(edge_index, edge_weight, pair, graph_size(self, edge_index, *pair[-2:], size))
        sent = self.argument_quantizers["x"](own_copy(pair.sent))
        out = self._sums(sent, graph)
        if self._minds_change:
            shaped, values = pair.samples.shaped, sent.dequantize() if x_dst is x_src else None
            values = None if values is None else shaped(values)
            out = pair.samples.rows(self._smoothed_change(values, shaped(self._floats(out)), edge_index, size))
        out = self._product(self.lin_rel, out)
        if pair.own is not None:
            out = self._plus(self._product(self.lin_root, pair.own), out)
        return pair.samples.shaped(self._finished(out))

    @property
    def _sums_codes(self) -> bool:
        """Whether what it adds up has codes."""
        sites = self.argument_quantizers
        return self.aggr in SUMS and "x" in sites and sites["x"].bits != OFF

    def _graph(
        self: Any, edge_index: Any, edge_weight: Tensor | None, pair: Pair, size: tuple[int, int]
    ) -> NormalizedGraph:
        dtype = self._precision(self.lin_rel)
        if is_sparse(edge_index):
            edge_weight = None  # its values come first
        elif isinstance(edge_weight, Tensor) and not edge_weight.is_complex():
            edge_weight = edge_weight.to(dtype)
        if self.aggr == "mean":
            return mean_graph(edge_index, size, self.flow, dtype, edge_weight, copies=pair.samples.copies)
        return plain_graph(edge_index, size, self.flow, edge_weight, copies=pair.samples.copies)


def _is_summed(x: Any, edge_index: Any) -> bool:
    """Whether ``x`` is floats, and ``edge_index`` edges or a matrix of numbers."""
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return floats and isinstance(edge_index, Tensor) and not (is_sparse(edge_index) and edge_index.dense_dim())


class QuantizedGraphConv(GraphSum, Trainable, QuantizedMessagePassing):
    """Quantized :class:`torch_geometric.nn.GraphConv`."""

    forward = trainable(GraphSum.forward)


class PackedGraphConv(GraphSum, Frozen, PackedMessagePassing):
    """Packed :class:`torch_geometric.nn.GraphConv`."""

    _runs_own_forward = False
    forward = inference(GraphSum.forward)

    @property
    def compiles_unblocked(self) -> bool:  # type: ignore[override]
        return not self._sums_codes

    def _path_taken(self) -> str:
        self._paths.has_form |= self._sums_codes
        return super()._path_taken()


register_layer(GraphConv, QuantizedGraphConv)
register_deep(QuantizedGraphConv, DeepMessagePassing)
register_packed(QuantizedGraphConv, PackedGraphConv)
