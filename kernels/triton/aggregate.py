"""``aggregate`` on Triton: dequantize, aggregate and requantize in one launch (two with hubs)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import parts_per_byte, row_words
from .bits import ROW, feature_tile, field_shift, finish, load_range
from .gather import max_codes, sum_codes, sum_weighted
from .launch import check_devices, check_graph, config_for, launch, warp_size, word_tile
from .ranges import range_kind
from .schedule import Schedule, schedule_for

__all__ = ["aggregate", "aggregate_kernel", "head_span", "hub_kernel", "unshift"]


@triton.jit
def unshift(total, BITS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Undo ``field_shift`` on float32 sums: an exact power of two."""
    exponent = (127 - field_shift(BITS, WORDS)) << 23
    return total * exponent.to(tl.float32, bitcast=True)


@triton.jit
def _affine(  # type: ignore[no-untyped-def]
    total, offsets, degree, scale, offset, first,
    MODE: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The affine step after a reduction over codes; ``degree`` is ``[ROWS]`` int32."""
    feature, feature_ok = feature_tile(first, F, W, BITS, WORDS)
    if MODE == "weighted":
        y = unshift(total, BITS, WORDS)
        if SCALE != ROW:
            y = y * load_range(scale, SCALE, 0, True, feature, feature_ok)
        if OFFSET != ROW:
            offsets = offsets * load_range(offset, OFFSET, 0, True, feature, feature_ok)
        y = y + offsets
    else:
        s = load_range(scale, SCALE, 0, True, feature, feature_ok)
        start = load_range(offset, OFFSET, 0, True, feature, feature_ok)
        if MODE == "sum":
            y = total.to(tl.float32) * s + degree.to(tl.float32)[:, None, None] * start
        else:
            codes = total >> field_shift(BITS, WORDS)
            y = codes.to(tl.float32) * s + start
            y = tl.where((degree > 0)[:, None, None], y, 0.0)
    return y


@triton.jit
def aggregate_kernel(  # type: ignore[no-untyped-def]
    words, col, row_of, begin_of, length_of, slot_of, weight, scale, offset, dst_scale, bias,
    out_scale, out_offset, out, partial, num_items, num_partial,
    MODE: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, UNROLL: tl.constexpr, HEADS: tl.constexpr, SPAN: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr, PACK: tl.constexpr,
    OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr,
):  # fmt: skip
    r"""``y_i = (s sum_j w_ij c_j + l sum_j w_ij) d_i + b``, or the largest ``c_j`` in place of the
    sum.  Segments of hubs leave their partial results in ``partial``.
    """
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)  # items are sorted
    first = tl.program_id(1) * WORDS
    word = first + tl.arange(0, WORDS)
    edge = col + begin
    if MODE == "weighted":
        total, offsets = sum_weighted(
            words, edge, begin, length, longest, word, weight, scale, offset,
            F, W, BITS, ROWS, WORDS, UNROLL, HEADS, SPAN, SCALE == ROW, OFFSET == ROW,
        )  # fmt: skip
    elif MODE == "sum":
        total = sum_codes(words, edge, length, longest, word, W, BITS, ROWS, WORDS, UNROLL)
        offsets = total
    else:
        total = max_codes(words, edge, length, longest, word, W, BITS, ROWS, WORDS, UNROLL)
        offsets = total
    if tl.program_id(0) * ROWS < num_partial:
        slot = tl.load(slot_of + item).to(tl.int64)
        feature, _ = feature_tile(first, F, W, BITS, WORDS)
        width: tl.constexpr = 32 // BITS * W
        ok = (length > 0)[:, None, None] & (first * 4 + tl.arange(0, 4 * WORDS) < 4 * W)[None, None]
        target = partial + slot[:, None, None] * width + feature[None, :, :]
        tl.store(target, total, mask=ok)
        if MODE == "weighted":
            tl.store(target + tl.cast(num_partial, tl.int64) * width, offsets, mask=ok)
    else:
        y = _affine(total, offsets, length, scale, offset, first, MODE, F, W, BITS, WORDS, SCALE, OFFSET)
        finish(
            y, out, row, item_ok, first, dst_scale, bias, out_scale, out_offset,
            F, W, BITS, ROWS, WORDS, RELU, PACK, OUT_SCALE, OUT_OFFSET,
        )  # fmt: skip


@triton.jit
def hub_kernel(  # type: ignore[no-untyped-def]
    partial, rowptr, hub_row, hub_first, hub_count, scale, offset, dst_scale, bias, out_scale,
    out_offset, out, num_partial,
    MODE: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
    WORDS: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr,
    PACK: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Second stage of hubs: reduce the partial results of one row in the order of their slots."""
    hub = tl.program_id(0)
    row = tl.load(hub_row + hub + tl.arange(0, 1))
    count = tl.load(hub_count + hub)
    first_slot = tl.load(hub_first + hub).to(tl.int64)
    first = tl.program_id(1) * WORDS
    feature, _ = feature_tile(first, F, W, BITS, WORDS)
    in_row = (first * 4 + tl.arange(0, 4 * WORDS) < 4 * W)[None, None, :]
    width: tl.constexpr = 32 // BITS * W
    source = partial + first_slot * width + feature[None, :, :]
    kind: tl.constexpr = tl.float32 if MODE == "weighted" else tl.int32
    total = tl.zeros([SLOTS, 8 // BITS, 4 * WORDS], kind)
    offsets = tl.zeros([SLOTS, 8 // BITS, 4 * WORDS], kind)
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        ok = (slot < count)[:, None, None] & in_row
        pointers = source + slot.to(tl.int64)[:, None, None] * width
        value = tl.load(pointers, mask=ok, other=0)
        if MODE == "max":
            total = tl.maximum(total, value)
        else:
            total += value
        if MODE == "weighted":
            offsets += tl.load(pointers + tl.cast(num_partial, tl.int64) * width, mask=ok, other=0)
    total = tl.max(total, 0) if MODE == "max" else tl.sum(total, 0)
    degree = (tl.load(rowptr + row + 1) - tl.load(rowptr + row)).to(tl.int32)
    y = _affine(
        total[None, :, :], tl.sum(offsets, 0)[None, :, :], degree, scale, offset, first,
        MODE, F, W, BITS, WORDS, SCALE, OFFSET,
    )  # fmt: skip
    finish(
        y, out, row, row >= 0, first, dst_scale, bias, out_scale, out_offset,
        F, W, BITS, 1, WORDS, RELU, PACK, OUT_SCALE, OUT_OFFSET,
    )  # fmt: skip


def head_span(num_features: int, heads: int, bits: int) -> int:
    """How many weights a word of codes needs (``SPAN`` of :func:`.gather.head_tile`)."""
    if heads == 1:
        return 1
    whole_words = num_features // heads % 4 == 0
    return parts_per_byte(bits) if whole_words else 4 * parts_per_byte(bits)


def _launch(
    device: torch.device, tensors: dict[str, Tensor | None], out: Tensor, rowptr: Tensor,
    schedule: Schedule, mode: str, unroll: int, heads: int, meta: dict[str, Any],
    rows: int, num_warps: int,
) -> None:  # fmt: skip
    words, bits = meta["W"], meta["BITS"]
    planes = 2 if mode == "weighted" else 1
    partial = out.new_empty(
        (planes, schedule.num_partial, 32 // bits * words),
        dtype=torch.float32 if mode == "weighted" else torch.int32,
    )
    tail = [tensors[k] for k in ("scale", "offset", "dst_scale", "bias", "out_scale", "out_offset")]
    tiles = triton.cdiv(words, meta["WORDS"])
    launch(
        aggregate_kernel, (triton.cdiv(schedule.num_items, rows), tiles), device,
        tensors["words"], tensors["col"], schedule.row, schedule.begin, schedule.length,
        schedule.slot, tensors["edge_weight"], *tail, out, partial, schedule.num_items,
        schedule.num_partial, MODE=mode, ROWS=rows, UNROLL=unroll, HEADS=heads,
        SPAN=head_span(meta["F"], heads, bits), num_warps=num_warps, **meta,
    )  # fmt: skip
    launch(
        hub_kernel, (schedule.num_hubs, tiles), device,
        partial, rowptr, schedule.hub_row, schedule.hub_first, schedule.hub_count, *tail, out,
        schedule.num_partial, MODE=mode, SLOTS=8, num_warps=4, **meta,
    )  # fmt: skip


def aggregate(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    reduce: str = "sum",
    edge_weight: Tensor | None = None,
    dst_scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    schedule: Tensor | None = None,
) -> Tensor:
    per_row = range_kind(scale) == ROW.value or range_kind(offset) == ROW.value
    if reduce == "max" and per_row:
        raise ValueError("Expected one range per tensor or column for reduce='max' (got one per row)")
    if out_bits not in (0, bits):
        # Packing at another width crosses threads; a second kernel does it.
        from .quantize_pack import quantize_pack

        y = aggregate(
            words, rowptr, col, scale, offset, num_features, bits, reduce, edge_weight, dst_scale,
            bias, relu,
        )  # fmt: skip
        assert out_scale is not None
        assert out_offset is not None
        return quantize_pack(y, out_scale, out_offset, out_bits)
    tensors = {
        "words": words, "col": col, "edge_weight": edge_weight, "scale": scale, "offset": offset,
        "dst_scale": dst_scale, "bias": bias, "out_scale": out_scale, "out_offset": out_offset,
    }  # fmt: skip
    device = check_devices(rowptr, *tensors.values())
    check_graph(rowptr, col, words.size(0))
    tensors = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    mode = "weighted" if edge_weight is not None or per_row else reduce
    num_words = row_words(num_features, bits)
    width = num_words if out_bits else num_features
    out = words.new_empty((rowptr.numel() - 1, width), dtype=torch.int32 if out_bits else torch.float32)
    config = config_for(f"aggregate_{mode}", device, num_words)
    rows, tile = word_tile(config, num_words, warp_size())
    meta = {
        "F": num_features, "W": num_words, "BITS": bits, "WORDS": tile,
        "SCALE": range_kind(scale), "OFFSET": range_kind(offset), "RELU": relu,
        "PACK": out_bits != 0, "OUT_SCALE": range_kind(out_scale),
        "OUT_OFFSET": range_kind(out_offset),
    }  # fmt: skip
    heads = edge_weight.size(1) if edge_weight is not None and edge_weight.dim() == 2 else 1
    _launch(
        device, tensors, out, rowptr, schedule_for(rowptr, config.segment), mode, config.unroll,
        heads, meta, rows, config.num_warps,
    )  # fmt: skip
    return out
