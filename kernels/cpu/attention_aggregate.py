"""``attention_aggregate`` on the CPU: a row's logits are computed for some edges at a time.

The first pass over a row's edges finds the largest logit of each head, the second turns logits into
numerators and adds up the packed messages that they weight.  A row of at most ``EDGE_BLOCK`` edges
keeps its logits in between; a longer one computes them again.
"""
# mypy: ignore-errors

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..arithmetic import attention_thresholds, is_per_row
from ..attention_aggregate import FLOAT_BITS
from ..layout import parts_per_byte
from . import jit
from .epilogue import GROUP, code_pitch, epilogue, finish_rows, flat
from .parallel import row_chunks, run_chunks
from .simd import atomic_add, keep, raw, vlanes
from .weighted import EDGE_BLOCK, LANES, add_edges, head_table, scale_heads, spread_sums

__all__ = ["attention_aggregate"]

BLOCK_FLOATS = 1 << 12


@jit.kernel
def gat_logits(col, begin, end, row, heads, slope, alpha_src, alpha_dst, alpha_edge, logits):
    """``LeakyReLU(alpha_src[j] + alpha_dst[i] + alpha_edge[e])`` for some edges of a row."""
    for e in range(begin, end):
        source, at = np.int64(col[e]) * heads, (e - begin) * heads
        for h in range(heads):
            z = alpha_src[source + h] + alpha_dst[row * heads + h]
            if alpha_edge.size:
                z += alpha_edge[e * heads + h]
            logits[at + h] = z if z > 0 else z * slope


@jit.kernel(reassociate=True)
def _head_dot(x, target, at, att, begin, end, slope):
    total = np.float32(0)
    for f in range(begin, end):
        z = x[f] + target[at + f]
        total += att[f] * (z if z > 0 else z * slope)
    return total


