"""Weighted sums of codes over neighbours, on Triton: what the kernels of :mod:`.triton` compute with in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.bits import (
    HEAD,
    ROW,
    field_floats,
    field_shift,
    isolate,
    isolated_part,
    load_range,
    part_features,
    part_sums,
    power_of_two,
    row_magic,
    spread,
    sums_by_part,
)
from ..triton.epilogue import scale_bias_relu
from ..triton.gather import gather_words, per_code, spread_heads
from .triton_logits import gat_logits, load_heads, numerator, v2_inputs, v2_logits

__all__ = ["inverse_of", "normalize", "part_of_sums", "weighted_sums"]


@triton.jit
def normalize(  # type: ignore[no-untyped-def]
    total, inverse, offsets, scale, offset, bias, part: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr, SCALE: tl.constexpr,
    OFFSET: tl.constexpr, MULTIPLIED: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``(s total) inverse + l`` of a part tile, ``l`` times the mean multiplier where there are any, 0 where
    ``inverse`` is 0; then bias and ReLU.
    """
    feature, feature_ok = part_features(0, part, F, W, WORDS)
    total = total.to(tl.float32)
    if SCALE < ROW:
        total = total * load_range(scale, SCALE, 0, True, feature, feature_ok)
    if OFFSET >= ROW:
        y = (total + offsets) * inverse
    else:
        start = load_range(offset, OFFSET, 0, True, feature, feature_ok)
        if MULTIPLIED:
            start = start * (offsets.to(tl.float32) * inverse)
        y = total * inverse + start
    y = tl.where(inverse > 0, y, 0.0)
    return scale_bias_relu(y, None, bias, feature, feature_ok, RELU)


@triton.jit
def inverse_of(share):
    """``1 / share`` per head, correctly rounded; 0 for rows without edges."""
    share = share.to(tl.float32)
    return tl.where(share > 0, tl.div_rn(1.0, tl.where(share > 0, share, 1.0)), 0.0)


@triton.jit
def _load_source_heads(ptr, kind: tl.constexpr, source, ok, head, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A range per source row, or per row and head, for ``[ROWS, HEAD_TILE]``."""
    if kind == HEAD:
        value = load_heads(ptr, source, ok, head, HEADS)
    else:
        value = tl.load(ptr + source, mask=ok, other=0.0)[:, None]
    return value


@triton.jit
def weighted_sums(  # type: ignore[no-untyped-def]
    words, col, row, begin, length, longest, word, scale, offset, alpha_src, alpha_dst, alpha_edge,
    att, x_dst, peak, thresholds, multiplier, slope, magic,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr,
    TOP: tl.constexpr, V2: tl.constexpr, INTEGER: tl.constexpr, PAIRED: tl.constexpr, SHIFTED: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Weighted sums of codes (``PAIRED``: in the form of ``sums_by_part``, else of ``isolate``), and
    sums of numerators and of weighted offsets (with multipliers: of weights) per head.
    """
    kind: tl.constexpr = tl.uint32 if INTEGER else tl.float32
    parts: tl.constexpr = 8 // BITS
    head = tl.arange(0, HEAD_TILE)[None, :]
    exists = length > 0
    magic = row_magic(magic, length)
    if PAIRED:
        total = tl.zeros([ROWS, 2 * WORDS, parts], kind)
    else:
        total = tl.zeros([ROWS, WORDS, 4 * parts], kind)
    share = tl.zeros([ROWS, HEAD_TILE], kind)
    offsets = tl.zeros([ROWS, HEAD_TILE], kind if multiplier is not None else tl.float32)
    if V2:
        weights, target = v2_inputs(att, x_dst, row, exists, word, F, W, BITS)
    else:
        target = load_heads(alpha_dst, row, exists, head, HEADS)
    highest = load_heads(peak, row, exists, head, HEADS)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(col + begin + (k + u), mask=ok, other=0)
            tile = gather_words(words, source, ok, word, W)
            if V2:
                e = v2_logits(
                    isolate(tile, BITS, ROWS, WORDS), weights, target, scale, offset, multiplier, source, ok, word,
                    head, slope, magic, F, W, BITS, ROWS, WORDS, HEADS, HEAD_TILE, ALIGNED, SCALE, OFFSET,
                )  # fmt: skip
            else:
                e = gat_logits(alpha_src, target, alpha_edge, source, begin + (k + u), ok, head, slope, HEADS)
            factor = numerator(e - highest, ok[:, None] & (head < HEADS), thresholds, TOP).to(kind)
            share += factor
            if multiplier is not None:
                factor = factor * tl.load(multiplier + source, mask=ok, other=0).to(tl.int32).to(kind)[:, None]
                offsets += factor
            elif OFFSET >= ROW:
                offsets += factor * _load_source_heads(offset, OFFSET, source, ok, head, HEADS)
            if SCALE >= ROW:
                factor = factor * _load_source_heads(scale, SCALE, source, ok, head, HEADS)
            factor = spread_heads(factor, word, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
            if PAIRED:
                if factor.shape[1] > 1:  # both halves of a word
                    factor = tl.broadcast_to(factor[:, :, None, :], [ROWS, WORDS, 2, parts])
                    factor = tl.reshape(factor, [ROWS, 2 * WORDS, parts])
                total += factor * sums_by_part(spread(tile, BITS, 16), BITS, ROWS, WORDS)
            else:
                fields = isolate(tile, BITS, ROWS, WORDS)
                if SHIFTED:
                    fields = fields >> field_shift(BITS).to(tl.uint32)
                factor = per_code(factor, BITS, ROWS, WORDS)
                if INTEGER:
                    total += factor * fields
                else:
                    total = tl.fma(factor, field_floats(fields, magic), total)
    return total, share, offsets


@triton.jit
def part_of_sums(  # type: ignore[no-untyped-def]
    total, part: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    INTEGER: tl.constexpr, PAIRED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One part of the weighted sums as a part tile of int32 or float32."""
    if PAIRED:
        tile = part_sums(total, part, BITS, ROWS, WORDS)
    else:
        fields, shift = isolated_part(total, part, BITS, ROWS, WORDS)
        if SHIFTED:
            tile = fields.to(tl.int32)
        elif INTEGER:
            tile = (fields >> shift.to(tl.uint32)).to(tl.int32)
        else:
            tile = fields * power_of_two(-shift)  # exact
    return tile
