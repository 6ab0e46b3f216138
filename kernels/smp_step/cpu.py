"""``smp_step`` on the CPU: sums over neighbours and what follows, by blocks of rows that stay in the cache."""
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..aggregate.cpu import aggregate
from ..cpu import jit
from ..cpu.epilogue import flat
from ..cpu.memory import empty
from ..cpu.parallel import run_chunks
from ..cpu.simd import atomic_add
from ..float_sum.cpu import float_sum
from ..layout import row_words
from ..quantize_pack.cpu import pack_scaled
from . import step_factors

__all__ = ["smp_step"]

BLOCK_ROWS = 64  # rows of a partial sum: fixed, so that sums do not depend on the threads
CACHED_FLOATS = 1 << 20  # values of the state between one pass over it and the next


@jit.kernel(reassociate=True)
def _dot(a, b, c, begin, width):
    """``<a, b - c>`` over a row, in float64."""
    total = 0.0
    for f in range(begin, begin + width):
        total += np.float64(a[f]) * (b[f] - c[f])
    return total


@jit.kernel
def _descend(h, x0, neighbours, norm, factors, width, out, change, energy, bounds, counter):
    """``U`` into ``out`` and, unless it is empty, ``n (U - H)`` into ``change``."""
    c0, c1, eta = factors
    while True:
        block = atomic_add(counter, 0, 1)
        if block >= bounds.size - 1:
            break
        total = 0.0
        for i in range(bounds[block], bounds[block + 1]):
            begin = i * width
            for f in range(begin, begin + width):
                out[f] = ((c0 * h[f]) + (c1 * neighbours[f])) + (eta * x0[f])
            if change.size:
                for f in range(begin, begin + width):
                    change[f] = (out[f] - h[f]) * norm[i]
            total += _dot(h, h, neighbours, begin, width)
        energy[block] = total


@jit.kernel
def _correct(h, sums, norm, c2, width, out, constraint, bounds, counter):
    """``H' = U - c2 (D - A~ D)`` in place of ``U``; ``sums`` over neighbours of ``n D``."""
    rough, change = np.empty(width, np.float32), np.empty(width, np.float32)
    while True:
        block = atomic_add(counter, 0, 1)
        if block >= bounds.size - 1:
            break
        total = 0.0
        for i in range(bounds[block], bounds[block + 1]):
            begin = i * width
            for f in range(width):
                change[f] = out[begin + f] - h[begin + f]
                rough[f] = change[f] - sums[begin + f] * norm[i]
                out[begin + f] -= c2 * rough[f]
            for f in range(width):
                total += np.float64(change[f]) * rough[f]
        constraint[block] = total


def smp_step(
    h: Tensor,
    x0: Tensor,
    rowptr: Tensor,
    col: Tensor,
    norm: Tensor,
    eta: float,
    mu: float,
    multiplier: float,
    measure: bool = False,
    words: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    bits: int = 0,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    h, x0, norm = h.detach().contiguous(), x0.detach().contiguous(), norm.detach().contiguous()
    rows, width = h.shape
    out = empty((rows, width), torch.float32)
    packed = empty((rows, row_words(width, out_bits)) if out_bits else (0, 0), torch.int32)
    stats = np.zeros((2, -(-rows // BLOCK_ROWS)))
    c0, c1, c2 = step_factors(eta, mu, multiplier)
    factors = (np.float32(c0), np.float32(c1), np.float32(eta))
    again = measure or multiplier != 0
    change = empty((rows, width) if again else (0, 0), torch.float32)
    scaled = h * norm.view(-1, 1) if words is None else h

    def pack(block: slice) -> None:
        if out_bits:
            packed[block] = pack_scaled(out[block], norm[block], out_scale, out_offset, out_bits)

    for block in _blocks(rows, width):
        pointers = rowptr[block.start : block.stop + 1]
        if words is None:
            neighbours = float_sum(scaled, pointers, col) * norm[block].view(-1, 1)
        else:
            neighbours = aggregate(words, pointers, col, scale, offset, width, bits, dst_scale=norm[block])
        bounds, energy = _partial_sums(block, stats[1])
        run_chunks(
            _descend, bounds, flat(h[block]), flat(x0[block]), flat(neighbours), flat(norm[block]), factors,
            width, flat(out[block]), flat(change[block]), energy,
        )  # fmt: skip
        if not again:
            pack(block)
    for block in _blocks(rows, width) if again else ():
        sums = float_sum(change, rowptr[block.start : block.stop + 1], col)
        bounds, constraint = _partial_sums(block, stats[0])
        run_chunks(
            _correct, bounds, flat(h[block]), flat(sums), flat(norm[block]), np.float32(c2), width,
            flat(out[block]), constraint,
        )  # fmt: skip
        pack(block)
    return out, packed, torch.from_numpy(stats.sum(1)).to(torch.float32)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CACHED_FLOATS // max(1, width) // BLOCK_ROWS) * BLOCK_ROWS
    return (slice(first, min(first + step, rows)) for first in range(0, rows if width else 0, step))


def _partial_sums(block: slice, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries of the partial sums of a block of rows, relative to it, and where their totals go."""
    rows = block.stop - block.start
    first, count = block.start // BLOCK_ROWS, -(-rows // BLOCK_ROWS)
    return np.append(np.arange(0, rows, BLOCK_ROWS), rows), totals[first : first + count]