@jit.kernel
def gatv2_logits(
    codes, width, bits, col, begin, end, row, heads, slope, ranges, att, x_dst, x, logits
):  # fmt: skip
    """``<att, LeakyReLU(x^_j + x_dst[i])>`` for some edges of a row; ``codes`` are packed bytes."""
    scale, offset, row_scale, row_offset = ranges
    features, mask = att.size, (1 << bits) - 1
    for e in range(begin, end):
        source = np.int64(col[e])
        for part in range(8 // bits):
            first = part * width
            for k in range(min(width, features - first)):
                x[first + k] = (codes[source * width + k] >> (bits * part)) & mask
        for h in range(heads):
            begin_f, end_f = h * features // heads, (h + 1) * features // heads
            if row_scale.size:
                step, low = row_scale[source * heads + h], row_offset[source * heads + h]
                for f in range(begin_f, end_f):
                    x[f] = x[f] * step + low
            else:
                for f in range(begin_f, end_f):
                    x[f] = x[f] * scale[f] + offset[f]
            logits[(e - begin) * heads + h] = _head_dot(x, x_dst, row * features, att, begin_f, end_f, slope)


@jit.kernel
def numerators(logits, col, begin, end, heads, peak, thresholds, ranges, share, total):
    """Turn logits into weights of codes; adds to the heads' sums of numerators and offsets."""
    _, _, row_scale, row_offset = ranges
    for e in range(begin, end):
        for h in range(heads):
            at = (e - begin) * heads + h
            below = logits[at] - peak[h]
            if thresholds.size:
                code, step = 0, (thresholds.size + 1) // 2
                while step:
                    if below >= thresholds[code + step - 1]:
                        code += step
                    step //= 2
                value = np.float32(code)
            else:
                value = np.float32(math.exp(below))
            share[h] += value
            if row_scale.size:
                source = np.int64(col[e]) * heads + h
                total[h] += value * row_offset[source]
                value *= row_scale[source]
            logits[at] = value


@jit.kernel
def raise_peak(logits, count, heads, peak):
    for q in range(count):
        for h in range(heads):
            peak[h] = max(peak[h], logits[q * heads + h])


@jit.kernel
def mean_heads(acc, at, heads, width):
    """Average the heads of a row into its first ``width`` features."""
    for f in range(width):
        for h in range(1, heads):
            acc[at + f] += acc[at + h * width + f]
        acc[at + f] /= np.float32(heads)


@cache
def _kernel(bits: int):
    parts = parts_per_byte(bits)
    codes = parts * 4 * LANES

    @jit.kernel
    def kernel(
        words, stride, rowptr, col, features, heads, table, lanewise, slope, gat, gatv2, thresholds,
        ranges, concat, sums, spec, block, code_row, bounds, counter,
    ):  # fmt: skip
        pitch, width = 4 * stride * parts, features // heads
        acc = np.empty(block * pitch + GROUP, np.float32)
        # ``sums`` only carries the type: threads have their own.
        sums = np.empty((stride + LANES - 1) // LANES * codes, sums.dtype)
        logits, x = np.empty(EDGE_BLOCK * heads, np.float32), np.empty(features, np.float32)
        peak, total = np.empty(heads, np.float32), np.empty(heads, np.float32)
        share, divisor = np.empty(heads, np.float64), np.empty(heads, np.float32)
        unpacked = np.zeros(block * code_row, np.uint8)
        nothing = np.zeros(block, np.float32)
        none = vlanes("u8", codes)
        packed = words.view(np.uint8)
        source, edges = raw(words), raw(col)
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
                        acc[r * pitch : r * pitch + features] = 0
                        continue
                    sums[:] = 0
                    peak[:] = -np.inf
                    share[:] = 0
                    total[:] = 0
                    blocks = (end - begin + EDGE_BLOCK - 1) // EDGE_BLOCK
                    for step in range(2 * blocks):  # first all peaks, then all sums
                        low = begin + step % blocks * EDGE_BLOCK
                        high = min(low + EDGE_BLOCK, end)
                        if step < blocks or blocks > 1:
                            if gatv2[0].size:
                                gatv2_logits(
                                    packed, 4 * stride, bits, col, low, high, i, heads, slope,
                                    ranges, gatv2[0], gatv2[1], x, logits,
                                )  # fmt: skip
                            else:
                                gat_logits(col, low, high, i, heads, slope, gat[0], gat[1], gat[2], logits)
                        if step < blocks:
                            raise_peak(logits, high - low, heads, peak)
                            continue
                        numerators(logits, col, low, high, heads, peak, thresholds, ranges, share, total)
                        add_edges(
                            source, stride, edges, col.size - 1, low, high, raw(logits), heads,
                            table, lanewise, none, codes, sums,
                        )  # fmt: skip
                    spread_sums(sums, stride, none, codes, parts, acc, r * pitch)
                    for h in range(heads):
                        divisor[h] = share[h]
                        total[h] = total[h] / divisor[h] if ranges[2].size else np.float32(1.0)
                    scale_heads(acc, r * pitch, heads, width, ranges[0], ranges[1], total, divisor)
                    if not concat:
                        mean_heads(acc, r * pitch, heads, width)
                finish_rows(raw(acc), 0, pitch, raw(nothing), first, count, spec, raw(unpacked))
        keep(logits)
        keep(acc)
        keep(nothing)
        keep(unpacked)

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
    schedule: Tensor | None = None,
) -> Tensor:
    width = num_features if concat else num_features // heads
    out, spec = epilogue(
        rowptr.numel() - 1,
        width,
        bias=bias,
        relu=relu,
        out_scale=out_scale,
        out_offset=out_offset,
        out_bits=out_bits,
    )
    if out.numel() == 0:
        return out
    pointers = flat(rowptr)
    ranges, exact = _ranges(scale, offset, words.size(0), num_features, heads)
    quantized = attention_bits != FLOAT_BITS
    thresholds = flat(attention_thresholds(attention_bits) if quantized else None)
    sums = np.empty(0, np.int64 if quantized and exact else np.float32)
    run_chunks(
        _kernel(bits), row_chunks(pointers), flat(words), words.size(1), pointers, flat(col),
        num_features, heads, *head_table(num_features, bits, heads), np.float32(negative_slope),
        (flat(alpha_src), flat(alpha_dst), flat(alpha_edge)), (flat(att), flat(x_dst)), thresholds,
        ranges, concat, sums, spec, max(1, BLOCK_FLOATS // num_features),
        code_pitch(width, out_bits),
    )  # fmt: skip
    return out


def _ranges(
    scale: Tensor, offset: Tensor, num_src: int, num_features: int, heads: int
) -> tuple[tuple[np.ndarray, ...], bool]:
    """Range per feature and per source row and head, one of them trivial; whether it is the former."""
    if is_per_row(scale) or is_per_row(offset):
        ones = flat(torch.ones(num_features))
        per_row = flat(scale.expand(num_src, heads)), flat(offset.expand(num_src, heads))
        return (ones, ones, *per_row), False
    spread = (flat(value.reshape(-1).expand(num_features)) for value in (scale, offset))
    return (*spread, flat(None), flat(None)), True
