"""Attention over rows with quantized numerators: weights in digits of a byte, and byte dot products.

A row's logits are computed for some edges at a time, several edges and all heads in one vector.  Their quantized
numerators ``k``, times the multipliers ``m`` of the sources, are integers: at most ``15 * 15`` of up to four bits, and
so unsigned bytes; at most ``255 * 15`` of eight bits, and so two digits of six bits.  Four edges at a time meet in byte
dot products (:mod:`..cpu.bytedot`).  All sums are integers: those of :mod:`.cpu` for GAT, bit for bit.
"""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit

from ..arithmetic import LARGEST_MULTIPLIER, attention_thresholds
from ..cpu import jit
from ..cpu.bytedot import ROWS, vadd_heads, vmix, vquads, vunmix_heads
from ..cpu.codesum import AHEAD, prefetch_rows
from ..cpu.epilogue import GROUP, finish_rows, opened
from ..cpu.multiplied import multiplied_lanes
from ..cpu.simd import (
    atomic_add,
    keep,
    peek,
    prefetch,
    raw,
    raw_aligned,
    vcast,
    vclimb,
    vfirst,
    vfold_max,
    vfold_sum,
    vgather,
    vlanes,
    vlive,
    vload,
    vload_first,
    vmax,
    vmin,
    vpositive,
    vreach,
    vsplat,
    vstore,
    vstore_first,
    vstore_parts,
    vtile,
)
from ..layout import parts_per_byte, row_bytes
from .cpu_pairs import LANES, SUMS, copy_row, pair_logits

__all__ = ["FEW", "HEADS", "gat_kernel", "head_groups", "numerator_levels", "tile_lanes"]

HEADS = (1, 2, 4, 8, 16)  # numbers of heads that fill vectors
EDGE_BLOCK = 256  # edges whose logits are held at a time
FEW = 15  # thresholds that are counted one by one
FINENESS = 256  # intervals of logits in which many thresholds are looked up, per unit; a power of two
DIGIT = 6  # bits of a digit: a signed byte beside codes of eight bits, and two of their products in sixteen bits
PAD = 64  # lanes by which buffers are longer than their contents


