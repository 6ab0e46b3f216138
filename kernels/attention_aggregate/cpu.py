"""``attention_aggregate`` on the CPU: a row's logits are computed for some edges at a time.

The first pass over a row's edges finds the largest logit of each head, the second turns logits into
numerators and adds up the packed messages that they weight.  A row of at most ``EDGE_BLOCK`` edges
keeps its logits in between; a longer one computes them again.
"""
# mypy: ignore-errors

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER, attention_thresholds, is_per_row
from ..cpu import jit
from ..cpu.bytedot import permutes
from ..cpu.epilogue import GROUP, code_pitch, epilogue, finish_rows, flat, opened
from ..cpu.parallel import row_chunks, run_chunks
from ..cpu.simd import atomic_add, keep, peek, poke, raw, vlanes
from ..cpu.weighted import EDGE_BLOCK, LANES, add_edges, head_table, scale_heads, spread_sums
from ..layout import parts_per_byte, top_code
from . import FLOAT_BITS
from .cpu_sums import FEW, HEADS, gat_kernel, head_groups, numerator_levels, tile_lanes

__all__ = ["BLOCK_FLOATS", "are_bytes", "attention_aggregate", "thresholds_of"]

BLOCK_FLOATS = 1 << 12
EXACT = 1 << 24  # integers below are exact in float32


@jit.kernel
def gat_logits(
    col, begin, end, row, heads, slope, alpha_src, alpha_dst, alpha_edge, has_edge, logits
):  # fmt: skip
    """``LeakyReLU(alpha_src[j] + alpha_dst[i] + alpha_edge[e])`` for some edges of a row.

    Arrays are :func:`..cpu.simd.raw`, here and below.
    """
    for e in range(begin, end):
        source, at = np.int64(peek(col, e)) * heads, (e - begin) * heads
        for h in range(heads):
            z = peek(alpha_src, source + h) + peek(alpha_dst, row * heads + h)
            if has_edge:
                z += peek(alpha_edge, e * heads + h)
            poke(logits, at + h, z if z > 0 else z * slope)


@jit.kernel(reassociate=True)
def _head_dot(x, target, at, att, begin, end, slope):
    total = np.float32(0)
    for f in range(begin, end):
        z = peek(x, f) + peek(target, at + f)
        total += peek(att, f) * (z if z > 0 else z * slope)
    return total


