"""Unweighted sums of packed rows with integer multipliers: ``sum m c`` and ``sum m``, exact.

Four neighbours at a time meet in byte dot products (:mod:`.bytedot`): about ten instructions per neighbour and vector
of a row.
"""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit

from ..layout import parts_per_byte
from . import jit
from .bytedot import ROWS, vadd_mixed, vmix, vunmix
from .codesum import prefetch_rows
from .epilogue import GROUP, finish_rows, opened
from .simd import (
    atomic_add,
    keep,
    peek,
    poke,
    raw,
    raw_aligned,
    raw_at,
    vcast,
    vlanes,
    vlive,
    vload,
    vload_first,
    vstore,
    vstore_parts,
)

__all__ = ["BLOCK_FLOATS", "multiplied_lanes", "multiplied_sum", "sum_kernel"]

BLOCK_FLOATS = 1 << 12  # accumulators of a block of rows: they stay in the first-level cache
TILE_CODES = 256  # codes of a tile: int32 sums of so many are half of the registers
# Edges whose dot products stay below 2^31: 255 times the largest multiplier each.
RUN = 1 << 18


def multiplied_lanes(stride: int, bits: int) -> int:
    """Words per tile for rows of ``stride`` words of ``bits``-bit codes: the power of two that wastes least."""
    lanes, most = 4, max(4, TILE_CODES * bits // 32)
    while lanes < most and lanes < stride:
        lanes *= 2
    return lanes


@njit(forceinline=True)
def _weight(multiplier, col, e, end):
    """The multiplier of the source of edge ``e``, 0 past ``end``."""
    source = np.int64(peek(col, min(e, end - 1)))
    return np.int32(peek(multiplier, source)) if e < end else np.int32(0)


@njit(forceinline=True)
def multiplied_sum(words, stride, tile, lanes, live, multiplier, col, final, begin, end, zero, none, spill):
    """``m c`` of one tile summed over the edges ``[begin, end)``, as int32 lanes in the order of the tile's codes, and
    the sum of ``m``.

    ``zero`` and ``none`` are zero vectors of a tile's words and of its int32 sums; ``live`` is the count of words to
    read, or None for all; ``spill`` holds an int32 per code; ``final`` is the last edge of the graph.
    """
    mass = np.int32(0)
    e = begin
    spilled = False
    while True:
        stop = min(e + RUN, end)
        acc = none
        while e < stop:
            prefetch_rows(words, stride, tile, lanes, col, final, e, ROWS)
            p = _weight(multiplier, col, e, stop)
            q = _weight(multiplier, col, e + 1, stop)
            r = _weight(multiplier, col, e + 2, stop)
            s = _weight(multiplier, col, e + 3, stop)
            mass += p + q + r + s
            last = stop - 1
            mixed = vmix(
                vload_first(words, peek(col, e) * stride + tile, zero, live),
                vload_first(words, peek(col, min(e + 1, last)) * stride + tile, zero, live),
                vload_first(words, peek(col, min(e + 2, last)) * stride + tile, zero, live),
                vload_first(words, peek(col, min(e + 3, last)) * stride + tile, zero, live),
            )
            acc = vadd_mixed(acc, mixed, np.int32(p | (q << 8) | (r << 16) | (s << 24)))
            e += ROWS
        e = stop
        total = vunmix(acc, zero)
        if spilled:
            total = total + vload(spill, 0, none)
        if stop == end:
            return total, mass
        vstore(spill, 0, total)
        spilled = True


@cache
def sum_kernel(bits: int, lanes: int, exact: int):
    """The kernel of unweighted sums; ``exact`` is 1 where ``lanes`` divides the words of a row.

    Arrays come by their addresses: ``words`` int32, ``rowptr`` int64, ``col`` int32, whose last edge is ``final``, and
    ``multiplier`` uint8.
    """
    parts = parts_per_byte(bits)
    codes = parts * 4 * lanes

    @jit.kernel
    def kernel(words_at, stride, rowptr_at, col_at, final, multiplier_at, closed, block, code_row, bounds, counter):
        spec, rowptr = opened(closed), raw_at(rowptr_at, np.int64)
        pitch = 4 * stride * parts
        acc_owner = np.empty(block * pitch + 4 * lanes + GROUP, np.float32)
        mass_owner = np.empty(block, np.float32)
        unpacked_owner = np.empty(code_row, np.uint8)
        spill_owner = np.empty(codes, np.int32)
        acc, mass = raw_aligned(raw(acc_owner)), raw(mass_owner)
        unpacked, spill = raw(unpacked_owner), raw(spill_owner)
        source, edges, factors = raw_at(words_at, np.int32), raw_at(col_at, np.int32), raw_at(multiplier_at, np.uint8)
        zero, none = vlanes("i32", lanes), vlanes("i32", codes)
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            stop = bounds[chunk + 1]
            for first in range(bounds[chunk], stop, block):
                last = min(first + block, stop)
                for tile in range(0, stride, lanes):
                    live = vlive(stride - tile, exact)
                    live_bytes = vlive(4 * (stride - tile), exact)
                    for i in range(first, last):
                        total, weight = multiplied_sum(
                            source, stride, tile, lanes, live, factors, edges, final,
                            peek(rowptr, i), peek(rowptr, i + 1), zero, none, spill,
                        )  # fmt: skip
                        at = (i - first) * pitch + 4 * tile
                        vstore_parts(acc, at, 4 * stride, vcast(total, "f32"), parts, live_bytes)
                        poke(mass, i - first, weight)
                finish_rows(acc, 0, pitch, mass, first, last - first, spec, unpacked)
        keep(acc_owner)
        keep(mass_owner)
        keep(unpacked_owner)
        keep(spill_owner)

    return kernel
