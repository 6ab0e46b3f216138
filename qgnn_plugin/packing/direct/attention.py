"""The short way of packed attention on small graphs (see :mod:`.convs`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.backend import implementation
from ...kernels.few_rows import few_rows_packed, neighbour_attention
from ...kernels.head_dots import head_dots
from ..layers.few_rows import is_plain, prepared, prepared_map, range_of
from ..layers.linear import PackedLinear
from .convs import address_of, entry_of, graph_of, result_of, rows_of, scratch

__all__ = ["direct_gat"]


def _make_gat(layer: Any, lin: Any, entry: Any, site: Any) -> Any:
    bias, width = layer._parameters.get("bias"), layer.heads * layer.out_channels
    if not isinstance(lin, PackedLinear) or lin._num_out != width:
        return None
    shape, ends = (1, layer.heads, layer.out_channels), (layer.att_src, layer.att_dst)
    if not all(end is not None and is_plain(end, shape) for end in ends):
        return None
    if bias is not None and not is_plain(bias, (width if layer.concat else layer.out_channels,)):
        return None
    range_ = range_of(site)
    mapped = prepared_map(lin, entry, lin._parameters.get("bias"))
    if range_ is None or mapped is None:
        return None
    attention = neighbour_attention(
        width, range_, layer.heads, layer.attention_bits, layer.negative_slope, layer.concat
    )
    return mapped, few_rows_packed(width, range_), attention


def direct_gat(layer: Any, x: Any, edge_index: Any, edge_attr: Any, size: Any, returned: Any) -> Tensor | None:
    """What the packed GATConv ``layer`` gives, :obj:`None` where that is for the long way to say."""
    if edge_attr is not None or size is not None or returned or layer.res is not None:
        return None
    rows, lin, site = rows_of(layer, x), layer._modules.get("lin"), layer._modules["message_quantizer"]
    if not rows or lin is None:
        return None
    options = layer.heads, layer.attention_bits, layer.negative_slope, layer.concat
    made = prepared(layer, (lin, entry_of(lin), site), _make_gat, *options)
    if made is None or x.shape[1] != lin._num_in:
        return None
    width, (heads, attention_bits, negative_slope, concat) = lin._num_out, options
    graph = graph_of(layer, edge_index, rows, lin._num_in, width, layer.add_self_loops)
    if graph is None:
        return None
    mapped, packed, attention = made
    parameters = layer._parameters
    att_src, att_dst, bias = parameters["att_src"], parameters["att_dst"], parameters.get("bias")
    if attention is not None:
        out = result_of(rows, width if concat else layer.out_channels)
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
            words, graph.rowptr, graph.col, site._buffers["scale"].view(1), lower, width, site.bits, heads,
            attention_bits, negative_slope, alpha_src, alpha_dst, None, None, None, concat, bias,
            multiplier=multiplier if site.has_multipliers else None,
        )  # fmt: skip
