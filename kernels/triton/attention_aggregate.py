r"""``attention_aggregate`` on Triton: softmax over neighbours and weighted sum of packed messages.

Quantized softmax numerators depend on the row's peak logit and cannot be rescaled afterwards, so
the peak comes first, in a pass of its own (which reads no messages for GAT); numerators, their sum
and the weighted sum of codes follow in one pass over the edges.  Nothing of size ``E x H`` or ``E x
F`` is written.  Numerators of 8 bits or fewer are integers and so are the sums: ``255 * (255 << 8)
* 256 < 2^32`` keeps those of a segment exact.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import attention_thresholds
from ..arithmetic import finish as finish_rows
from ..layout import row_words, top_code
from .aggregate import head_span, unshift
from .attention_logits import gat_logit, numerator, peaks, v2_inputs, v2_logit, v2_terms
from .bits import (
    ROW,
    feature_tile,
    field_floats,
    field_shift,
    finish,
    isolate,
    isolated_by_feature,
    load_range,
)
from .gather import gather_words, head_tile, per_code, select_head
from .launch import check_devices, check_graph, config_for, launch, warp_size, word_tile
from .ranges import range_kind
from .schedule import Schedule, schedule_for

__all__ = ["attention_aggregate", "attention_hub_kernel", "attention_kernel"]

FLOAT_BITS = 32


@triton.jit
def _normalize(  # type: ignore[no-untyped-def]
    total, share, offsets, scale, offset, first,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    INTEGER: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """``(s total) / share + l``; 0 where ``share`` is 0."""
    feature, feature_ok = feature_tile(first, F, W, BITS, WORDS)
    total = total.to(tl.float32)
    share = share.to(tl.float32)
    divisor = tl.where(share > 0, share, 1.0)
    if SCALE != ROW:
        total = total * load_range(scale, SCALE, 0, True, feature, feature_ok)
    if OFFSET == ROW:
        y = tl.div_rn(total + offsets, divisor)
    else:
        start = load_range(offset, OFFSET, 0, True, feature, feature_ok)
        y = tl.div_rn(total, divisor) + start
    return tl.where(share > 0, y, 0.0)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    words, col, row, begin, length, longest, word, scale, offset, alpha_src, alpha_dst, alpha_edge,
    att, x_dst, peak, thresholds, slope,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr, HEADS: tl.constexpr, SPAN: tl.constexpr, TOP: tl.constexpr,
    V2: tl.constexpr, INTEGER: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Weighted sums of codes, sums of numerators and of weighted offsets: three feature tiles."""
    codes: tl.constexpr = 32 // BITS
    kind: tl.constexpr = tl.uint32 if INTEGER else tl.float32
    head_of = head_tile(word, F, W, BITS, WORDS, HEADS, SPAN)
    total = tl.zeros([ROWS, WORDS, codes], kind)
    share = tl.zeros([ROWS, head_of.shape[1], SPAN], kind)
    offsets = tl.zeros([ROWS, head_of.shape[1], SPAN], tl.float32)
    if V2:
        weights, target = v2_inputs(att, x_dst, row, length > 0, word, F, W, BITS)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(col + begin + (k + u), mask=ok, other=0)
            fields = isolate(gather_words(words, source, ok, word, W), BITS, ROWS, WORDS)
            if V2:
                terms = v2_terms(
                    fields, weights, target, scale, offset, source, ok, word, slope,
                    F, W, BITS, SCALE, OFFSET,
                )  # fmt: skip
            factor = tl.zeros([ROWS, head_of.shape[1], SPAN], kind)
            for h in tl.static_range(HEADS):
                if V2:
                    e = v2_logit(terms, word, h, F, W, BITS, HEADS)
                else:
                    e = gat_logit(
                        alpha_src, alpha_dst, alpha_edge, source, row, begin + (k + u), ok, h,
                        slope, HEADS,
                    )  # fmt: skip
                e = e - tl.load(peak + row.to(tl.int64) * HEADS + h, mask=ok, other=0.0)
                weight = numerator(e, ok, thresholds, TOP).to(kind)
                factor = select_head(factor, head_of, h, weight, HEADS)
            share += factor
            if OFFSET == ROW:
                offsets += factor * tl.load(offset + source, mask=ok, other=0.0)[:, None, None]
            if SCALE == ROW:
                factor = factor * tl.load(scale + source, mask=ok, other=0.0)[:, None, None]
            factor = per_code(factor, BITS, ROWS, WORDS, SPAN)
            if INTEGER:
                total += factor * fields
            else:
                total = tl.fma(factor, field_floats(fields), total)
    total = isolated_by_feature(total, BITS, ROWS, WORDS)
    if INTEGER:
        total = (total >> field_shift(BITS, WORDS).to(tl.uint32)).to(tl.int32)
    else:
        total = unshift(total, BITS, WORDS)
    share = isolated_by_feature(per_code(share, BITS, ROWS, WORDS, SPAN), BITS, ROWS, WORDS)
    offsets = isolated_by_feature(per_code(offsets, BITS, ROWS, WORDS, SPAN), BITS, ROWS, WORDS)
    if INTEGER:
        share = share.to(tl.int32)
    return total, share, offsets


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    words, col, row_of, begin_of, length_of, slot_of, scale, offset, alpha_src, alpha_dst,
    alpha_edge, att, x_dst, peak, thresholds, bias, out_scale, out_offset, out, partial, slope,
    num_items, num_partial,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr, HEADS: tl.constexpr, SPAN: tl.constexpr, TOP: tl.constexpr,
    V2: tl.constexpr, INTEGER: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
    RELU: tl.constexpr, PACK: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr,
):  # fmt: skip
    r"""``y_i = (s sum_j k_ij c_j) / sum_j k_ij + l`` per head."""
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)
    first = tl.program_id(1) * WORDS
    total, share, offsets = _sums(
        words, col, row, begin, length, longest, first + tl.arange(0, WORDS), scale, offset,
        alpha_src, alpha_dst, alpha_edge, att, x_dst, peak, thresholds, slope,
        F, W, BITS, ROWS, WORDS, UNROLL, HEADS, SPAN, TOP, V2, INTEGER, SCALE, OFFSET,
    )  # fmt: skip
    if tl.program_id(0) * ROWS < num_partial:
        slot = tl.load(slot_of + item).to(tl.int64)
        feature, _ = feature_tile(first, F, W, BITS, WORDS)
        width: tl.constexpr = 32 // BITS * W
        plane = tl.cast(num_partial, tl.int64) * width
        ok = (length > 0)[:, None, None] & (first * 4 + tl.arange(0, 4 * WORDS) < 4 * W)[None, None]
        at = partial + slot[:, None, None] * width + feature[None, :, :]
        tl.store(at, total, mask=ok)
        tl.store(at + plane, share, mask=ok)
        if OFFSET == ROW:
            tl.store(at + 2 * plane, offsets, mask=ok)
    else:
        y = _normalize(total, share, offsets, scale, offset, first, F, W, BITS, WORDS, INTEGER, SCALE, OFFSET)
        finish(
            y, out, row, item_ok, first, None, bias, out_scale, out_offset,
            F, W, BITS, ROWS, WORDS, RELU, PACK, OUT_SCALE, OUT_OFFSET,
        )  # fmt: skip


