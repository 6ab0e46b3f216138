"""The short way of packed convolutions on small graphs: a few compiled calls per layer (see :mod:`..layers.few_rows`).

A convolution of a molecule takes ten microseconds to compute, and what is around it many times that: plans, deferred
results, checks of each.  Here are none of them.  Rows of the sources become a message
(:class:`~qgnn_plugin.kernels.few_rows.cpu.Dense`), which is summed over neighbours
(:class:`~qgnn_plugin.kernels.few_rows.cpu_neighbours.NeighbourSums`), in memory
that each thread keeps.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...graph.fixed import has_fixed_graph
from ...kernels.cache import is_pinning
from ...kernels.edge_order.few import FewEdges, few_edges
from ...kernels.few_rows import few_rows_packed, neighbour_sums, whole_lines
from ...layers.watched import is_watched
from ..layers.few_rows import (
    ROW_COST,
    is_few,
    is_plain,
    is_plain_call,
    is_shared,
    prepared,
    prepared_map,
    range_of,
)
from ..layers.linear import PackedLinear
from .network import direct_steps

__all__ = [
    "address_of",
    "direct_gcn",
    "direct_gin",
    "direct_sage",
    "entry_of",
    "graph_of",
    "result_of",
    "rows_of",
    "scratch",
]

ROOT, INVERSE, NONE = 1, 0, -1  # factors of nodes (:func:`~qgnn_plugin.kernels.edge_order.few.few_edges`)
SUMS = {"mean": INVERSE, "sum": NONE, "add": NONE}


def rows_of(layer: Any, x: Any) -> int:
    """How many rows of ``x`` a convolution takes the short way; 0 for the long one."""
    if not is_plain_call(layer, x) or layer.output_quantizer is not None or layer._smp is not None:
        return 0
    shape = x.shape
    if len(shape) != 2 or layer.node_dim not in (-2, 0) or is_watched(layer) or has_fixed_graph() or is_pinning():
        return 0
    masked = layer.__dict__.get("_edge_mask") is not None or layer._parameters.get("_edge_mask") is not None
    if masked and torch.is_grad_enabled():
        return 0
    return shape[0] if x.numel() and is_few(x.numel()) else 0


def graph_of(
    layer: Any, edge_index: Any, rows: int, num_in: int, num_out: int, loops: bool = False, factors: int = NONE
) -> FewEdges | None:
    """The graph as ``layer`` sums over it, where a map of ``rows`` rows and the sum are few enough for one thread."""
    if not is_few(rows * num_out):
        return None
    graph = few_edges(edge_index, rows, (layer.flow != "source_to_target", loops, factors))
    if graph is None or is_shared(rows * (1 + num_in * num_out // ROW_COST) + graph.num_edges):
        return None
    return graph


class _Scratch(threading.local):
    """Memory of messages, one of which a thread needs at a time."""

    size = address = 0
    memory: Tensor | None = None
    array: Any = None

    def at(self, size: int) -> int:
        """The address of ``size`` bytes, from the start of a cache line on."""
        if size > self.size:
            self.memory = torch.empty(size, dtype=torch.uint8)
            self.size, self.address, self.array = size, self.memory.data_ptr(), self.memory.numpy()
        return self.address

    def copied(self, at: int, rows: int, width: int) -> Tensor:
        """A copy of the float32 matrix ``[rows, width]`` at the address ``at``."""
        assert self.memory is not None
        start = at - self.address
        return self.memory[start : start + 4 * rows * width].view(torch.float32).view(rows, width).clone()


scratch = _Scratch()


def result_of(rows: int, width: int) -> Tensor:
    """Where the result of a layer goes."""
    return torch.empty((rows, width), dtype=torch.float32)


def address_of(tensor: Tensor | None) -> int:
    """Where the elements of a tensor are, 0 for :obj:`None`."""
    return 0 if tensor is None else tensor.data_ptr()


def entry_of(lin: Any) -> Any:
    """The range of what the map ``lin`` takes."""
    return None if lin is None else lin._modules.get("input_quantizer")


# GCNConv ##############################################################################################################


def _make_gcn(layer: Any, lin: Any, entry: Any, site: Any) -> Any:
    bias = layer._parameters.get("bias")
    if not isinstance(lin, PackedLinear) or (bias is not None and not is_plain(bias, (lin._num_out,))):
        return None
    mapped = prepared_map(lin, entry, lin._parameters.get("bias"), site)
    return None if mapped is None else (mapped, neighbour_sums(lin._num_out, site.bits))


def direct_gcn(layer: Any, x: Any, edge_index: Any, edge_weight: Any) -> Tensor | None:
    """What the packed GCNConv ``layer`` gives, :obj:`None` where that is for the long way to say."""
    rows = 0 if edge_weight is not None or layer.improved else rows_of(layer, x)
    if not rows:
        return None
    lin, site = layer._modules.get("lin"), layer._modules["message_quantizer"]
    made = prepared(layer, (lin, entry_of(lin), site), _make_gcn)
    if made is None or x.shape[1] != lin._num_in:
        return None
    loops, factors = layer.normalize and layer.add_self_loops, ROOT if layer.normalize else NONE
    graph = graph_of(layer, edge_index, rows, lin._num_in, lin._num_out, loops, factors)
    if graph is None:
        return None
    mapped, sums = made
    out, at, factor_at = result_of(rows, lin._num_out), scratch.at(mapped.room(rows)), graph.factor_at
    if not mapped(x.data_ptr(), rows, at, factor_at):
        return None
    bias = layer._parameters.get("bias")
    sums(at, site._buffers["scale"].data_ptr(), graph, out.data_ptr(), factor_at, address_of(bias))
    return out


# SAGEConv #############################################################################################################


def _make_sage(layer: Any, left: Any, inner: Any, right: Any, site: Any, sent: Any) -> Any:
    if not isinstance(left, PackedLinear) or not (right is None or isinstance(right, PackedLinear)):
        return None
    bias, num_in = left._parameters.get("bias"), left._num_in
    own = None if right is None else prepared_map(right, site, right._parameters.get("bias"))
    if right is not None and (own is None or right._num_in != num_in or right._num_out != left._num_out):
        return None
    if layer._maps_first:
        if bias is not None and not is_plain(bias, (left._num_out,)):
            return None
        mapped = prepared_map(left, site, None, sent)
        return None if mapped is None else (mapped, neighbour_sums(left._num_out, sent.bits), own, sent)
    range_, mapped = range_of(site), prepared_map(left, inner, bias)
    if range_ is None or mapped is None:
        return None
    return few_rows_packed(num_in, range_), neighbour_sums(num_in, site.bits), own, site, mapped


def direct_sage(layer: Any, x: Any, edge_index: Any, size: Any) -> Tensor | None:
    """What the packed SAGEConv ``layer`` gives, :obj:`None` where that is for the long way to say."""
    if size is not None or layer.normalize or layer.project or layer.aggr not in SUMS:
        return None
    rows, modules = rows_of(layer, x), layer._modules
    left, right = modules["lin_l"], modules.get("lin_r")
    if not rows or layer.target_quantizer is not None or (right is None) is layer.root_weight:
        return None
    inner = (left, entry_of(left), right, modules["input_quantizer"], modules.get("message_quantizer"))
    made = prepared(layer, inner, _make_sage)
    if made is None or x.shape[1] != left._num_in:
        return None
    graph = graph_of(layer, edge_index, rows, 2 * left._num_in, left._num_out, factors=SUMS[layer.aggr])
    if graph is None:
        return None
    return _sage_maps_first(left, x, graph, made) if layer._maps_first else _sage_sums_first(left, x, graph, made)


def _sage_maps_first(left: Any, x: Tensor, graph: FewEdges, made: Any) -> Tensor | None:
    mapped, sums, own, sent = made
    rows, width = graph.num_src, left._num_out
    out = result_of(rows, width)
    at, x_at, out_at = scratch.at(mapped.room(rows)), x.data_ptr(), out.data_ptr()
    if not mapped(x_at, rows, at, other=own, other_at=out_at):  # of the same codes
        return None
    bias, addend_at = left._parameters.get("bias"), 0 if own is None else out_at
    sums(at, sent._buffers["scale"].data_ptr(), graph, out_at, graph.factor_at, address_of(bias), addend_at)
    return out


def _sage_sums_first(left: Any, x: Tensor, graph: FewEdges, made: Any) -> Tensor | None:
    packed, sums, own, site, mapped = made
    rows, num_in = graph.num_src, left._num_in
    out, room = result_of(rows, left._num_out), whole_lines(packed.room(rows))
    at, x_at, out_at = scratch.at(room + 4 * rows * num_in), x.data_ptr(), out.data_ptr()
    means_at = at + room
    if not packed(x_at, rows, at):
        return None
    sums(at, site._buffers["scale"].data_ptr(), graph, means_at, graph.factor_at)
    if not mapped(means_at, rows, out_at):  # of finite codes by ranges that overflow
        return None
    if own is not None:
        own(x_at, rows, out_at, 0, out_at)
    return out


# GINConv ##############################################################################################################


def _make_gin(layer: Any, site: Any) -> Any:
    range_, epsilon = range_of(site), layer.eps
    if range_ is None or not is_plain(epsilon, epsilon.shape) or epsilon.numel() != 1:
        return None
    # Features are as wide as they come: a call for each width.
    return cache(lambda width: (few_rows_packed(width, range_, epsilon), neighbour_sums(width, site.bits)))


def direct_gin(layer: Any, x: Any, edge_index: Any, size: Any) -> Tensor | None:
    """What the packed GINConv ``layer`` gives, :obj:`None` where that is for the long way to say."""
    rows = 0 if size is not None else rows_of(layer, x)
    if not rows:
        return None
    site, width = layer._modules["message_quantizer"], x.shape[1]
    made = prepared(layer, (site,), _make_gin)
    graph = None if made is None else graph_of(layer, edge_index, rows, 1, width)
    if graph is None:
        return None
    packed, sums = made(width)
    steps = direct_steps(layer._modules["nn"], rows, width)
    room = whole_lines(packed.room(rows))
    if steps is None:
        out = result_of(rows, width)
        at, out_at = scratch.at(room), out.data_ptr()
    else:
        at = scratch.at(room + whole_lines(4 * rows * width) + steps.room(rows))
        out_at = at + room
    if not packed(x.data_ptr(), rows, at, out_at):
        return None
    sums(at, site._buffers["scale"].data_ptr(), graph, out_at, 0, 0, out_at)
    if steps is None:
        return layer._through_network(out)
    out = result_of(rows, steps.width)
    if steps(out_at, rows, out_at + whole_lines(4 * rows * width), out.data_ptr()):
        return out
    return layer._through_network(scratch.copied(out_at, rows, width))  # what is not finite is for the network to say
