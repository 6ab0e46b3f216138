"""A linear map of few float rows in one compiled call: quantized, multiplied and finished, without packed codes.

What ``quantize_pack`` and ``linear`` compute one after the other, by the same operations in the same order; on
few rows, calls and their arguments take longer than that.  Numbers are read where they lie in each call, so that
whatever writes to a range, a scale or a bias is seen; the weight's words are laid out once, known by their checksum.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ..checksum import checksum
from ..checksum.cpu import whole_checksum
from ..cpu import jit
from ..cpu.address import at
from ..cpu.epilogue import GROUP, HAS_BIAS, HAS_DST, HAS_TERM, MULTIPLIED, finish_rows, floats, opened
from ..cpu.finish import quantize_group, row_multiplier
from ..cpu.simd import (
    keep,
    poke,
    raw,
    raw_aligned,
    raw_at,
    vabs,
    vcast,
    vload,
    vload_first,
    vmax,
    vsplat,
    vstore,
    vstore_first,
    vsum,
    vtop,
)
from ..finite.cpu import all_finite
from .cpu import BLOCK_ROWS, FEATURES, SIGN, fill_terms, multiply, weights_of

__all__ = ["Dense"]

DONE, NOT_FINITE, REWRITTEN = range(3)  # what a call finds
FULL_BYTE = 8  # bits

# Entries of ``fixed``:
(
    WORDS, WORD_BYTES, CONTENTS, WEIGHT, STRETCH, START, COLSUM, DEPTH, NUM_IN, NUM_OUT, BITS,
    W_SCALE, W_COUNT, W_LOWER, BIAS, X_SCALE, X_LOWER, X_UNIT, NUM_FIXED,
) = range(19)  # fmt: skip


@njit(forceinline=True)
def _quantize_row(x, base, width, low, inverse, top, flip, codes, to, tail):
    """Codes of one row as bytes from ``codes[to]`` on, those past ``width`` zero; returns their sum."""
    lows, inverses = vsplat(low, GROUP), vsplat(inverse, GROUP)
    tops, flips = vsplat(top, GROUP), vsplat(flip, GROUP)
    total = vsplat(0, GROUP)
    whole = width - width % GROUP
    for f in range(0, whole, GROUP):
        c = quantize_group(vload(x, base + f, GROUP), lows, inverses, tops)
        total = total + c
        vstore(codes, to + f, vcast(c ^ flips, "u8"))
    if whole < width:
        left = width - whole
        vstore(tail, 0, vsplat(np.float32(np.nan), GROUP))  # which has code 0
        vstore_first(tail, 0, vload_first(x, base + whole, GROUP, left), left)
        c = quantize_group(vload(tail, 0, GROUP), lows, inverses, tops)
        total = total + c
        vstore(codes, to + whole, vcast(c ^ flips, "u8"))
    return vsum(total)


@njit(forceinline=True)
def _peak(x, base, width):
    """The largest absolute value of a row of finite numbers."""
    peak = vsplat(np.float32(0.0), GROUP)
    whole = width - width % GROUP
    for f in range(0, whole, GROUP):
        peak = vmax(vabs(vload(x, base + f, GROUP)), peak)
    if whole < width:
        peak = vmax(vabs(vload_first(x, base + whole, GROUP, width - whole)), peak)
    return vtop(peak)


@njit(forceinline=True)
def _lower(place, zero_code, scale, count, lower):
    """Lower ends of ranges: those at ``place``, or where that is 0 the steps by how many of them zero is above."""
    if place:
        given = floats(place, count)
        for i in range(count):
            lower[i] = given[i]
    else:
        for i in range(count):
            lower[i] = scale[i] * -zero_code


@jit.kernel
def _kernel(fixed, x_zero, w_zero, x_at, rows, out):
    given = carray(at(fixed, np.int64), (NUM_FIXED,))
    num_in, num_out, count, bits = given[NUM_IN], given[NUM_OUT], given[W_COUNT], given[BITS]
    if not all_finite(x_at, rows * num_in):
        return NOT_FINITE
    if whole_checksum(given[WORDS], given[WORD_BYTES]) != given[CONTENTS]:
        return REWRITTEN
    x, weight, start = raw_at(x_at, np.float32), raw_at(given[WEIGHT], np.int32), raw_at(given[START], np.int32)
    stretch, depth, unit = given[STRETCH], given[DEPTH], given[X_UNIT]
    top, flip = np.float32((1 << bits) - 1), SIGN if bits == FULL_BYTE else 0
    # The ranges: of the input, where each row has a multiple of it, and of the weight.
    step = floats(given[X_SCALE], 1)
    lower_owner, w_lower = np.empty(1, np.float32), np.empty(count, np.float32)
    _lower(given[X_LOWER], np.float32(x_zero), step, 1, lower_owner)
    _lower(given[W_LOWER], np.float32(w_zero), floats(given[W_SCALE], count), count, w_lower)
    unit_inverse = np.float32(1) / floats(unit, 1)[0] if unit else np.float32(0)
    multiples_owner = np.empty(rows, np.uint8)
    multiples = raw(multiples_owner)
    flags = HAS_DST | HAS_TERM | MULTIPLIED | (HAS_BIAS if given[BIAS] else 0)
    nothing = np.int64(0)
    spec = opened((
        rows, num_out, nothing, np.int64(flags), out, nothing, nothing,
        given[W_SCALE], count, np.int64(w_lower.ctypes.data), count, nothing, given[BIAS],
        nothing, nothing, nothing, nothing, nothing,
        given[X_SCALE], nothing, np.int64(lower_owner.ctypes.data), nothing,
        nothing, nothing, np.int64(multiples_owner.ctypes.data),
    ))  # fmt: skip
    fill_terms(spec.columns, floats(given[COLSUM], num_out), np.float32(num_in))

    pitch = (4 * depth + GROUP - 1) // GROUP * GROUP  # bytes of a row of codes
    block = min(BLOCK_ROWS, (rows + 5) // 6 * 6)
    codes_owner = np.empty(block * pitch, np.uint8)
    codes, lanes = raw(codes_owner), raw(codes_owner.view(np.int32))
    acc_owner = np.empty(block * stretch + GROUP, np.float32)
    acc = raw_aligned(raw(acc_owner))
    sums_owner, tail_owner, unused = np.empty(block, np.float32), np.empty(GROUP, np.float32), np.empty(1, np.uint8)
    sums, tail = raw(sums_owner), raw(tail_owner)
    for first in range(0, rows, block):
        here = min(block, rows - first)
        for r in range(here):
            base = (first + r) * num_in
            m = row_multiplier(_peak(x, base, num_in), unit_inverse) if unit else np.int64(1)
            poke(multiples, first + r, m)
            factor = np.float32(m)
            inverse, low = np.float32(1) / (step[0] * factor), lower_owner[0] * factor
            poke(sums, r, _quantize_row(x, base, num_in, low, inverse, top, flip, codes, r * pitch, tail))
        multiply(lanes, pitch // 4, here, weight, stretch, depth, start, acc)
        finish_rows(acc, 0, stretch, sums, first, here, spec, raw(unused))
    keep(lower_owner)
    keep(w_lower)
    keep(multiples_owner)
    keep(codes_owner)
    keep(acc_owner)
    keep(sums_owner)
    keep(tail_owner)
    keep(unused)
    return DONE


class Dense:
    """``y = x^ W^T + b`` for few float rows, by one weight and one range of the input, its constants gathered once.

    Shapes, dtypes and devices are taken to be as these say, and tensors to be contiguous.

    Args:
        words: ``[O, row_words(K, w_bits)]`` int32.
        scale: One element or ``[O]``, float32.
        lower: Lower end of the weight's range, of the same shape; or the code that stands for zero.
        num_in: ``K``.
        bits: Widths of the input's and the weight's codes, 2, 4 or 8.
        x_scale: Step of the input's codes, one element, float32.
        x_lower: Lower end of its range, one element; or the code that stands for zero.
        x_unit: What row multipliers count, one element; :obj:`None` where rows have none.
        bias: ``[O]`` float32.
    """

    __slots__ = ("constants", "fixed", "options", "place", "places", "tensors", "zeros")

    def __init__(
        self,
        words: Tensor,
        scale: Tensor,
        lower: Tensor | float,
        num_in: int,
        bits: tuple[int, int],
        x_scale: Tensor,
        x_lower: Tensor | float,
        x_unit: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        w_end, x_end = (end if isinstance(end, Tensor) else None for end in (lower, x_lower))
        self.tensors = (words, scale, w_end, bias, x_scale, x_end, x_unit)
        self.zeros = (0.0 if x_end is not None else float(x_lower), 0.0 if w_end is not None else float(lower))
        self.options = (num_in, *bits)
        self.fixed = np.zeros(NUM_FIXED, np.int64)
        self.place = self.fixed.ctypes.data
        self.fixed[[NUM_IN, NUM_OUT, BITS, W_COUNT]] = num_in, words.size(0), bits[0], scale.numel()
        self.fixed[DEPTH] = -(-num_in // FEATURES)
        self._lay_out()

    def _lay_out(self) -> None:
        words, num_in, (_, x_bits, w_bits) = self.tensors[0], self.options[0], self.options
        self.constants = weight, start, colsum = weights_of(words, num_in, w_bits, x_bits == FULL_BYTE)
        fixed = self.fixed
        fixed[[WEIGHT, STRETCH, START, COLSUM]] = weight.data_ptr(), start.numel(), start.data_ptr(), colsum.data_ptr()
        fixed[[WORD_BYTES, CONTENTS]] = words.numel() * words.element_size(), checksum(words)
        self.places = self._places()
        fixed[[WORDS, W_SCALE, W_LOWER, BIAS, X_SCALE, X_LOWER, X_UNIT]] = self.places

    def _places(self) -> tuple[int, ...]:
        return tuple([0 if tensor is None else tensor.data_ptr() for tensor in self.tensors])

    def __call__(self, x: Tensor, rows: int, shape: tuple[int, ...]) -> Tensor | None:
        """``[rows, O]`` float32 in ``shape``, of contiguous ``x``; :obj:`None` where that is not finite."""
        if self._places() != self.places:
            self._lay_out()
        out = torch.empty(shape, dtype=torch.float32)
        args = (*self.zeros, x.data_ptr(), rows, out.data_ptr())
        found = _kernel(self.place, *args)
        if found == REWRITTEN:
            self._lay_out()
            found = _kernel(self.place, *args)
        return out if found == DONE else None
