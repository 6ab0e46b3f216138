"""Attention logits, their peak per destination, and softmax numerators."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import COLUMN, ONE, isolate
from .gather import gather_words
from .launch import launch, next_power_of_two
from .schedule import Schedule

__all__ = [
    "gat_logit", "hub_peak_kernel", "numerator", "peak_kernel", "peaks", "v2_inputs", "v2_logit",
    "v2_terms",
]  # fmt: skip


@triton.jit
def _leaky(x, slope):
    return tl.where(x > 0, x, x * slope)


@triton.jit
def gat_logit(alpha_src, alpha_dst, alpha_edge, source, row, edge, ok, head, slope, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``LeakyReLU(alpha_src[j] + alpha_dst[i] (+ alpha_edge[e]))``; indices and mask broadcast."""
    e = tl.load(alpha_src + source.to(tl.int64) * HEADS + head, mask=ok, other=0.0)
    e = e + tl.load(alpha_dst + row.to(tl.int64) * HEADS + head, mask=ok, other=0.0)
    if alpha_edge is not None:
        e = e + tl.load(alpha_edge + edge * HEADS + head, mask=ok, other=0.0)
    return _leaky(e, slope)


@triton.jit
def _entry_features(word, W: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Feature of each entry of ``isolate``, ``[WORDS, 32 / BITS]``."""
    entry = tl.arange(0, 32 // BITS)[None, :]
    return entry // 4 * (4 * W) + 4 * word[:, None] + entry % 4


@triton.jit
def v2_inputs(att, x_dst, row, row_ok, word, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What GATv2 logits need of the destinations: ``att`` and ``x_dst`` in the order of
    ``isolate``.
    """
    feature = _entry_features(word, W, BITS)
    ok = (word < W)[:, None] & (feature < F)
    weights = tl.load(att + feature, mask=ok, other=0.0)[None, :, :]
    target = tl.load(
        x_dst + row.to(tl.int64)[:, None, None] * F + feature[None, :, :],
        mask=row_ok[:, None, None] & ok[None, :, :], other=0.0,
    )  # fmt: skip
    return weights, target


@triton.jit
def _source_range(ptr, kind: tl.constexpr, source, ok, feature, feature_ok):  # type: ignore[no-untyped-def]
    if kind == ONE:
        value = tl.load(ptr)
    elif kind == COLUMN:
        value = tl.load(ptr + feature, mask=feature_ok, other=0.0)[None, :, :]
    else:
        value = tl.load(ptr + source, mask=ok, other=0.0)[:, None, None]
    return value


@triton.jit
def v2_terms(  # type: ignore[no-untyped-def]
    fields, weights, target, scale, offset, source, ok, word, slope,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """``att * LeakyReLU(x^_j + x_dst[i])`` per code, ``[ROWS, WORDS, 32 / BITS]``."""
    entry = tl.arange(0, 32 // BITS)
    shift = entry // 4 * BITS + entry % 2 * 8
    codes = (fields >> shift[None, None, :]).to(tl.float32)
    feature = _entry_features(word, W, BITS)
    feature_ok = (word < W)[:, None] & (feature < F)
    s = _source_range(scale, SCALE, source, ok, feature, feature_ok)
    start = _source_range(offset, OFFSET, source, ok, feature, feature_ok)
    return _leaky(codes * s + start + target, slope) * weights


@triton.jit
def v2_logit(  # type: ignore[no-untyped-def]
    terms,
    word,
    head: tl.constexpr,
    F: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The logit of one head, ``[ROWS]``."""
    own = _entry_features(word, W, BITS) // (F // HEADS) == head
    return tl.sum(tl.sum(tl.where(own[None, :, :], terms, 0.0), 2), 1)


@triton.jit
def numerator(e, ok, thresholds, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Softmax numerator of ``e <= 0``: ``exp(e)``, or how many of the ``TOP`` thresholds it
    reaches.

    The rounded exponential is at most one off; two comparisons make it exact.
    """
    if TOP == 0:
        value = tl.where(ok, tl.exp(e), 0.0)
    else:
        guess = tl.floor(tl.exp(e) * TOP + 0.5).to(tl.int32)
        guess = tl.minimum(tl.maximum(guess, 0), TOP)
        below = tl.load(thresholds + guess - 1, mask=guess > 0, other=float("-inf"))
        above = tl.load(thresholds + guess, mask=guess < TOP, other=float("inf"))
        value = guess - (e < below).to(tl.int32) + (e >= above).to(tl.int32)
        value = tl.where(ok, value, 0)
    return value


@triton.jit
def peak_kernel(  # type: ignore[no-untyped-def]
    words, col, row_of, begin_of, length_of, slot_of, scale, offset, alpha_src, alpha_dst,
    alpha_edge, att, x_dst, out, partial, slope, num_items, num_partial,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, V2: tl.constexpr, SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """``m_i = max_j e_ij`` per head; 0 for rows without edges."""
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)
    head = tl.arange(0, HEAD_TILE)[None, :]
    best = tl.full([ROWS, HEAD_TILE], float("-inf"), tl.float32)
    word = tl.arange(0, WORDS)
    if V2:
        weights, target = v2_inputs(att, x_dst, row, item_ok, word, F, W, BITS)
    for k in range(longest):
        ok = k < length
        source = tl.load(col + begin + k, mask=ok, other=0)
        if V2:
            tile = gather_words(words, source, ok, word, W)
            terms = v2_terms(
                isolate(tile, BITS, ROWS, WORDS), weights, target, scale, offset, source, ok,
                word, slope, F, W, BITS, SCALE, OFFSET,
            )  # fmt: skip
            e = tl.full([ROWS, HEAD_TILE], float("-inf"), tl.float32)
            for h in tl.static_range(HEADS):
                logit = v2_logit(terms, word, h, F, W, BITS, HEADS)
                e = tl.where(head == h, logit[:, None], e)
        else:
            e = gat_logit(
                alpha_src, alpha_dst, alpha_edge, source[:, None], row[:, None],
                (begin + k)[:, None], ok[:, None] & (head < HEADS), head, slope, HEADS,
            )  # fmt: skip
        best = tl.where(ok[:, None] & (e > best), e, best)
    if tl.program_id(0) * ROWS < num_partial:
        slot = tl.load(slot_of + item).to(tl.int64)[:, None]
        tl.store(partial + slot * HEADS + head, best, mask=(length > 0)[:, None] & (head < HEADS))
    else:
        best = tl.where((length > 0)[:, None], best, 0.0)
        ok = item_ok[:, None] & (head < HEADS)
        tl.store(out + row.to(tl.int64)[:, None] * HEADS + head, best, mask=ok)


@triton.jit
def hub_peak_kernel(  # type: ignore[no-untyped-def]
    partial, hub_row, hub_first, hub_count, out,
    HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Second stage of hubs: the largest of the partial peaks."""
    hub = tl.program_id(0)
    count = tl.load(hub_count + hub)
    first = tl.load(hub_first + hub).to(tl.int64)
    head = tl.arange(0, HEAD_TILE)
    best = tl.full([SLOTS, HEAD_TILE], float("-inf"), tl.float32)
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        ok = (slot < count)[:, None] & (head < HEADS)[None, :]
        pointers = partial + (first + slot)[:, None] * HEADS + head[None, :]
        best = tl.maximum(best, tl.load(pointers, mask=ok, other=float("-inf")))
    row = tl.load(hub_row + hub).to(tl.int64)
    tl.store(out + row * HEADS + head, tl.max(best, 0), mask=head < HEADS)


def peaks(
    device: torch.device, tensors: dict[str, Tensor | None], schedule: Schedule, num_dst: int,
    slope: float, meta: dict[str, Any], num_warps: int,
) -> Tensor:  # fmt: skip
    """``[num_dst, HEADS]`` float32, the peak logits."""
    heads = meta["HEADS"]
    like = schedule.row
    out = like.new_empty((num_dst, heads), dtype=torch.float32)
    partial = like.new_empty((schedule.num_partial, heads), dtype=torch.float32)
    names = (
        "scale", "offset", "alpha_src", "alpha_dst", "alpha_edge", "att", "x_dst",
    )  # fmt: skip
    head_tile = next_power_of_two(heads)
    launch(
        peak_kernel, (triton.cdiv(schedule.num_items, meta["ROWS"]),), device,
        tensors["words"], tensors["col"], schedule.row, schedule.begin, schedule.length,
        schedule.slot, *(tensors[name] for name in names), out, partial, slope,
        schedule.num_items, schedule.num_partial, HEAD_TILE=head_tile, num_warps=num_warps, **meta,
    )  # fmt: skip
    launch(
        hub_peak_kernel, (schedule.num_hubs,), device,
        partial, schedule.hub_row, schedule.hub_first, schedule.hub_count, out,
        HEADS=heads, HEAD_TILE=head_tile, SLOTS=32, num_warps=1,
    )  # fmt: skip
    return out
