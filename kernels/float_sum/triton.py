"""Sums of float rows over neighbours, and their gradients: for the steps of propagation that are not quantized and for
training, where the backward pass is the same sum over the transposed graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.launch import (
    SECOND_STAGE,
    UNSPECIALIZED,
    check_devices,
    check_graph,
    config_for,
    launch,
    launch_options,
    warp_size,
    whole_row_tile,
    word_tile,
)
from ..triton.schedule import schedule_for
from . import edge_dots_reference, float_sum_reference, segment_largest_reference

__all__ = [
    "edge_dots", "edge_dots_kernel", "float_sum", "float_sum_hub_kernel", "float_sum_kernel", "segment_largest",
]  # fmt: skip

segment_largest = segment_largest_reference  # of logits alone, in training: torch's own kernel, on their device


@triton.jit(do_not_specialize=UNSPECIALIZED)
def float_sum_kernel(  # type: ignore[no-untyped-def]
    x, col, row_of, begin_of, length_of, slot_of, src_scale, dst_scale, weight, edge_of, out, partial,
    num_items, num_partial,
    F: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """``y_i = d_i sum_e w_e s_j x_j`` in float32, in the order of the edges.

    ``weight`` is ``[E, HEADS]``, read at ``edge_of`` where the graph's edges are numbered otherwise.
    """
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = (column < F)[None, :]
    head = column // (F // HEADS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(col + begin + (k + u), mask=ok, other=0)
            pointers = x + (source.to(tl.int64) * F)[:, None] + column[None, :]
            value = tl.load(pointers, mask=ok[:, None] & column_ok, other=0.0)
            if src_scale is not None:
                value = value * tl.load(src_scale + source, mask=ok, other=0.0)[:, None]
            if weight is not None:
                edge = begin + (k + u)
                if edge_of is not None:
                    edge = tl.load(edge_of + edge, mask=ok, other=0)
                at = weight + (edge * HEADS)[:, None] + head[None, :]
                value = value * tl.load(at, mask=ok[:, None] & column_ok, other=0.0)
            total += value
    if tl.program_id(0) * ROWS < num_partial:
        slot = tl.load(slot_of + item).to(tl.int64)
        ok = (length > 0)[:, None] & column_ok
        tl.store(partial + (slot * F)[:, None] + column[None, :], total, mask=ok)
    else:
        if dst_scale is not None:
            total = total * tl.load(dst_scale + row, mask=item_ok, other=0.0)[:, None]
        ok = item_ok[:, None] & column_ok
        tl.store(out + (row.to(tl.int64) * F)[:, None] + column[None, :], total, mask=ok)


@triton.jit
def float_sum_hub_kernel(  # type: ignore[no-untyped-def]
    partial, hub_row, hub_first, hub_count, dst_scale, out,
    F: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Second stage of hubs: add up the partial sums of one row in the order of their slots."""
    hub = tl.program_id(0)
    row = tl.load(hub_row + hub).to(tl.int64)
    count = tl.load(hub_count + hub)
    first = tl.load(hub_first + hub).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        ok = (slot < count)[:, None] & (column < F)[None, :]
        total += tl.load(partial + (first + slot)[:, None] * F + column[None, :], mask=ok, other=0)
    y = tl.sum(total, 0)
    if dst_scale is not None:
        y = y * tl.load(dst_scale + row)
    tl.store(out + row * F + column, y, mask=column < F)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def edge_dots_kernel(  # type: ignore[no-untyped-def]
    a, b, col, row_of, begin_of, length_of, out, num_items,
    F: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``<a_i, b_j>`` per edge and head, ``[E, HEADS]``: one head per program of the second axis."""
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0).to(tl.int64)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)
    head = tl.program_id(1)
    width: tl.constexpr = F // HEADS
    offset = tl.arange(0, COLUMNS)
    column = (head * width + offset)[None, :]
    column_ok = (offset < width)[None, :]
    own = tl.load(a + (row * F)[:, None] + column, mask=item_ok[:, None] & column_ok, other=0.0)
    for k in range(longest):
        ok = k < length
        source = tl.load(col + begin + k, mask=ok, other=0).to(tl.int64)
        other = tl.load(b + (source * F)[:, None] + column, mask=ok[:, None] & column_ok, other=0.0)
        tl.store(out + (begin + k) * HEADS + head, tl.sum(own * other, 1), mask=ok)


def _checked(rowptr: Tensor, col: Tensor, x: Tensor, *others: Tensor | None) -> torch.device:
    device = check_devices(x, rowptr, col, *others)
    check_graph(rowptr, col, x.size(0))
    return device


def edge_dots(a: Tensor, b: Tensor, rowptr: Tensor, col: Tensor, heads: int = 1) -> Tensor:
    if a.dtype != torch.float32:
        return edge_dots_reference(a, b, rowptr, col, heads)
    device = _checked(rowptr, col, b, a)
    features = a.size(1)
    out = a.new_empty((col.numel(), heads))
    if features == 0:
        return out.zero_()
    config = config_for("float_sum", device, features // heads)
    rows, columns = whole_row_tile(config, features // heads, warp_size())
    schedule = schedule_for(rowptr, config.segment)
    launch(
        edge_dots_kernel, (triton.cdiv(schedule.num_items, rows), heads), device,
        a.contiguous(), b.contiguous(), col.contiguous(), schedule.row, schedule.begin, schedule.length, out,
        schedule.num_items, F=features, HEADS=heads, ROWS=rows, COLUMNS=columns, num_warps=config.num_warps,
    )  # fmt: skip
    return out


def float_sum(
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    dst_scale: Tensor | None = None,
    src_scale: Tensor | None = None,
    weight: Tensor | None = None,
    edge: Tensor | None = None,
) -> Tensor:
    if x.dtype != torch.float32:
        return float_sum_reference(x, rowptr, col, dst_scale, src_scale, weight, edge)
    device = _checked(rowptr, col, x, dst_scale, src_scale, weight, edge)
    col, features = col.contiguous(), x.size(1)
    options = (dst_scale, src_scale, weight, edge)
    dst_scale, src_scale, weight, edge = (None if t is None else t.contiguous() for t in options)
    x = x.contiguous()
    out = x.new_empty((rowptr.numel() - 1, features))
    if features == 0:
        return out
    config = config_for("float_sum", device, features)
    rows, columns = word_tile(config, features, warp_size())
    schedule = schedule_for(rowptr, config.segment)
    partial = x.new_empty((schedule.num_partial, features), dtype=torch.float32)
    tiles = triton.cdiv(features, columns)
    launch(
        float_sum_kernel, (triton.cdiv(schedule.num_items, rows), tiles), device,
        x, col, schedule.row, schedule.begin, schedule.length, schedule.slot, src_scale, dst_scale,
        weight, edge, out, partial, schedule.num_items,
        schedule.num_partial, F=features, HEADS=1 if weight is None else weight.size(1), ROWS=rows,
        COLUMNS=columns, UNROLL=config.unroll, num_warps=config.num_warps,
    )  # fmt: skip
    launch(
        float_sum_hub_kernel, (schedule.num_hubs, tiles), device,
        partial, schedule.hub_row, schedule.hub_first, schedule.hub_count, dst_scale, out,
        F=features, SLOTS=8, COLUMNS=columns, **launch_options(SECOND_STAGE),
    )  # fmt: skip
    return out
