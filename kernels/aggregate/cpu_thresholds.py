"""Unweighted sums of 2-bit codes requantized to 2 bits by comparing integers.

Where all columns share their affine step and nothing differs between columns, the code of a row's result does not
decrease with its integer sum, so three thresholds per row take the place of float arithmetic on every feature.  They
are found by that arithmetic itself, so codes are those of :func:`..cpu.epilogue.finish_rows` bit for bit.
"""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit
from torch import Tensor

from ..cpu import jit
from ..cpu.codesum import lane_capacity, neighbour_counts, neighbour_sum
from ..cpu.epilogue import (
    COLUMN_COUNTS,
    GROUP,
    HAS_DST,
    INVERSE,
    LOW,
    OFFSET,
    RELU,
    ROW_RANGE,
    SCALE,
    Closed,
    finish_rows,
    opened,
)
from ..cpu.simd import (
    atomic_add,
    keep,
    peek,
    poke,
    raw,
    vcast,
    vjoin,
    vlanes,
    vlive,
    vload,
    vload_first,
    vmax,
    vmin,
    vsplat,
    vstep,
    vstore,
    vstore_first,
    vstore_parts,
    vwithin,
)
from ..layout import parts_per_byte

__all__ = ["BITS", "applies", "threshold_kernel"]

BITS = 2  # of codes and results
BLOCK = 4 * GROUP  # rows whose thresholds are found at a time
STEPS = 3  # thresholds of a row, and the largest code
WINDOW = 4  # whole numbers around a threshold's estimate that are tried
TALLEST = 8 * lane_capacity(BITS, 8) - 1  # edges of a row that is summed in bytes and their eights
PARTS = parts_per_byte(BITS)


def applies(closed: Closed, scale: Tensor, out_scale: Tensor | None) -> bool:
    """Whether results of an epilogue need their row's sum alone, do not decrease with it, and fill their bytes."""
    width, bits, flags = closed[1:4]
    if bits != BITS or width % GROUP or flags & ~(HAS_DST | ROW_RANGE | RELU):
        return False
    per_row = bool(flags & ROW_RANGE)
    if max(closed[at] for at in COLUMN_COUNTS[: 2 if per_row else 4]) > 1 or not float(scale) > 0:
        return False
    return per_row or float(out_scale) > 0


@njit(forceinline=True)
def _values(total, at_zero, scale, dst, floor, low, inverse):
    """What :func:`..cpu.epilogue.quantize_group` would round down, of sums ``total`` in as many rows."""
    y = vmax(floor, (total * scale + at_zero) * dst)
    return (y - low) * inverse + vsplat(np.float32(0.5), GROUP)