@triton.jit
def attention_hub_kernel(  # type: ignore[no-untyped-def]
    partial, hub_row, hub_first, hub_count, scale, offset, bias, out_scale, out_offset, out,
    num_partial,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
    WORDS: tl.constexpr, INTEGER: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
    RELU: tl.constexpr, PACK: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Second stage of hubs: add up the partial sums of one row in the order of their slots."""
    hub = tl.program_id(0)
    row = tl.load(hub_row + hub + tl.arange(0, 1))
    count = tl.load(hub_count + hub)
    first_slot = tl.load(hub_first + hub).to(tl.int64)
    first = tl.program_id(1) * WORDS
    feature, _ = feature_tile(first, F, W, BITS, WORDS)
    in_row = (first * 4 + tl.arange(0, 4 * WORDS) < 4 * W)[None, None, :]
    width: tl.constexpr = 32 // BITS * W
    plane = tl.cast(num_partial, tl.int64) * width
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    total = tl.zeros([SLOTS, 8 // BITS, 4 * WORDS], kind)
    share = tl.zeros([SLOTS, 8 // BITS, 4 * WORDS], kind)
    offsets = tl.zeros([SLOTS, 8 // BITS, 4 * WORDS], tl.float32)
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        ok = (slot < count)[:, None, None] & in_row
        at = partial + (first_slot + slot)[:, None, None] * width + feature[None, :, :]
        total += tl.load(at, mask=ok, other=0)
        share += tl.load(at + plane, mask=ok, other=0)
        if OFFSET == ROW:
            offsets += tl.load(at + 2 * plane, mask=ok, other=0)
    y = _normalize(
        tl.sum(total, 0)[None, :, :], tl.sum(share, 0)[None, :, :], tl.sum(offsets, 0)[None, :, :],
        scale, offset, first, F, W, BITS, WORDS, INTEGER, SCALE, OFFSET,
    )  # fmt: skip
    finish(
        y, out, row, row >= 0, first, None, bias, out_scale, out_offset,
        F, W, BITS, 1, WORDS, RELU, PACK, OUT_SCALE, OUT_OFFSET,
    )  # fmt: skip


@cache
def _thresholds(bits: int, device: torch.device) -> Tensor:
    return attention_thresholds(bits).to(device)


def _launch(
    device: torch.device, tensors: dict[str, Tensor | None], schedule: Schedule, out: Tensor,
    slope: float, attention_bits: int, unroll: int, meta: dict[str, Any], epilogue: dict[str, Any],
    num_warps: int,
) -> None:  # fmt: skip
    quantized = attention_bits != FLOAT_BITS
    integer = quantized and ROW.value not in (meta["SCALE"], meta["OFFSET"])
    peak = peaks(device, tensors, schedule, out.size(0), slope, meta, num_warps)
    features, words, bits, heads = meta["F"], meta["W"], meta["BITS"], meta["HEADS"]
    planes = 3 if meta["OFFSET"] == ROW.value else 2
    partial = out.new_empty(
        (planes, schedule.num_partial, 32 // bits * words),
        dtype=torch.int32 if integer else torch.float32,
    )
    names = ("scale", "offset", "alpha_src", "alpha_dst", "alpha_edge", "att", "x_dst")
    tail = [tensors[name] for name in ("bias", "out_scale", "out_offset")]
    thresholds = _thresholds(attention_bits, device) if quantized else None
    tiles = triton.cdiv(words, meta["WORDS"])
    launch(
        attention_kernel, (triton.cdiv(schedule.num_items, meta["ROWS"]), tiles), device,
        tensors["words"], tensors["col"], schedule.row, schedule.begin, schedule.length,
        schedule.slot, *(tensors[name] for name in names), peak, thresholds, *tail, out, partial,
        slope, schedule.num_items, schedule.num_partial, UNROLL=unroll,
        SPAN=head_span(features, heads, bits), TOP=top_code(attention_bits) if quantized else 0,
        INTEGER=integer, num_warps=num_warps, **meta, **epilogue,
    )  # fmt: skip
    hub = {k: meta[k] for k in ("F", "W", "BITS", "WORDS", "SCALE", "OFFSET")}
    launch(
        attention_hub_kernel, (schedule.num_hubs, tiles), device,
        partial, schedule.hub_row, schedule.hub_first, schedule.hub_count, tensors["scale"],
        tensors["offset"], *tail, out, schedule.num_partial, SLOTS=4, INTEGER=integer,
        num_warps=4, **hub, **epilogue,
    )  # fmt: skip


def attention_aggregate(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    heads: int,
    attention_bits: int,
    negative_slope: float,
    alpha_src: Tensor | None = None,
    alpha_dst: Tensor | None = None,
    alpha_edge: Tensor | None = None,
    att: Tensor | None = None,
    x_dst: Tensor | None = None,
    concat: bool = True,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    schedule: Tensor | None = None,
) -> Tensor:
    if not concat or out_bits not in (0, bits):
        # The mean over heads, or packing at another width, crosses threads: a second pass.
        y = attention_aggregate(
            words, rowptr, col, scale, offset, num_features, bits, heads, attention_bits,
            negative_slope, alpha_src, alpha_dst, alpha_edge, att, x_dst,
        )  # fmt: skip
        if not concat:
            y = y.view(y.size(0), heads, -1).mean(1)
        return finish_rows(y, bias, relu, out_scale, out_offset, out_bits)
    tensors = {
        "words": words, "col": col, "scale": scale, "offset": offset, "alpha_src": alpha_src,
        "alpha_dst": alpha_dst, "alpha_edge": alpha_edge, "att": att, "x_dst": x_dst,
        "bias": bias, "out_scale": out_scale, "out_offset": out_offset,
    }  # fmt: skip
    device = check_devices(rowptr, *tensors.values())
    check_graph(rowptr, col, words.size(0))
    tensors = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    num_words = row_words(num_features, bits)
    out = words.new_empty(
        (rowptr.numel() - 1, num_words if out_bits else num_features),
        dtype=torch.int32 if out_bits else torch.float32,
    )
    config = config_for("attention" if att is None else "attention_v2", device, num_words)
    rows, tile = word_tile(config, num_words, warp_size())
    if att is not None:  # a logit needs the whole row in one tile
        rows, tile = max(1, rows * tile // _width(num_words)), _width(num_words)
    meta = {
        "F": num_features, "W": num_words, "BITS": bits, "ROWS": rows, "WORDS": tile,
        "HEADS": heads, "V2": att is not None, "SCALE": range_kind(scale),
        "OFFSET": range_kind(offset),
    }  # fmt: skip
    epilogue = {
        "RELU": relu, "PACK": out_bits != 0, "OUT_SCALE": range_kind(out_scale),
        "OUT_OFFSET": range_kind(out_offset),
    }  # fmt: skip
    _launch(
        device, tensors, schedule_for(rowptr, config.segment), out, negative_slope, attention_bits,
        config.unroll, meta, epilogue, config.num_warps,
    )  # fmt: skip
    return out


def _width(words: int) -> int:
    return 1 << max(0, words - 1).bit_length()
