"""Sums of float rows over neighbours, for the steps of propagation that are not quantized."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import config_for, launch, warp_size, word_tile
from .schedule import schedule_for

__all__ = ["float_sum", "float_sum_hub_kernel", "float_sum_kernel"]


@triton.jit
def float_sum_kernel(  # type: ignore[no-untyped-def]
    x, col, row_of, begin_of, length_of, slot_of, src_scale, dst_scale, out, partial, num_items,
    num_partial,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """``y_i = d_i sum_j s_j x_j`` in float32, in the order of the edges."""
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = (column < F)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(col + begin + (k + u), mask=ok, other=0)
            pointers = x + (source.to(tl.int64) * F)[:, None] + column[None, :]
            value = tl.load(pointers, mask=ok[:, None] & column_ok, other=0.0)
            if src_scale is not None:
                value = value * tl.load(src_scale + source, mask=ok, other=0.0)[:, None]
            total += value
    if tl.program_id(0) * ROWS < num_partial:
        slot = tl.load(slot_of + item).to(tl.int64)
        ok = (length > 0)[:, None] & column_ok
        tl.store(partial + (slot * F)[:, None] + column[None, :], total, mask=ok)
    else:
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
    y = tl.sum(total, 0) * tl.load(dst_scale + row)
    tl.store(out + row * F + column, y, mask=column < F)


def float_sum(x: Tensor, rowptr: Tensor, col: Tensor, dst_scale: Tensor, src_scale: Tensor | None = None) -> Tensor:
    """``dst_scale_i * sum_j src_scale_j x_j`` over the edges, ``[num_dst, F]`` float32."""
    device, features = x.device, x.size(1)
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
        out, partial, schedule.num_items, schedule.num_partial, F=features, ROWS=rows,
        COLUMNS=columns, UNROLL=config.unroll, num_warps=config.num_warps,
    )  # fmt: skip
    launch(
        float_sum_hub_kernel, (schedule.num_hubs, tiles), device,
        partial, schedule.hub_row, schedule.hub_first, schedule.hub_count, dst_scale, out,
        F=features, SLOTS=8, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out
