"""Accumulated rows turned into results: the affine step and what follows, then float rows or packed rows.

A row is finished in the registers, its largest absolute value on the way; packed rows are quantized from a scratch row,
one behind, so that neither waits for the other.  Each operation is one float32 rounding, in the order of
:mod:`..arithmetic`; what an epilogue lacks is a factor of 1 or a term of 0.
"""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit

from ..arithmetic import LARGEST_MULTIPLIER
from . import jit
from .dots import dot_row
from .memory import ALIGNMENT
from .simd import (
    peek,
    poke,
    raw,
    raw_aligned,
    vabs,
    vcast,
    vload,
    vload_first,
    vmax,
    vmin,
    vsplat,
    vstore,
    vstore_first,
    vstream,
    vtop,
    vview,
)

__all__ = [
    "ALIGNMENT",
    "GROUP",
    "code_pitch",
    "dot_and_finish_rows",
    "finish_rows",
    "pack_row",
    "quantize_group",
    "row_multiplier",
]

GROUP = 16  # features per step

SCALE, OFFSET, TERM, BIAS, INVERSE, LOW = range(6)  # rows of ``columns``
# Bits of ``flags``:
HAS_DST, HAS_TERM, HAS_BIAS, ROW_RANGE, STREAM, HAS_ROW_SCALE, HAS_ADDEND, HAS_UNIT = 1, 2, 4, 8, 16, 32, 64, 128
RELU, MULTIPLIED = 256, 512

PLAIN, DENSE, ADDED = range(3)  # without what products have besides, with a term and a factor per row, with an addend
KEPT, PEAKED, WRITTEN, STREAMED = range(4)  # rows for packing, those with their peak, float rows, past the caches


