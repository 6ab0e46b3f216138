"""Sums of packed codes over neighbourhoods, without unpacking them.

Neighbours are counted bit position by bit position with full adders (Harley and Seal): eight words
become one word of *eights*, and three words ``ones``, ``twos`` and ``fours`` carry the rest.  That
costs two instructions per neighbour and vector of row.  Only the eights are split into byte lanes,
``(word >> b p) & mask``, and added up there; those lanes are flushed to int32 before they can
overflow, after ``8 * 85`` neighbours at 2 bits.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from .simd import (
    peek,
    prefetch,
    vcast,
    vfull_adder,
    vload,
    vload_first,
    vspread,
    vstore,
)

__all__ = ["BLOCK", "lane_capacity", "neighbour_counts", "neighbour_sum", "prefetch_rows"]

BLOCK = 8  # neighbours per tree of full adders
LINE_WORDS = 16  # words per cache line
AHEAD = 48  # edges between a prefetch and its use


def lane_capacity(bits: int, lane_bits: int) -> int:
    """How many codes a lane can add up before it overflows."""
    return (2**lane_bits - 1) // (2**bits - 1)


@njit(forceinline=True)
def prefetch_rows(words, stride, tile, lanes, col, final, begin, count):
    """Prefetch the tiles ``AHEAD`` of the edges ``[begin, begin + count)``; ``final`` is the last."""
    for e in range(begin, begin + count):
        source = np.int64(peek(col, min(e + AHEAD, final)))
        for line in range(tile, tile + lanes, LINE_WORDS):
            prefetch(words, source * stride + line)


@njit(forceinline=True)
def _add_eight(ones, twos, fours, a, b, c, d, e, f, g, h):
    """Count eight more words; returns the new ``ones, twos, fours`` and the carry into eights."""
    ones, ab = vfull_adder(ones, a, b)
    ones, cd = vfull_adder(ones, c, d)
    ones, ef = vfull_adder(ones, e, f)
    ones, gh = vfull_adder(ones, g, h)
    twos, abcd = vfull_adder(twos, ab, cd)
    twos, efgh = vfull_adder(twos, ef, gh)
    fours, carry = vfull_adder(fours, abcd, efgh)
    return ones, twos, fours, carry


@njit(forceinline=True)
def _row(words, stride, tile, col, e, like, live):
    return vload_first(words, peek(col, e) * stride + tile, like, live)


@njit(forceinline=True)
def _row_if(words, stride, tile, col, e, end, like, lanes):
    """The tile of edge ``e``, or zeros past ``end``."""
    count = lanes if e < end else 0
    return vload_first(words, peek(col, min(e, end - 1)) * stride + tile, like, count)


@njit(forceinline=True)
def neighbour_counts(words, stride, tile, lanes, live, col, final, begin, end, zero, none, capacity, spill):
    """Codes of one tile counted over the edges ``[begin, end)``: ``low + 8 eights``, in narrow lanes.

    ``zero`` and ``none`` are zero vectors of a tile's words and of its unpacked codes; ``live`` is
    the count of words to read, or None for all ``lanes``; ``spill`` holds an int32 per code;
    ``final`` is the last edge of the graph.  Arrays are :func:`.simd.raw`.

    Returns:
        ``low``, ``eights``, and whether ``spill`` holds the codes of ``8 capacity`` edges or more, to be added.
    """
    ones, twos, fours, eights = zero, zero, zero, none
    blocks, spilled = 0, False
    e = begin
    while e + BLOCK <= end:
        prefetch_rows(words, stride, tile, lanes, col, final, e, BLOCK)
        ones, twos, fours, carry = _add_eight(
            ones,
            twos,
            fours,
            _row(words, stride, tile, col, e, zero, live),
            _row(words, stride, tile, col, e + 1, zero, live),
            _row(words, stride, tile, col, e + 2, zero, live),
            _row(words, stride, tile, col, e + 3, zero, live),
            _row(words, stride, tile, col, e + 4, zero, live),
            _row(words, stride, tile, col, e + 5, zero, live),
            _row(words, stride, tile, col, e + 6, zero, live),
            _row(words, stride, tile, col, e + 7, zero, live),
        )
        eights = eights + vspread(carry, none)
        blocks += 1
        if blocks == capacity:
            total = vcast(eights, "i32") << 3
            if spilled:
                total = total + vload(spill, 0, none)
            vstore(spill, 0, total)
            eights = none
            blocks, spilled = 0, True
        e += BLOCK
    if e < end:
        prefetch_rows(words, stride, tile, lanes, col, final, e, end - e)
        most = min(lanes, stride - tile)
        f, g, h = zero, zero, zero
        if e + 4 < end:
            f = _row_if(words, stride, tile, col, e + 4, end, zero, most)
            g = _row_if(words, stride, tile, col, e + 5, end, zero, most)
            h = _row_if(words, stride, tile, col, e + 6, end, zero, most)
        ones, twos, fours, carry = _add_eight(
            ones,
            twos,
            fours,
            _row_if(words, stride, tile, col, e, end, zero, most),
            _row_if(words, stride, tile, col, e + 1, end, zero, most),
            _row_if(words, stride, tile, col, e + 2, end, zero, most),
            _row_if(words, stride, tile, col, e + 3, end, zero, most),
            f,
            g,
            h,
            zero,
        )
        eights = eights + vspread(carry, none)
    low = vspread(ones, none) + (vspread(twos, none) << 1) + (vspread(fours, none) << 2)
    return low, eights, spilled


@njit(forceinline=True)
def neighbour_sum(words, stride, tile, lanes, live, col, final, begin, end, zero, none, capacity, spill):
    """Codes of one tile summed over the edges ``[begin, end)``, as int32 lanes; see :func:`neighbour_counts`."""
    low, eights, spilled = neighbour_counts(
        words, stride, tile, lanes, live, col, final, begin, end, zero, none, capacity, spill
    )
    if end - begin <= capacity:
        return vcast(low + (eights << 3), "i32")
    total = vcast(low, "i32") + (vcast(eights, "i32") << 3)
    if spilled:
        total = total + vload(spill, 0, none)
    return total
