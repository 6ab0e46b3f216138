"""Checksums of memory, at the speed at which it can be read."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import carray, njit

from ..cpu import jit
from ..cpu.address import at
from ..cpu.parallel import num_threads, run_chunks
from ..cpu.simd import atomic_add
from . import FACTORS, PLACE, SHIFT, WORD

__all__ = ["checksum_bytes", "whole_checksum"]

FIRST, SECOND = (np.uint64(factor) for factor in FACTORS)
STEP = np.uint64(PLACE)
DOWN = np.uint64(SHIFT)
CHUNK = 1 << 17  # words
SHARED = 1 << 23  # from this many words on it is worth waking threads


@njit(forceinline=True)
def _mixed(word, place):
    x = word ^ (np.uint64(place) * STEP)
    x = (x ^ (x >> DOWN)) * FIRST
    x = (x ^ (x >> DOWN)) * SECOND
    return x ^ (x >> DOWN)


@njit(forceinline=True)
def _sum(address, first, last):
    """Over the words ``[first, last)`` after ``address``."""
    count = last - first
    words = carray(at(address + WORD * first, np.uint64), (count,))
    total = np.uint64(0)
    for i in range(count):  # from 0 on: an index that may be negative keeps loops from being vectorized
        total += _mixed(words[i], first + i)
    return total


@jit.kernel
def whole_checksum(address, num_bytes):
    """The checksum of ``num_bytes`` bytes at ``address``, a multiple of 8, by one thread."""
    count = num_bytes // WORD
    total, tail = _sum(address, 0, count), np.uint64(0)
    if count * WORD < num_bytes:
        rest = carray(at(address, np.uint8), (num_bytes,))
        for i in range(count * WORD, num_bytes):
            tail |= np.uint64(rest[i]) << np.uint64(8 * (i - count * WORD))
        total += _mixed(tail, count)
    return np.int64(total)


@jit.kernel
def _shared(address, partial, bounds, counter):
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        partial[chunk] = np.int64(_sum(address, bounds[chunk], bounds[chunk + 1]))


def checksum_bytes(address: int, num_bytes: int) -> int:
    """The checksum of ``num_bytes`` bytes at ``address``, a multiple of 8."""
    words, tail = divmod(num_bytes, WORD)
    if words < SHARED or tail or num_threads() == 1:
        return whole_checksum(address, num_bytes)
    bounds = np.linspace(0, words, words // CHUNK + 1).astype(np.int64)
    partial = np.empty(bounds.size - 1, np.int64)
    run_chunks(_shared, bounds, address, partial)
    return int(partial.sum())
