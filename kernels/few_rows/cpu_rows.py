"""Few float rows packed as a message in one compiled call, and what nodes add of their own (see :mod:`.cpu`)."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER
from ..cpu import jit
from ..cpu.address import at
from ..cpu.epilogue import GROUP, HAS_UNIT, finish_rows, floats, opened
from ..cpu.finish import pack_row, quantize_group, row_multiplier
from ..cpu.simd import keep, peek, poke, raw, raw_at, vcast, vload, vload_first, vsplat, vstore, vstore_first
from ..finite.cpu import all_finite
from ..layout import row_words
from ..linear.cpu import BLOCK_ROWS
from . import Range
from .cpu import (
    DONE,
    HEADER,
    LARGEST,
    NOT_FINITE,
    NUM_FIXED,
    NUM_OUT,
    NUM_ZEROS,
    OUT_BITS,
    OUT_LOWER,
    OUT_SCALE,
    OUT_UNIT,
    OUT_ZERO,
    ZEROS,
    Fixed,
    opened_message,
    row_peak,
    scratch_bytes,
)

__all__ = ["Rows"]


@njit(forceinline=True)
def _own_row(x, base, width, low, inverse, top, step, factor, own, tail):
    """``factor`` times the values that the codes of a row stand for."""
    lows, inverses, tops = vsplat(low, GROUP), vsplat(inverse, GROUP), vsplat(top, GROUP)
    steps, factors = vsplat(step, GROUP), vsplat(factor, GROUP)
    whole = width - width % GROUP
    for f in range(0, whole, GROUP):
        c = vcast(quantize_group(vload(x, base + f, GROUP), lows, inverses, tops), "f32")
        vstore(own, base + f, (c * steps + lows) * factors)
    if whole < width:
        left = width - whole
        vstore(tail, 0, vsplat(np.float32(0), GROUP))
        vstore_first(tail, 0, vload_first(x, base + whole, GROUP, left), left)
        c = vcast(quantize_group(vload(tail, 0, GROUP), lows, inverses, tops), "f32")
        vstore_first(own, base + whole, (c * steps + lows) * factors, left)


@njit(forceinline=True)
def _pack_rows(x, first, count, width, words, steps, unit_inverse, unit, out, multipliers, bits):
    """Rows ``[first, first + count)`` packed from where they are, of widths that fill vectors; whether they are finite.

    ``steps`` has the inverse step and the start of the range of each multiplier.
    """
    finite = True
    for i in range(first, first + count):
        peak = row_peak(x, i * width, width)
        finite = finite and peak <= LARGEST
        m = np.int64(1)
        if unit:
            m = row_multiplier(peak, unit_inverse)
            poke(multipliers, i, m)
        inverse, low = vsplat(peek(steps, 2 * m), GROUP), vsplat(peek(steps, 2 * m + 1), GROUP)
        pack_row(x, i * width, out, i * words, words, inverse, low, steps, 0, 0, 0, bits)
    return finite


@njit(forceinline=True)
def _own_rows(x, first, count, width, bits, step, low, factor, multipliers, own, tail):
    """:func:`_own_row` of the rows ``[first, first + count)``."""
    top = np.float32((1 << bits) - 1)
    for i in range(first, first + count):
        m = np.float32(peek(multipliers, i))
        inverse = np.float32(1) / (step * m)
        _own_row(x, i * width, width, low * m, inverse, top, step * m, factor, own, tail)


@jit.kernel
def _packed(fixed, x_at, rows, own_at, epsilon_at, out):
    given = carray(at(fixed, np.int64), (NUM_FIXED,))
    width, bits, unit = given[NUM_OUT], given[OUT_BITS], given[OUT_UNIT]
    zero = floats(given[ZEROS], NUM_ZEROS)[OUT_ZERO]
    words_at, multipliers_at = opened_message(out, rows, width, bits, given[OUT_SCALE], given[OUT_LOWER], zero, unit)
    nothing, one = np.int64(0), np.int64(1)
    spec = opened((
        rows, width, bits, np.int64(HAS_UNIT if unit else 0), words_at, multipliers_at, unit,
        nothing, nothing, nothing, nothing, nothing, nothing,
        given[OUT_SCALE], one, out, one, nothing,
        nothing, nothing, nothing, nothing, nothing, nothing, nothing,
    ))  # fmt: skip
    x, multipliers, words = raw_at(x_at, np.float32), raw_at(multipliers_at, np.uint8), (width * bits + 31) // 32
    packed = raw_at(words_at, np.int32)
    step, low = floats(given[OUT_SCALE], 1)[0], floats(out, 1)[0]
    steps_owner = np.empty(2 * (LARGEST_MULTIPLIER + 1), np.float32)
    for m in range(LARGEST_MULTIPLIER + 1):
        steps_owner[2 * m] = np.float32(1) / (step * np.float32(m))
        steps_owner[2 * m + 1] = low * np.float32(m)
    steps, unit_inverse = raw(steps_owner), np.float32(1) / floats(unit, 1)[0] if unit else np.float32(0)
    unpacked, masses = np.empty(scratch_bytes(width, bits), np.uint8), np.zeros(BLOCK_ROWS, np.float32)
    tail_owner = np.empty(GROUP, np.float32)
    factor = np.float32(1) + floats(epsilon_at, 1)[0] if own_at else np.float32(0)
    found = DONE
    for first in range(0, rows, BLOCK_ROWS):
        here = min(BLOCK_ROWS, rows - first)
        args = (x, first, here, width, words, steps, unit_inverse, unit, packed, multipliers)
        # Bytes of a row in whole vectors: then no step reads past it.
        if words % (GROUP // 4) == 0 and width * bits == 32 * words and bits == 2:
            finite = _pack_rows(*args, 2)
        elif words % (GROUP // 4) == 0 and width * bits == 32 * words and bits == 4:
            finite = _pack_rows(*args, 4)
        else:
            finite = all_finite(x_at + 4 * first * width, here * width)
            finish_rows(x, first * width, width, raw(masses), first, here, spec, raw(unpacked))
        if not finite:
            found = NOT_FINITE
            break
        if own_at:
            own = raw_at(own_at, np.float32)
            _own_rows(x, first, here, width, bits, step, low, factor, multipliers, own, raw(tail_owner))
    keep(steps_owner)
    keep(tail_owner)
    keep(unpacked)
    keep(masses)
    return found


class Rows(Fixed):
    """Few float rows packed as a message.

    Args:
        width: Features of a row.
        out: Range of the codes.
        epsilon: One element, float32: what nodes add of their own is ``1 + epsilon`` times the values of their codes.
    """

    __slots__ = ()

    def __init__(self, width: int, out: Range, epsilon: Tensor | None = None) -> None:
        self._gather((*out.tensors, epsilon), (0.0, 0.0, out.zero))
        self.fixed[[NUM_OUT, OUT_BITS]] = width, out.bits
        self.row_bytes = 4 * row_words(width, out.bits) + 1
        self._lay_out()

    def _lay_out(self) -> None:
        self.places = self._places()
        self.fixed[[OUT_SCALE, OUT_LOWER, OUT_UNIT]] = self.places[:3]

    def parts(self, message: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a message in uint8 ``[room(rows)]``: the lower end of the range, the words ``[rows, row_words(width,
        bits)]`` int32, and the multipliers ``[rows]`` uint8.
        """
        words = message[HEADER : HEADER + rows * (self.row_bytes - 1)].view(torch.int32).view(rows, -1)
        return message[:4].view(torch.float32), words, message[HEADER + rows * (self.row_bytes - 1) :]

    def __call__(self, x_at: int, rows: int, out_at: int, own_at: int = 0) -> bool:
        """Write the message at ``out_at`` and, unless 0, what nodes add of their own at ``own_at``, float32 ``[rows,
        width]``; whether the rows are finite.
        """
        if self._places() != self.places:
            self._lay_out()
        return _packed(self.place, x_at, rows, own_at, self.places[3], out_at) == DONE
