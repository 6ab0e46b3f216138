"""Attention logits, their peak per destination, and softmax numerators."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.bits import COLUMN, HEAD, ONE, field_codes, field_shift, isolate, row_magic
from ..triton.gather import entry_features, gather_words, per_code, spread_heads, sum_heads
from ..triton.launch import MAGIC_BITS, UNSPECIALIZED, Config, launch, launch_options
from ..triton.schedule import Schedule

__all__ = [
    "gat_logits", "hub_peak_kernel", "load_heads", "numerator", "peak_kernel", "peaks", "v2_inputs",
    "v2_logits",
]  # fmt: skip


@triton.jit
def _leaky(x, slope):
    return tl.where(x > 0, x, x * slope)


@triton.jit
def load_heads(ptr, node, ok, head, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values per node and head, ``[ROWS, HEAD_TILE]``; ``head`` is ``[1, HEAD_TILE]``."""
    mask = ok[:, None] & (head < HEADS)
    return tl.load(ptr + (node.to(tl.int64) * HEADS)[:, None] + head, mask=mask, other=0.0)


@triton.jit
def gat_logits(alpha_src, target, alpha_edge, source, edge, ok, head, slope, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``LeakyReLU(alpha_src[j] + alpha_dst[i] (+ alpha_edge[e]))``, ``[ROWS, HEAD_TILE]``; ``target``
    is ``alpha_dst[i]``.
    """
    e = load_heads(alpha_src, source, ok, head, HEADS) + target
    if alpha_edge is not None:
        e = e + load_heads(alpha_edge, edge, ok, head, HEADS)
    return _leaky(e, slope)


@triton.jit
def v2_inputs(att, x_dst, row, row_ok, word, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What GATv2 logits need of the destinations: ``att`` and ``x_dst`` in the order of
    ``isolate``.
    """
    feature = entry_features(word, W, BITS)
    ok = (word < W)[:, None] & (feature < F)
    weights = tl.load(att + feature, mask=ok, other=0.0)[None, :, :]
    target = tl.load(
        x_dst + row.to(tl.int64)[:, None, None] * F + feature[None, :, :],
        mask=row_ok[:, None, None] & ok[None, :, :], other=0.0,
    )  # fmt: skip
    return weights, target


@triton.jit
def _source_range(  # type: ignore[no-untyped-def]
    ptr, kind: tl.constexpr, source, ok, word, head,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    HEADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A range tensor of the sources, broadcast to ``[ROWS, WORDS, 32 / BITS]``."""
    if kind == ONE:
        value = tl.load(ptr)
    elif kind == COLUMN:
        feature = entry_features(word, W, BITS)
        feature_ok = (word < W)[:, None] & (feature < F)
        value = tl.load(ptr + feature, mask=feature_ok, other=0.0)[None, :, :]
    elif kind == HEAD:
        value = spread_heads(load_heads(ptr, source, ok, head, HEADS), word, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
        value = per_code(value, BITS, ROWS, WORDS)
    else:
        value = tl.load(ptr + source, mask=ok, other=0.0)[:, None, None]
    return value


@triton.jit
def v2_logits(  # type: ignore[no-untyped-def]
    fields, weights, target, scale, offset, multiplier, source, ok, word, head, slope, magic,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr, SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """``<att, LeakyReLU(x^_j + x_dst[i])>`` per head, ``[ROWS, HEAD_TILE]``; ``fields`` as
    ``isolate`` gives them.
    """
    codes = field_codes(fields, field_shift(BITS), magic)
    s = _source_range(scale, SCALE, source, ok, word, head, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
    start = _source_range(offset, OFFSET, source, ok, word, head, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
    if multiplier is not None:
        times = tl.load(multiplier + source, mask=ok, other=0).to(tl.float32)[:, None, None]
        s, start = s * times, start * times
    # What does not depend on the edge is added first, outside the loop; their order has no canon, as that of the sum.
    tile: tl.constexpr = codes.shape
    hidden = tl.fma(codes, tl.broadcast_to(s, tile), tl.broadcast_to(start + target, tile))
    terms = _leaky(hidden, slope) * weights
    return sum_heads(terms, word, F, W, BITS, ROWS, WORDS, HEADS, HEAD_TILE, ALIGNED)


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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def peak_kernel(  # type: ignore[no-untyped-def]
    words, col, row_of, begin_of, length_of, slot_of, scale, offset, alpha_src, alpha_dst,
    alpha_edge, att, x_dst, multiplier, out, partial, slope, num_items, num_partial, magic,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr, V2: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr,
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
    magic = row_magic(magic, length)
    if V2:
        weights, target = v2_inputs(att, x_dst, row, item_ok, word, F, W, BITS)
    else:
        target = load_heads(alpha_dst, row, item_ok, head, HEADS)
    for k in range(longest):
        ok = k < length
        source = tl.load(col + begin + k, mask=ok, other=0)
        if V2:
            fields = isolate(gather_words(words, source, ok, word, W), BITS, ROWS, WORDS)
            e = v2_logits(
                fields, weights, target, scale, offset, multiplier, source, ok, word, head, slope, magic,
                F, W, BITS, ROWS, WORDS, HEADS, HEAD_TILE, ALIGNED, SCALE, OFFSET,
            )  # fmt: skip
        else:
            e = gat_logits(alpha_src, target, alpha_edge, source, begin + k, ok, head, slope, HEADS)
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
    slope: float, meta: dict[str, Any], config: Config,
) -> Tensor:  # fmt: skip
    """``[num_dst, HEADS]`` float32, the peak logits."""
    heads = meta["HEADS"]
    like = schedule.row
    out = like.new_empty((num_dst, heads), dtype=torch.float32)
    partial = like.new_empty((schedule.num_partial, heads), dtype=torch.float32)
    names = ("scale", "offset", "alpha_src", "alpha_dst", "alpha_edge", "att", "x_dst")
    multiplier = tensors["multiplier"] if meta["V2"] else None
    launch(
        peak_kernel, (triton.cdiv(schedule.num_items, meta["ROWS"]),), device,
        tensors["words"], tensors["col"], schedule.row, schedule.begin, schedule.length,
        schedule.slot, *(tensors[name] for name in names), multiplier, out, partial, slope,
        schedule.num_items, schedule.num_partial, MAGIC_BITS, **launch_options(config), **meta,
    )  # fmt: skip
    launch(
        hub_peak_kernel, (schedule.num_hubs,), device,
        partial, schedule.hub_row, schedule.hub_first, schedule.hub_count, out,
        HEADS=heads, HEAD_TILE=meta["HEAD_TILE"], SLOTS=32, num_warps=1,
    )  # fmt: skip
    return out