@jit.kernel
def find_thresholds(rowptr, first, count, spec, thresholds):
    """The least sums whose codes are 1, 2 and 3, int32 ``thresholds[3, BLOCK]`` from row ``first`` on.

    The first one is -1 for rows that float arithmetic must finish.
    """
    flags, table, stretch = spec.flags, raw(spec.columns), spec.columns.shape[1]
    scale = vsplat(peek(table, SCALE * stretch), GROUP)
    offset = vsplat(peek(table, OFFSET * stretch), GROUP)
    inverse = vsplat(peek(table, INVERSE * stretch), GROUP)
    low = vsplat(peek(table, LOW * stretch), GROUP)
    floor, dst = vsplat(np.float32(spec.floor), GROUP), vsplat(np.float32(1.0), GROUP)
    zero, one = vsplat(np.float32(0.0), GROUP), vsplat(np.float32(1.0), GROUP)
    infinite, beneath = vsplat(np.float32(np.inf), GROUP), vsplat(np.float32(-np.inf), GROUP)
    smallest = vsplat(np.float32(1e-30), GROUP)
    found = raw(thresholds)
    dsts, inverses, lows = raw(spec.dst), raw(spec.row_inverse), raw(spec.row_low)
    pointers = raw(rowptr)
    for r in range(0, count, GROUP):
        i, left = first + r, count - r
        begin = vload_first(pointers, i, GROUP, left)
        degree = vcast(vcast(vload_first(pointers, i + 1, GROUP, left) - begin, "i32"), "f32")
        if flags & HAS_DST:
            dst = vload_first(dsts, i, GROUP, left)
        if flags & ROW_RANGE:
            inverse, low = vload_first(inverses, i, GROUP, left), vload_first(lows, i, GROUP, left)
        at_zero = degree * offset
        most = degree * vsplat(np.float32(STEPS), GROUP)
        # Not of rows that are scaled by nothing, or by a negative number, or whose range is none.
        good = vwithin(dst, smallest, infinite, one, zero) * vwithin(inverse, smallest, infinite, one, zero)
        good = good * vwithin(degree, one, vsplat(np.float32(TALLEST), GROUP), one, zero)
        for j in range(STEPS):
            goal = vsplat(np.float32(j + 1), GROUP)
            y = (goal - vsplat(np.float32(0.5), GROUP)) / inverse + low
            near = (y / dst - at_zero) / scale
            # One more than is needed at either end: a threshold out there is as good as one further out.
            near = vmin(vmax(near, vsplat(np.float32(-1.0), GROUP)), most + vsplat(np.float32(3.0), GROUP))
            near = vcast(vcast(near, "i32"), "f32")
            lowest = near - vsplat(np.float32(WINDOW // 2 - 1), GROUP)
            short = zero  # how many of the sums tried do not reach the code
            for k in range(WINDOW):
                total = lowest + vsplat(np.float32(k), GROUP)
                value = _values(total, at_zero, scale, dst, floor, low, inverse)
                short = short + vwithin(value, goal, infinite, zero, one)
            tried = vsplat(np.float32(WINDOW), GROUP)
            inside = vwithin(short, one, tried - one, one, zero)
            under = vwithin(short, zero, zero, one, zero) * vwithin(lowest, beneath, zero, one, zero)
            over = vwithin(short, tried, tried, one, zero) * vwithin(lowest + tried, most + one, infinite, one, zero)
            good = good * vmax(inside, vmax(under, over))
            least = vmax(lowest + short, zero)
            vstore(found, j * BLOCK + r, vcast(least, "i32"))
        least = vcast(vload(found, r, GROUP), "f32")
        vstore(found, r, vcast(vwithin(good, one, one, least, zero - one), "i32"))
    keep(thresholds)
    keep(rowptr)


@njit(forceinline=True)
def _compared(total, none, top, one, two, three, zero):
    """A tile's packed results: ``total`` against a row's thresholds, of which those past ``top`` are never reached."""
    first, second, third = np.int64(one <= top), np.int64(two <= top), np.int64(three <= top)
    result = vstep(none, total, min(one, top), first)
    result = vstep(result, total, min(two, top), second)
    result = vstep(result, total, min(three, top), third)
    return vjoin(result, zero)


@cache
def threshold_kernel(lanes: int, exact: int):
    """The kernel of unweighted sums where :func:`applies`; ``exact`` is 1 where ``lanes`` divides a row's words."""
    codes = PARTS * 4 * lanes
    capacity = lane_capacity(BITS, 8)

    @jit.kernel
    def kernel(words, stride, rowptr, col, closed, code_row, bounds, counter):
        spec = opened(closed)
        pitch = 4 * stride * PARTS
        acc_owner = np.empty(pitch + 4 * lanes, np.float32)
        coefficient_owner = np.empty(1, np.float32)
        unpacked_owner = np.empty(code_row, np.uint8)
        spill_owner, thresholds = np.empty(codes, np.int32), np.empty(STEPS * BLOCK, np.int32)
        acc, coefficient, unpacked = raw(acc_owner), raw(coefficient_owner), raw(unpacked_owner)
        spill, found = raw(spill_owner), raw(thresholds)
        source, edges, final, pointers, out = raw(words), raw(col), col.size - 1, raw(rowptr), raw(spec.packed)
        zero, none = vlanes("i32", lanes), vlanes("u8", codes)
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            stop = bounds[chunk + 1]
            for first in range(bounds[chunk], stop, BLOCK):
                last = min(first + BLOCK, stop)
                find_thresholds(rowptr, first, last - first, spec, thresholds)
                for i in range(first, last):
                    begin, end = peek(pointers, i), peek(pointers, i + 1)
                    one = np.int64(peek(found, i - first))
                    two = np.int64(peek(found, BLOCK + i - first))
                    three = np.int64(peek(found, 2 * BLOCK + i - first))
                    for tile in range(0, stride, lanes):
                        live = vlive(stride - tile, exact)
                        if one >= 0:
                            low, eights, _ = neighbour_counts(
                                source, stride, tile, lanes, live, edges, final, begin, end,
                                zero, none, capacity, spill,
                            )  # fmt: skip
                            if end - begin <= capacity:
                                word = _compared(low + (eights << 3), none, 255, one, two, three, zero)
                            else:
                                total = vcast(low, "u16") + (vcast(eights, "u16") << 3)
                                word = _compared(total, none, 65535, one, two, three, zero)
                            vstore_first(out, i * stride + tile, word, live)
                        else:
                            total = neighbour_sum(
                                source, stride, tile, lanes, live, edges, final, begin, end,
                                zero, none, capacity, spill,
                            )  # fmt: skip
                            live_bytes = vlive(4 * (stride - tile), exact)
                            vstore_parts(acc, 4 * tile, 4 * stride, vcast(total, "f32"), PARTS, live_bytes)
                    if one < 0:
                        poke(coefficient, 0, end - begin)
                        finish_rows(acc, 0, pitch, coefficient, i, 1, spec, unpacked)
        keep(acc_owner)
        keep(coefficient_owner)
        keep(unpacked_owner)
        keep(spill_owner)
        keep(thresholds)

    return kernel