@jit.kernel
def gatv2_logits(
    codes, width, bits, features, col, begin, end, row, heads, slope, scale, offset, row_scale,
    row_offset, per_row, multiplied, att, x_dst, x, logits,
):  # fmt: skip
    """``<att, LeakyReLU(x^_j + x_dst[i])>`` for some edges of a row; ``codes`` are packed bytes."""
    mask = (1 << bits) - 1
    for e in range(begin, end):
        source = np.int64(peek(col, e))
        for part in range(8 // bits):
            first = part * width
            for k in range(min(width, features - first)):
                poke(x, first + k, (peek(codes, source * width + k) >> (bits * part)) & mask)
        for h in range(heads):
            begin_f, end_f = h * features // heads, (h + 1) * features // heads
            if multiplied:
                m = peek(row_scale, source * heads + h)
                for f in range(begin_f, end_f):
                    poke(x, f, peek(x, f) * (peek(scale, f) * m) + peek(offset, f) * m)
            elif per_row:
                step, low = peek(row_scale, source * heads + h), peek(row_offset, source * heads + h)
                for f in range(begin_f, end_f):
                    poke(x, f, peek(x, f) * step + low)
            else:
                for f in range(begin_f, end_f):
                    poke(x, f, peek(x, f) * peek(scale, f) + peek(offset, f))
            dot = _head_dot(x, x_dst, row * features, att, begin_f, end_f, slope)
            poke(logits, (e - begin) * heads + h, dot)


@jit.kernel
def numerators(logits, count, heads, peak, thresholds, top, values):
    """Quantized softmax numerators of ``count`` edges: how many of ``top`` thresholds a logit reaches.

    Few thresholds are counted one by one over all logits, in vectors; of many, bisection finds the
    last, without a branch: which half holds a logit cannot be foreseen.  ``top = 0`` stands for
    float numerators.  Uses ``logits`` up.
    """
    for q in range(count):
        for h in range(heads):
            poke(logits, q * heads + h, peek(logits, q * heads + h) - peek(peak, h))
            poke(values, q * heads + h, 0)
    if 0 < top <= FEW:
        for q in range(top):
            threshold = peek(thresholds, q)
            for k in range(count * heads):
                poke(values, k, peek(values, k) + np.float32(peek(logits, k) >= threshold))
        return
    for k in range(count * heads):
        below = peek(logits, k)
        if top == 0:
            poke(values, k, math.exp(below))
        else:
            code, step = 0, (top + 1) // 2
            while step:
                code += step * np.int64(below >= peek(thresholds, code + step - 1))
                step //= 2
            poke(values, k, code)


@jit.kernel
def add_numerators(values, col, begin, end, heads, row_scale, row_offset, per_row, share, total):
    """Add numerators to the sums of their heads, and turn them into weights of codes."""
    for e in range(begin, end):
        for h in range(heads):
            at = (e - begin) * heads + h
            value = peek(values, at)
            poke(share, h, peek(share, h) + value)
            if per_row:
                source = np.int64(peek(col, e)) * heads + h
                poke(total, h, peek(total, h) + value * peek(row_offset, source))
                poke(values, at, value * peek(row_scale, source))


@jit.kernel
def raise_peak(logits, count, heads, peak):
    for q in range(count):
        for h in range(heads):
            poke(peak, h, max(peek(peak, h), peek(logits, q * heads + h)))


@jit.kernel
def mean_heads(acc, at, heads, width):
    """Average the heads of a row into its first ``width`` features."""
    for f in range(width):
        total = peek(acc, at + f)
        for h in range(1, heads):
            total += peek(acc, at + h * width + f)
        poke(acc, at + f, total / np.float32(heads))


@cache
def _kernel(bits: int):
    parts = parts_per_byte(bits)
    codes = parts * 4 * LANES

    @jit.kernel
    def kernel(
        words, stride, rowptr, col, features, heads, table, lanewise, slope, gat, gatv2, thresholds,
        ranges, multiplied, edge_block, concat, sums, closed, block, code_row, bounds, counter,
    ):  # fmt: skip
        spec = opened(closed)
        pitch, width = 4 * stride * parts, features // heads
        acc_owner = np.empty(block * pitch + GROUP, np.float32)
        # ``sums`` only carries the type: threads have their own.  One block of edges adds up exactly in float32.
        sums_owner = np.empty((stride + LANES - 1) // LANES * codes, sums.dtype)
        block_owner = np.empty(sums_owner.size, np.float32)
        logits_owner = np.empty(EDGE_BLOCK * heads, np.float32)
        values_owner = np.empty(EDGE_BLOCK * heads, np.float32)
        row_owner = np.empty(features, np.float32)
        peak_owner, total_owner = np.empty(heads, np.float32), np.empty(heads, np.float64)
        factor_owner = np.empty(heads, np.float32)
        share_owner, inverse_owner = np.empty(heads, np.float64), np.empty(heads, np.float32)
        unpacked_owner = np.empty(code_row, np.uint8)
        nothing_owner = np.zeros(block, np.float32)
        acc, logits, values, row = raw(acc_owner), raw(logits_owner), raw(values_owner), raw(row_owner)
        long_sums, short_sums = raw(sums_owner), raw(block_owner)
        peak, total, share, factor = raw(peak_owner), raw(total_owner), raw(share_owner), raw(factor_owner)
        inverse, unpacked, nothing = raw(inverse_owner), raw(unpacked_owner), raw(nothing_owner)
        alpha_src, alpha_dst, alpha_edge = raw(gat[0]), raw(gat[1]), raw(gat[2])
        att, x_dst, levels = raw(gatv2[0]), raw(gatv2[1]), raw(thresholds)
        scale, offset, row_scale, row_offset = raw(ranges[0]), raw(ranges[1]), raw(ranges[2]), raw(ranges[3])
        has_edge, v2, per_row = gat[2].size > 0, gatv2[0].size > 0, ranges[2].size > 0
        none, top = vlanes("u8", codes), thresholds.size
        bytes_owner = words.view(np.uint8)
        source, packed, edges, final = raw(words), raw(bytes_owner), raw(col), col.size - 1
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            for first in range(bounds[chunk], bounds[chunk + 1], block):
                count = min(block, bounds[chunk + 1] - first)
                for r in range(count):
                    i = first + r
                    begin, end = rowptr[i], rowptr[i + 1]
                    if begin == end:
                        acc_owner[r * pitch : r * pitch + features] = 0
                        continue
                    peak_owner[:] = -np.inf
                    share_owner[:] = 0
                    total_owner[:] = 0
                    blocks = (end - begin + edge_block - 1) // edge_block
                    if blocks == 1:
                        block_owner[:] = 0
                    else:
                        sums_owner[:] = 0
                    for step in range(2 * blocks):  # first all peaks, then all sums
                        low = begin + step % blocks * edge_block
                        high = min(low + edge_block, end)
                        if step < blocks or blocks > 1:
                            if v2:
                                gatv2_logits(
                                    packed, 4 * stride, bits, features, edges, low, high, i, heads,
                                    slope, scale, offset, row_scale, row_offset, per_row, multiplied, att,
                                    x_dst, row, logits,
                                )  # fmt: skip
                            else:
                                gat_logits(
                                    edges, low, high, i, heads, slope, alpha_src, alpha_dst,
                                    alpha_edge, has_edge, logits,
                                )  # fmt: skip
                        if step < blocks:
                            raise_peak(logits, high - low, heads, peak)
                            continue
                        numerators(logits, high - low, heads, peak, levels, top, values)
                        add_numerators(
                            values, edges, low, high, heads, row_scale, row_offset, per_row, share, total
                        )  # fmt: skip
                        if blocks == 1:
                            add_edges(
                                source, stride, edges, final, low, high, values, heads, table,
                                lanewise, none, codes, short_sums,
                            )  # fmt: skip
                        else:
                            add_edges(
                                source, stride, edges, final, low, high, values, heads, table,
                                lanewise, none, codes, long_sums,
                            )  # fmt: skip
                    if blocks == 1:
                        spread_sums(short_sums, stride, none, codes, parts, acc, r * pitch)
                    else:
                        spread_sums(long_sums, stride, none, codes, parts, acc, r * pitch)
                    for h in range(heads):
                        inverse_owner[h] = np.float32(1.0) / np.float32(share_owner[h])
                        factor_owner[h] = np.float32(total_owner[h]) * inverse_owner[h] if per_row else np.float32(1.0)
                    scale_heads(acc, r * pitch, heads, width, scale, offset, factor, inverse)
                    if not concat:
                        mean_heads(acc, r * pitch, heads, width)
                finish_rows(acc, 0, pitch, nothing, first, count, spec, unpacked)
        keep(acc_owner)
        keep(sums_owner)
        keep(block_owner)
        keep(logits_owner)
        keep(values_owner)
        keep(row_owner)
        keep(peak_owner)
        keep(total_owner)
        keep(factor_owner)
        keep(share_owner)
        keep(inverse_owner)
        keep(unpacked_owner)
        keep(nothing_owner)
        keep(bytes_owner)

    return kernel


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
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    width = num_features if concat else num_features // heads
    out, closed, _held = epilogue(
        rowptr.numel() - 1,
        width,
        bias=bias,
        relu=relu,
        out_scale=out_scale,
        out_offset=out_offset,
        out_bits=out_bits,
        out_unit=out_unit,
    )
    if rowptr.numel() == 1 or width == 0:
        return out
    pointers = flat(rowptr)
    per_row = is_per_row(scale) or is_per_row(offset)
    quantized = attention_bits != FLOAT_BITS
    thresholds = thresholds_of(attention_bits) if quantized else flat(None)
    edge_block = EDGE_BLOCK
    if multiplier is not None and quantized:
        edge_block = min(EDGE_BLOCK, EXACT // (LARGEST_MULTIPLIER * top_code(attention_bits) * top_code(bits)))
    if not per_row and are_bytes(bits, attention_bits, heads):
        top, multiplied = top_code(attention_bits), multiplier is not None
        lanes = tile_lanes(words.size(1), bits, top, multiplied)
        table, lanewise = head_groups(num_features, bits, heads, lanes)
        if lanewise is None or permutes():
            pairs = att is not None
            kernel = gat_kernel(bits, heads, lanes, int(words.size(1) % lanes == 0), top, multiplied, pairs)
            terms = (flat(att), flat(x_dst)) if pairs else (flat(alpha_src), flat(alpha_dst))
            run_chunks(
                kernel, row_chunks(pointers), flat(words), words.size(1), pointers, flat(col), num_features, table,
                lanewise, np.float32(negative_slope), (*terms, flat(alpha_edge)),
                np.empty(0, np.uint8) if multiplier is None else flat(multiplier), numerator_levels(attention_bits),
                *_per_feature(scale, offset, num_features), concat, closed, max(1, BLOCK_FLOATS // num_features),
                code_pitch(width, out_bits),
            )  # fmt: skip
            return out
    ranges = _ranges(scale, offset, words.size(0), num_features, heads, multiplier)
    sums = np.empty(0, np.int64 if quantized and not per_row else np.float32)
    run_chunks(
        _kernel(bits), row_chunks(pointers), flat(words), words.size(1), pointers, flat(col),
        num_features, heads, *head_table(num_features, bits, heads), np.float32(negative_slope),
        (flat(alpha_src), flat(alpha_dst), flat(alpha_edge)), (flat(att), flat(x_dst)), thresholds,
        ranges, multiplier is not None, edge_block, concat, sums, closed, max(1, BLOCK_FLOATS // num_features),
        code_pitch(width, out_bits),
    )  # fmt: skip
    return out


def are_bytes(bits: int, attention_bits: int, heads: int) -> bool:
    """Whether codes and digits of weights fit the operands of byte dot products, and heads fill vectors."""
    return bits in (2, 4, 8) and attention_bits in (2, 4, 8) and heads in HEADS


@cache
def thresholds_of(attention_bits: int) -> np.ndarray:
    """:func:`..arithmetic.attention_thresholds` as an array."""
    return flat(attention_thresholds(attention_bits))


def _per_feature(scale: Tensor, offset: Tensor, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    return flat(scale.reshape(-1).expand(num_features)), flat(offset.reshape(-1).expand(num_features))


def _ranges(
    scale: Tensor, offset: Tensor, num_src: int, num_features: int, heads: int, multiplier: Tensor | None
) -> tuple[np.ndarray, ...]:
    """Range per feature and per source row and head, one of them trivial.

    With row multipliers both are there.
    """
    if is_per_row(scale) or is_per_row(offset):
        ones = flat(torch.ones(num_features, dtype=torch.float32))
        per_row = flat(scale.expand(num_src, heads)), flat(offset.expand(num_src, heads))
        return ones, ones, *per_row
    spread = _per_feature(scale, offset, num_features)
    if multiplier is not None:
        factor = flat(multiplier.to(torch.float32).unsqueeze(1).expand(num_src, heads))
        return *spread, factor, factor
    return *spread, flat(None), flat(None)
