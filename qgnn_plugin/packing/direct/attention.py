"""The short way of packed attention on small graphs (see :mod:`.convs`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.backend import implementation
from ...kernels.edge_order.few import few_edges
from ...kernels.few_rows import few_rows_packed, neighbour_attention
from ...kernels.head_dots import head_dots
from ..layers.few_rows import has_hooks, is_plain, prepared, prepared_map, range_of, sources_of_map, sources_of_range
from .convs import NONE, address_of, fits, result_of, rows_of, scratch

__all__ = ["direct_gat"]


def _make_gat(layer: Any) -> Any:
    from ..layers.linear import PackedLinear  # which imports this package's short ways

    modules, bias = layer._modules, layer._parameters.get("bias")
    lin, site = modules.get("lin"), modules["message_quantizer"]
    if not isinstance(lin, PackedLinear) or lin.input_quantizer is None:
        return None
    width = layer.heads * layer.out_channels
    shape, ends = (1, layer.heads, layer.out_channels), (layer.att_src, layer.att_dst)
    if lin._num_out != width or not all(end is not None and is_plain(end, shape) for end in ends):
        return None
    if bias is not None and not is_plain(bias, (width if layer.concat else layer.out_channels,)):
        return None
    range_ = range_of(site)
    mapped = prepared_map(lin, lin.input_quantizer, lin._parameters.get("bias"))
    if range_ is None or mapped is None:
        return None
    options = width, range_, layer.heads, layer.attention_bits, layer.negative_slope, layer.concat
    attention = neighbour_attention(*options)
    return mapped, few_rows_packed(width, range_), attention, options


def direct_gat(layer: Any, x: Any, edge_index: Any, edge_attr: Any, size: Any, returned: Any) -> Tensor | None:
    """What the packed GATConv ``layer`` gives, :obj:`None` where that is for the long way to say."""
    if edge_attr is not None or size is not None or returned:
        return None
    rows, modules, parameters = rows_of(layer, x), layer._modules, layer._parameters
    lin, site = modules.get("lin"), modules["message_quantizer"]
    if not rows or lin is None or layer.res is not None:
        return None
    entry: Any = lin._modules.get("input_quantizer")
    att_src, att_dst, bias = parameters.get("att_src"), parameters.get("att_dst"), parameters.get("bias")
    sources = (*sources_of_map(lin), *sources_of_range(entry), *sources_of_range(site), att_src, att_dst, bias)
    made = prepared(layer, sources, _make_gat)
    if made is None or x.shape[1] != lin._num_in or not entry.check or has_hooks(lin, entry, site):
        return None
    graph = few_edges(edge_index, rows, (layer.flow != "source_to_target", layer.add_self_loops, NONE))
    width, heads = lin._num_out, layer.heads
    if graph is None or not fits(rows, lin._num_in, width, graph):
        return None
    mapped, packed, attention, options = made
    if attention is not None and options[2:] == (heads, layer.attention_bits, layer.negative_slope, layer.concat):
        out = result_of(rows, width if layer.concat else layer.out_channels)
        at = scratch.at(attention.room(rows))
        if not mapped(x.data_ptr(), rows, at):
            return None
        ends = att_src.data_ptr(), att_dst.data_ptr()
        done = attention(scratch.array, at, rows, graph, *ends, out.data_ptr(), address_of(bias))
        return out if done else None
    z, message = torch.empty((rows, width), dtype=torch.float32), torch.empty(packed.room(rows), dtype=torch.uint8)
    z_at = z.data_ptr()
    # Features that overflow are finite in the message, but not in the logits: the long way has them, too.
    if not mapped(x.data_ptr(), rows, z_at) or not packed(z_at, rows, message.data_ptr()):
        return None
    with torch.no_grad():
        alpha_src, alpha_dst = head_dots(z, torch.cat([att_src, att_dst]).flatten(1), heads, is_checked=True)
        lower, words, multiplier = packed.parts(message, rows)
        return implementation("attention_aggregate", "cpu")(
            words, graph.rowptr, graph.col, site._buffers["scale"].view(1), lower,
            width, site.bits, heads, layer.attention_bits, layer.negative_slope, alpha_src, alpha_dst, None, None, None,
            layer.concat, bias, multiplier=multiplier if site.has_multipliers else None,
        )  # fmt: skip