@njit(forceinline=True)
def scratch_pitch(width, bits):
    """Floats of a scratch row: steps of ``GROUP`` bytes of packed rows read past the last feature."""
    words = (width * bits + 31) // 32
    return (4 * words * (8 // bits) + 2 * GROUP - 1) // GROUP * GROUP if bits else 0


@njit(forceinline=True)
def column_pitch(width, bits):
    """Entries of a row of columns, read by the same steps."""
    return max((width + GROUP - 1) // GROUP * GROUP, scratch_pitch(width, bits))


@cache
def code_pitch(width: int, bits: int) -> int:
    """Bytes of scratch that :func:`finish_rows` needs for packed rows: two rows, and what aligns them."""
    return 2 * 4 * scratch_pitch.py_func(width, bits) + ALIGNMENT if bits else 0


@njit(forceinline=True)
def quantize_group(y, low, inverse, top):
    """``clamp(floor((y - low) * inverse + 1/2), 0, top)`` of float lanes, NaN to 0, as int32 lanes.

    Clamped first: what is left is not negative, and converting it rounds down.
    """
    v = (y - low) * inverse + vsplat(np.float32(0.5), GROUP)
    return vcast(vmin(vmax(v, vsplat(np.float32(0.0), GROUP)), top), "i32")


@njit(forceinline=True)
def row_multiplier(peak, unit_inverse):
    """``clamp(ceil(peak / unit), 1, 15)``, and 1 for NaN."""
    v = peak * unit_inverse
    v = v if v > np.float32(1) else np.float32(1)
    v = v if v < np.float32(LARGEST_MULTIPLIER) else np.float32(LARGEST_MULTIPLIER)
    whole = np.int64(v)
    return whole + np.int64(np.float32(whole) < v)


@njit(forceinline=True)
def _value(acc, at, f, left, mass, factor, low_term, post, floor, columns, stretch, addend, more, kind):
    """Sixteen finished values of a row from feature ``f``, the first ``left`` of them (or all with None)."""
    y = vload_first(acc, at + f, GROUP, left)
    y = y * vload(columns, SCALE * stretch + f, GROUP) + mass * vload(columns, OFFSET * stretch + f, GROUP)
    y = y * factor
    if kind != PLAIN:
        y = y + vload(columns, TERM * stretch + f, GROUP) * low_term
    y = y + vload(columns, BIAS * stretch + f, GROUP)
    if kind == ADDED:
        y = y + vload_first(addend, more + f, GROUP, left)
    y = vmax(floor, y)
    return y * post if kind != PLAIN else y


@njit(forceinline=True)
def _row(acc, at, width, row, columns, stretch, addend, more, target, to, kind, use):
    """Finish one row into ``target[to]``; returns its largest absolute value in each lane if it is to be ``PEAKED``."""
    mass, factor, low_term, post, floor = row
    peak = vsplat(np.float32(0.0), GROUP)
    whole = width - width % GROUP
    for f in range(0, whole, GROUP):
        y = _value(
            acc, at, f, None, mass, factor, low_term, post, floor, columns, stretch, addend, more, kind
        )  # fmt: skip
        if use == STREAMED:
            vstream(target, to + f, y)
        else:
            vstore(target, to + f, y)
        if use == PEAKED:
            peak = vmax(vabs(y), peak)
    if whole < width:
        left = width - whole
        y = _value(
            acc, at, whole, left, mass, factor, low_term, post, floor, columns, stretch, addend, more, kind
        )  # fmt: skip
        vstore_first(target, to + whole, y, left)
        if use == PEAKED:
            peak = vmax(vabs(y), peak)
    return peak


@njit(forceinline=True)
def _row_for(acc, at, width, row, columns, stretch, addend, more, target, to, kind, use):
    if use == PEAKED:
        return _row(acc, at, width, row, columns, stretch, addend, more, target, to, kind, PEAKED)
    if use == KEPT:
        return _row(acc, at, width, row, columns, stretch, addend, more, target, to, kind, KEPT)
    if use == WRITTEN:
        return _row(acc, at, width, row, columns, stretch, addend, more, target, to, kind, WRITTEN)
    return _row(acc, at, width, row, columns, stretch, addend, more, target, to, kind, STREAMED)


@njit(forceinline=True)
def pack_row(values, at, out, start, words, inverse, low, table, inverses, lows, along, bits):
    """Quantize the row ``values[at]`` into the words ``out[start]``, sixteen bytes of them at a time.

    ``along`` is 1 where the range is one per column, at ``table[inverses]`` and ``table[lows]``.
    """
    top = vsplat(np.float32((1 << bits) - 1), GROUP)
    width = 4 * words
    for k in range(0, width, GROUP):
        word = vsplat(0, GROUP)
        for part in range(8 // bits):
            f = part * width + k
            if along:
                inverse, low = vload(table, inverses + f, GROUP), vload(table, lows + f, GROUP)
            word = word | (quantize_group(vload(values, at + f, GROUP), low, inverse, top) << (bits * part))
        packed = vview(vcast(word, "u8"), "i32")
        left = words - k // 4
        if left >= GROUP // 4:
            vstore(out, start + k // 4, packed)
        else:
            vstore_first(out, start + k // 4, packed, left)


@njit(forceinline=True)
def _pack_for(values, at, out, start, words, inverse, low, table, inverses, lows, along, bits):
    if bits == 2:
        pack_row(values, at, out, start, words, inverse, low, table, inverses, lows, along, 2)
    elif bits == 4:
        pack_row(values, at, out, start, words, inverse, low, table, inverses, lows, along, 4)
    elif bits == 8:
        pack_row(values, at, out, start, words, inverse, low, table, inverses, lows, along, 8)
    else:
        pack_row(values, at, out, start, words, inverse, low, table, inverses, lows, along, 1)


@jit.kernel
def finish_rows(acc, base, pitch, coefficient, first, count, spec, codes):
    """Turn accumulated rows into the result rows ``[first, first + count)``.

    Row ``r`` of ``acc`` (float32) starts at ``base + r * pitch``; ``coefficient`` has one value per
    row; ``codes`` has :func:`code_pitch` bytes.  The three are :func:`.simd.raw`.
    """
    _finish(acc, base, pitch, coefficient, first, count, spec, codes, None)


@jit.kernel
def dot_and_finish_rows(acc, base, pitch, coefficient, first, count, spec, codes, dots):
    """:func:`finish_rows` into packed rows, and the dot products of the floats that these are made from.

    ``dots`` are the vectors, their number, the number of heads, the results ``[vectors, rows, heads]`` and ``rows``.
    """
    _finish(acc, base, pitch, coefficient, first, count, spec, codes, dots)


@njit(forceinline=True)
def _finish(acc, base, pitch, coefficient, first, count, spec, codes, dots):
    width, bits, flags = spec.width, spec.bits, spec.flags
    columns, stretch = raw(spec.columns), spec.columns.shape[1]
    dst, row_term, multiples = raw(spec.dst), raw(spec.row_term), raw(spec.multiples)
    row_inverse, row_low = raw(spec.row_inverse), raw(spec.row_low)
    row_scale, addend = raw(spec.row_scale), raw(spec.addend)
    steps, multiplier = raw(spec.steps), raw(spec.multiplier)
    out, packed, scratch = raw(spec.out), raw(spec.packed), raw_aligned(codes)
    floor = vsplat(np.float32(spec.floor), GROUP)
    words = (width * bits + 31) // 32
    room = scratch_pitch(width, bits)
    has_unit, row_range = flags & HAS_UNIT, flags & ROW_RANGE
    kind = ADDED if flags & HAS_ADDEND else DENSE if flags & (HAS_TERM | HAS_ROW_SCALE) else PLAIN
    if bits:
        use = PEAKED if has_unit else KEPT
        for f in range(width, room, GROUP):  # nothing, which has code 0
            nothing = vsplat(np.float32(np.nan), GROUP)
            vstore_first(scratch, f, nothing, room - f)
            vstore_first(scratch, room + f, nothing, room - f)
    else:
        use = STREAMED if flags & STREAM else WRITTEN
    # Where the range of packed rows lies: in its columns, or those that the row's multiplier makes.
    table, each = (steps, spec.steps.size // (2 * (LARGEST_MULTIPLIER + 1))) if has_unit else (columns, stretch)
    along = np.int64(not row_range and (not has_unit or each > GROUP))
    m = before = 0
    for r in range(count + (1 if bits else 0)):
        if r < count:
            i = first + r
            factor = peek(dst, i * spec.dst_step) if flags & HAS_DST else np.float32(1)
            low_term = peek(row_term, i * spec.term_step) if flags & HAS_TERM else np.float32(0)
            if flags & MULTIPLIED:
                factor *= np.float32(peek(multiples, i))
                low_term *= np.float32(peek(multiples, i))
            row = (
                vsplat(peek(coefficient, r), GROUP),
                vsplat(factor, GROUP),
                vsplat(low_term, GROUP),
                vsplat(peek(row_scale, i) if flags & HAS_ROW_SCALE else np.float32(1), GROUP),
                floor,
            )
            at, more = base + r * pitch, i * width
            target, to = (scratch, r % 2 * room) if bits else (out, more)
            if kind == PLAIN:
                peak = _row_for(acc, at, width, row, columns, stretch, addend, more, target, to, PLAIN, use)
            elif kind == DENSE:
                peak = _row_for(acc, at, width, row, columns, stretch, addend, more, target, to, DENSE, use)
            else:
                peak = _row_for(acc, at, width, row, columns, stretch, addend, more, target, to, ADDED, use)
            if dots is not None:
                vectors, number, heads, places, rows = dots
                dot_row(target, to, width // heads, heads, vectors, number, places, i * heads, rows * heads)
            before = m
            if has_unit:
                m = row_multiplier(vtop(peak), spec.unit_inverse)
                poke(multiplier, i, m)
        else:
            before = m
        if bits and r:
            i = first + r - 1
            inverses, lows = INVERSE * stretch, LOW * stretch
            if has_unit:
                inverses = 2 * before * each
                lows = inverses + each
            inverse, low = vload(table, inverses, GROUP), vload(table, lows, GROUP)
            if row_range:
                inverse, low = vsplat(peek(row_inverse, i), GROUP), vsplat(peek(row_low, i), GROUP)
            at = (r - 1) % 2 * room
            if along:
                _pack_for(scratch, at, packed, i * words, words, inverse, low, table, inverses, lows, 1, bits)
            else:
                _pack_for(scratch, at, packed, i * words, words, inverse, low, table, inverses, lows, 0, bits)