@cache
def head_groups(num_features: int, bits: int, heads: int, lanes: int) -> tuple[np.ndarray, int | None]:
    """The table of :func:`..cpu.bytedot.vadd_heads` over all tiles of ``lanes`` words, and its ``lanewise``."""
    width, parts = row_bytes(num_features, bits), parts_per_byte(bits)
    tiles = -(-width // (4 * lanes))
    byte = torch.arange(tiles * 4 * lanes).view(tiles, 1, 4 * lanes)
    feature = torch.arange(parts).view(1, parts, 1) * width + byte
    unused = (feature >= num_features) | (byte >= width)
    head = (feature // (num_features // heads)).masked_fill(unused, -1)
    groups = head.view(tiles, parts, -1, min(4 * lanes, 64))
    largest = groups.amax(-1)
    if bool(((groups < 0) | (groups == largest.unsqueeze(-1))).all()):
        return largest.clamp(min=0).reshape(-1).to(torch.int32).numpy(), None
    places = torch.arange(4 * lanes)  # of bytes: 16 k + 4 q + i is in lane lanes * q + 4 k + i
    order = torch.empty_like(places)
    order[places % 16 // 4 * lanes + places // 16 * 4 + places % 4] = places
    return head.clamp(min=0)[..., order].reshape(-1).to(torch.int32).numpy(), 0


@njit(forceinline=True)
def _gather(
    col, low, high, final, heads, alpha_src, multiplier, multiplied, one, logits, factors, pairs, exact, parts, pair
):  # fmt: skip
    """Terms and multipliers of the sources of some edges, a vector of the heads for each edge; of ``pairs`` all."""
    if pairs:
        pair_logits(col, low, high, final, heads, multiplier, multiplied, one, logits, factors, exact, parts, pair)
        return
    for e in range(low, high):
        prefetch(alpha_src, np.int64(peek(col, min(e + AHEAD, final))) * heads)
        source = np.int64(peek(col, e))
        vstore(logits, (e - low) * heads, vload(alpha_src, source * heads, one))
        if multiplied:
            vstore(factors, (e - low) * heads, vsplat(np.int32(peek(multiplier, source)), one))


@njit(forceinline=True)
def _logit(logits, k, count, target, slope, alpha_edge, at, has_edge):
    z = vload(logits, k, target) + target
    if has_edge:
        z = z + vload_first(alpha_edge, at + k, target, count - k)
    z = vpositive(z, z, z * slope)
    vstore(logits, k, z)
    return z


@njit(forceinline=True)
def _peaks(logits, count, wide, target, slope, alpha_edge, at, has_edge, peak):
    """Turn the sources' terms of ``count`` edges and heads into logits, and the largest of them with ``peak``."""
    whole = count - count % wide
    for k in range(0, whole, wide):
        peak = vmax(_logit(logits, k, count, target, slope, alpha_edge, at, has_edge), peak)
    if whole < count:
        z = _logit(logits, whole, count, target, slope, alpha_edge, at, has_edge)
        peak = vmax(vfirst(z, count - whole, peak), peak)
    return peak


def weight_digits(bits: int, top: int, multiplied: bool) -> int:
    """How many digits the weights of codes of ``bits`` bits have: one where a byte of the dot product holds them."""
    largest = top * (LARGEST_MULTIPLIER if multiplied else 1)
    return 1 if largest <= (127 if bits == 8 else 255) else 2


def tile_lanes(stride: int, bits: int, top: int, multiplied: bool) -> int:
    """Words of a tile of rows of ``stride`` words, whose sums of every digit stay in registers."""
    return max(4, multiplied_lanes(stride, bits) // weight_digits(bits, top, multiplied))


@cache
def numerator_levels(attention_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rising thresholds of numerators; where they are many, also what :func:`_numerators` starts from.

    Logits from the lowest threshold to 0 fall into intervals, :data:`FINENESS` of which are one long: the second array
    has for each how many thresholds lie in the intervals below it.  No interval has two.
    """
    levels = attention_thresholds(attention_bits).numpy()
    if levels.size <= FEW:
        return levels, np.empty(0, np.int32)
    interval = ((levels - levels[0]) * np.float32(FINENESS)).astype(np.int32)
    last = int(-levels[0] * np.float32(FINENESS))
    if np.unique(interval).size < levels.size:
        raise ValueError(f"Expected thresholds of {attention_bits} bits at least {1 / FINENESS} apart")
    below = np.searchsorted(interval, np.arange(last + 1, dtype=np.int32)).astype(np.int32)
    return np.append(levels, np.float32(np.inf)), below


@njit(forceinline=True)
def _numerators(v, thresholds, below, top, zero):
    """How many of ``top`` rising thresholds each logit reaches: counted if they are few, else looked up."""
    value = zero
    if top <= FEW:
        for q in range(top):
            value = vreach(value, v, peek(thresholds, q))
        return value
    lowest = vsplat(peek(thresholds, 0), v)
    inside = vmin(vmax(v, lowest), vsplat(np.float32(0), v))
    interval = vcast((inside - lowest) * vsplat(np.float32(FINENESS), v), "i32")
    value = vgather(below, interval)
    return vclimb(value, v, vgather(thresholds, value), np.int32(1))


@njit(forceinline=True)
def _weigh(
    logits, count, wide, peak, thresholds, below, top, factors, multiplied, zero, one, weights, digits, second
):  # fmt: skip
    """Weights of ``count`` edges and heads, by fours of edges; sums of numerators and of weights by head.

    Where they have two ``digits``, the upper one is ``second`` bytes further on.
    """
    share = mass = zero
    for k in range(0, count, wide):
        v = vload(logits, k, peak) - peak
        value = vfirst(_numerators(v, thresholds, below, top, zero), count - k, zero)
        share = share + value
        if multiplied:
            value = value * vload(factors, k, zero)
            mass = mass + value
        if digits > 1:
            vstore(weights, second + k, vquads(vcast(value >> DIGIT, "u8"), one))
            value = value & vsplat(np.int32((1 << DIGIT) - 1), zero)
        vstore(weights, k, vquads(vcast(value, "u8"), one))
    return vcast(vfold_sum(share, one), "i64"), vcast(vfold_sum(mass, one), "i64")


@njit(forceinline=True)
def _tile_sum(
    words, stride, tile, lanes, live, col, final, low, high, weights, heads, table, start, lanewise, zero, none, digits,
    second,
):  # fmt: skip
    """Weighted codes of one tile summed over some edges, int32 in the order of the tile's codes."""
    acc, upper, base, last = none, none, 0, high - 1
    for e in range(low, high, ROWS):
        prefetch_rows(words, stride, tile, lanes, col, final, e, ROWS)
        mixed = vmix(
            vload_first(words, peek(col, e) * stride + tile, zero, live),
            vload_first(words, peek(col, min(e + 1, last)) * stride + tile, zero, live),
            vload_first(words, peek(col, min(e + 2, last)) * stride + tile, zero, live),
            vload_first(words, peek(col, min(e + 3, last)) * stride + tile, zero, live),
        )
        acc = vadd_heads(acc, mixed, zero, weights, base, table, start, lanewise)
        if digits > 1:
            upper = vadd_heads(upper, mixed, zero, weights, second + base, table, start, lanewise)
        base += heads
    if digits > 1:
        return vunmix_heads(acc, zero) + (vunmix_heads(upper, zero) << DIGIT)
    return vunmix_heads(acc, zero)


@njit(forceinline=True)
def _scale_group(acc, at, f, left, scale, offset, times, plus):
    y = vload_first(acc, at + f, GROUP, left) * vload_first(scale, f, GROUP, left) * times
    vstore_first(acc, at + f, y + vload_first(offset, f, GROUP, left) * plus, left)


@njit(forceinline=True)
def _scale(acc, at, heads, width, scale, offset, factor, inverse):
    """``acc = (acc * scale) * inverse[head] + offset * factor[head]`` over a row's features."""
    for h in range(heads):
        times, plus = vsplat(peek(inverse, h), GROUP), vsplat(peek(factor, h), GROUP)
        stop = (h + 1) * width
        for f in range(h * width, stop - GROUP + 1, GROUP):
            _scale_group(acc, at, f, None, scale, offset, times, plus)
        if width % GROUP:
            _scale_group(acc, at, stop - width % GROUP, width % GROUP, scale, offset, times, plus)


@njit(forceinline=True)
def _mean(acc, at, heads, width):
    """Average the heads of a row into its first ``width`` features."""
    share = vsplat(np.float32(heads), GROUP)
    for f in range(0, width, GROUP):
        left = width - f
        total = vload_first(acc, at + f, GROUP, left)
        for h in range(1, heads):
            total = total + vload_first(acc, at + h * width + f, GROUP, left)
        vstore_first(acc, at + f, total / share, left)


@cache
def gat_kernel(bits: int, heads: int, lanes: int, exact: int, top: int, multiplied: bool, pairs: bool = False):
    """The kernel of GAT with ``top`` levels of numerators; ``exact`` is 1 where ``lanes`` divides a row's words.

    That of GATv2 with ``pairs``: in the place of ``alpha_src`` and ``alpha_dst`` it takes ``att`` and ``x_dst``.
    """
    parts = parts_per_byte(bits)
    codes = parts * 4 * lanes
    wide = max(16, ROWS * heads)
    entries = parts * 4 * lanes  # of the table by lane
    groups = parts * max(1, lanes // 16)  # and of the one by sixteen words
    digits = weight_digits(bits, top, multiplied)
    second = EDGE_BLOCK * heads  # bytes from a weight's lower digit to its upper one

    @jit.kernel
    def kernel(
        words, stride, rowptr, col, features, table, lanewise, slope, gat, multiplier, numerators, scale, offset,
        concat, closed, block, code_row, bounds, counter,
    ):  # fmt: skip
        spec = opened(closed)
        pitch, width = 4 * stride * parts, features // heads
        tiles = (stride + lanes - 1) // lanes
        acc_owner = np.empty(block * pitch + 4 * lanes + GROUP, np.float32)
        sums_owner = np.empty(tiles * codes, np.int64)
        logits_owner = np.empty(EDGE_BLOCK * heads + PAD + GROUP, np.float32)
        factors_owner = np.empty(EDGE_BLOCK * heads + PAD, np.int32)
        weights_owner = np.zeros(digits * second // 4 + PAD, np.int32)
        bytes_owner = weights_owner.view(np.uint8)
        inverse_owner, factor_owner = np.empty(heads, np.float32), np.empty(heads, np.float32)
        nothing_owner = np.zeros(block, np.float32)
        unpacked_owner = np.empty(code_row, np.uint8)
        acc, logits, factors = raw_aligned(raw(acc_owner)), raw_aligned(raw(logits_owner)), raw(factors_owner)
        sums, weights, weight_bytes = raw(sums_owner), raw(weights_owner), raw(bytes_owner)
        nothing, unpacked = raw(nothing_owner), raw(unpacked_owner)
        inverse, factor = raw(inverse_owner), raw(factor_owner)
        alpha_src, alpha_dst, alpha_edge, has_edge = raw(gat[0]), raw(gat[1]), raw(gat[2]), gat[2].size > 0
        source, edges, final, pointers, place = raw(words), raw(col), col.size - 1, raw(rowptr), raw(table)
        levels, below, sources = raw(numerators[0]), raw(numerators[1]), raw(multiplier)
        scales, offsets = raw(scale), raw(offset)
        rows_owner = np.zeros((4, pitch + 4 * lanes + 2 * GROUP), np.float32)
        target_row, att_row = raw_aligned(raw(rows_owner[0])), raw_aligned(raw(rows_owner[1]))
        scale_row, offset_row = raw_aligned(raw(rows_owner[2])), raw_aligned(raw(rows_owner[3]))
        products_owner = np.empty(SUMS // heads * pitch + 4 * lanes + GROUP, np.float32)
        partial_owner = np.empty(LANES + GROUP, np.float32)
        products, partial = raw_aligned(raw(products_owner)), raw_aligned(raw(partial_owner))
        zero, none = vlanes("i32", lanes), vlanes("i32", codes)
        one, flat = vlanes("f32", heads), vlanes("i32", wide)
        slopes, lowest = vsplat(np.float32(slope), flat), vsplat(np.float32(-np.inf), flat)
        pair = (
            source, stride, tiles, lanes, width, scale_row, offset_row, att_row, target_row, np.float32(slope), zero,
            vlanes("u8", codes), products, pitch, partial,
        )  # fmt: skip
        if pairs:
            slopes = vsplat(np.float32(1), flat)  # logits are whole, with the slope that they have
            copy_row(alpha_src, 0, features, att_row)
            copy_row(scales, 0, features, scale_row)
            copy_row(offsets, 0, features, offset_row)
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            for first in range(bounds[chunk], bounds[chunk + 1], block):
                count = min(block, bounds[chunk + 1] - first)
                for r in range(count):
                    begin, end = peek(pointers, first + r), peek(pointers, first + r + 1)
                    at = r * pitch
                    if begin == end:
                        for f in range(0, features, GROUP):
                            vstore_first(acc, at + f, vsplat(np.float32(0), GROUP), features - f)
                        continue
                    if pairs:
                        copy_row(alpha_dst, (first + r) * features, features, target_row)
                        target = vcast(flat, "f32")
                    else:
                        target = vtile(vload(alpha_dst, (first + r) * heads, one), flat)
                    peak = lowest
                    for low in range(begin, end, EDGE_BLOCK):
                        high = min(low + EDGE_BLOCK, end)
                        _gather(
                            edges, low, high, final, heads, alpha_src, sources, multiplied, one, logits, factors, pairs,
                            exact, parts, pair,
                        )  # fmt: skip
                        peak = _peaks(
                            logits, (high - low) * heads, wide, target, slopes, alpha_edge, low * heads, has_edge, peak
                        )
                    peak = vtile(vfold_max(peak, one), flat)
                    share = mass = vlanes("i64", heads)
                    single = end - begin <= EDGE_BLOCK
                    for low in range(begin, end, EDGE_BLOCK):
                        high = min(low + EDGE_BLOCK, end)
                        if not single:
                            _gather(
                                edges, low, high, final, heads, alpha_src, sources, multiplied, one, logits, factors,
                                pairs, exact, parts, pair,
                            )  # fmt: skip
                            _peaks(
                                logits, (high - low) * heads, wide, target, slopes, alpha_edge, low * heads, has_edge,
                                peak,
                            )  # fmt: skip
                        of_block = _weigh(
                            logits, (high - low) * heads, wide, peak, levels, below, top, factors, multiplied, flat,
                            one, weight_bytes, digits, second,
                        )  # fmt: skip
                        share, mass = share + of_block[0], mass + of_block[1]
                        for t in range(tiles):
                            tile = t * lanes
                            total = _tile_sum(
                                source, stride, tile, lanes, vlive(stride - tile, exact), edges, final, low, high,
                                weights, heads, place, t * (groups if lanewise is None else entries), lanewise, zero,
                                none, digits, second // 4,
                            )  # fmt: skip
                            live_bytes = vlive(4 * (stride - tile), exact)
                            if single:
                                vstore_parts(acc, at + 4 * tile, 4 * stride, vcast(total, "f32"), parts, live_bytes)
                                continue
                            longer = vcast(total, "i64")
                            if low > begin:
                                longer = longer + vload(sums, t * codes, total)
                            vstore(sums, t * codes, longer)
                            if high == end:
                                vstore_parts(acc, at + 4 * tile, 4 * stride, vcast(longer, "f32"), parts, live_bytes)
                    ones = vsplat(np.float32(1), one)
                    by_share = ones / vcast(share, "f32")
                    vstore(inverse, 0, by_share)
                    vstore(factor, 0, vcast(mass, "f32") * by_share if multiplied else ones)
                    _scale(acc, at, heads, width, scales, offsets, factor, inverse)
                    if not concat:
                        _mean(acc, at, heads, width)
                finish_rows(acc, 0, pitch, nothing, first, count, spec, unpacked)
        keep(acc_owner)
        keep(sums_owner)
        keep(logits_owner)
        keep(factors_owner)
        keep(weights_owner)
        keep(bytes_owner)
        keep(inverse_owner)
        keep(factor_owner)
        keep(nothing_owner)
        keep(unpacked_owner)
        keep(rows_owner)
        keep(products_owner)
        keep(partial_owner)

    return kernel
