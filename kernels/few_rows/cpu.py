"""Few float rows in one compiled call: quantized, multiplied and finished, without codes in between.

What ``quantize_pack`` and ``linear`` compute one after the other, by the same operations in the same order; on
few rows, calls and their arguments take longer than that.  Numbers are read where they lie in each call, so that
whatever writes to a range, a scale or a bias is seen; the weight's words are laid out once, known by their checksum.

Packed rows are for :mod:`.cpu_neighbours`, as a message: the lower end of their range, the words, and the multipliers,
in one place.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import carray, njit
from torch import Tensor

from ..checksum import checksum
from ..checksum.cpu import whole_checksum
from ..cpu import jit
from ..cpu.address import at
from ..cpu.epilogue import (
    GROUP,
    HAS_ADDEND,
    HAS_BIAS,
    HAS_DST,
    HAS_ROW_SCALE,
    HAS_TERM,
    HAS_UNIT,
    MULTIPLIED,
    RELU,
    finish_rows,
    floats,
    opened,
)
from ..cpu.finish import ALIGNMENT, quantize_group, row_multiplier, scratch_pitch
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
    vview,
)
from ..layout import BITS_PER_BYTE, row_words
from ..linear.cpu import BLOCK_ROWS, FEATURES, SIGN, fill_terms, multiply, weights_of
from . import Range

__all__ = ["HEADER", "Dense", "Fixed", "opened_message", "row_peak", "scratch_bytes"]

DONE, NOT_FINITE, REWRITTEN = range(3)  # what a call finds
LARGEST = np.finfo(np.float32).max

# Entries of ``fixed``:
(
    WORDS, WORD_BYTES, CONTENTS, WEIGHT, STRETCH, START, COLSUM, DEPTH, NUM_IN, NUM_OUT, BITS, OUT_BITS,
    W_SCALE, W_COUNT, W_LOWER, BIAS, X_SCALE, X_LOWER, X_UNIT, OUT_SCALE, OUT_LOWER, OUT_UNIT, ZEROS, NUM_FIXED,
) = range(24)  # fmt: skip
HEADER = 64  # bytes before the words of a message: the lower end of its range
X_ZERO, W_ZERO, OUT_ZERO, NUM_ZEROS = range(4)  # codes that stand for zero, at ``ZEROS``


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
def row_peak(x, base, width):
    """The largest absolute value of a row; infinite or NaN where one of its numbers is.

    Bits of absolute values compare as the numbers do, and those of what is not finite are above all others.
    """
    peak = vsplat(0, GROUP)
    whole = width - width % GROUP
    for f in range(0, whole, GROUP):
        peak = vmax(vview(vabs(vload(x, base + f, GROUP)), "i32"), peak)
    if whole < width:
        peak = vmax(vview(vabs(vload_first(x, base + whole, GROUP, width - whole)), "i32"), peak)
    return vtop(vview(peak, "f32"))


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


@njit(forceinline=True)
def scratch_bytes(width, bits):
    """Bytes that :func:`..cpu.finish.finish_rows` needs for packed rows."""
    return 2 * 4 * scratch_pitch(width, bits) + ALIGNMENT if bits else 1


@njit(forceinline=True)
def opened_message(out, rows, width, bits, scale, lower_at, zero, unit):
    """Where a message at ``out`` has its words and multipliers, its lower end being written; multipliers are 1 where
    the rows of a range have none.
    """
    lower = floats(out, 1)
    _lower(lower_at, zero, floats(scale, 1), 1, lower)
    words = out + HEADER
    multipliers = words + rows * (4 * ((width * bits + 31) // 32))
    if not unit:
        ones = carray(at(multipliers, np.uint8), (rows,))
        ones[:] = 1
    return words, multipliers


@njit(forceinline=True)
def _opened_map(given, rows, out, w_lower, x_lower, multiples, row_scale, addend, relu):
    """What follows the product with the weight of ``given``: its result at ``out``, as floats or as a message."""
    zeros = floats(given[ZEROS], NUM_ZEROS)
    num_out, count, bits, unit = given[NUM_OUT], given[W_COUNT], given[OUT_BITS], given[OUT_UNIT]
    _lower(given[W_LOWER], zeros[W_ZERO], floats(given[W_SCALE], count), count, w_lower)
    flags = HAS_DST | HAS_TERM | MULTIPLIED | (HAS_BIAS if given[BIAS] else 0) | (HAS_ROW_SCALE if row_scale else 0)
    flags |= (HAS_ADDEND if addend else 0) | (RELU if relu else 0)
    nothing, multipliers, lower_end = np.int64(0), np.int64(0), np.int64(0)
    ranges = np.int64(1 if bits else 0)
    if bits:
        lower_end = out
        out, multipliers = opened_message(
            out, rows, num_out, bits, given[OUT_SCALE], given[OUT_LOWER], zeros[OUT_ZERO], unit
        )
        flags |= HAS_UNIT if unit else 0
    spec = opened((
        rows, num_out, bits, np.int64(flags), out, multipliers, unit,
        given[W_SCALE], count, np.int64(w_lower.ctypes.data), count, nothing, given[BIAS],
        given[OUT_SCALE], ranges, lower_end, ranges, nothing,
        given[X_SCALE], nothing, np.int64(x_lower.ctypes.data), nothing,
        row_scale, addend, np.int64(multiples.ctypes.data),
    ))  # fmt: skip
    fill_terms(spec.columns, floats(given[COLSUM], num_out), np.float32(given[NUM_IN]))
    return spec


@njit(forceinline=True)
def _quantize_rows(x, first, count, width, unit, step, lower, bits, multiples, codes, pitch, sums, tail):
    """Codes and multipliers of the rows ``[first, first + count)``, and the sums of these codes; whether they are
    finite.
    """
    unit_inverse = np.float32(1) / floats(unit, 1)[0] if unit else np.float32(0)
    top, flip, finite = np.float32((1 << bits) - 1), SIGN if bits == BITS_PER_BYTE else 0, True
    for r in range(count):
        base = (first + r) * width
        peak = row_peak(x, base, width)
        finite = finite and peak <= LARGEST
        m = row_multiplier(peak, unit_inverse) if unit else np.int64(1)
        poke(multiples, first + r, m)
        factor = np.float32(m)
        inverse, low = np.float32(1) / (step * factor), lower * factor
        poke(sums, r, _quantize_row(x, base, width, low, inverse, top, flip, codes, r * pitch, tail))
    return finite


@jit.kernel
def _mapped(fixed, x_at, rows, row_scale, addend, relu, out, other, other_out):
    given = carray(at(fixed, np.int64), (NUM_FIXED,))
    more = carray(at(other if other else fixed, np.int64), (NUM_FIXED,))
    if whole_checksum(given[WORDS], given[WORD_BYTES]) != given[CONTENTS]:
        return REWRITTEN
    if other and whole_checksum(more[WORDS], more[WORD_BYTES]) != more[CONTENTS]:
        return REWRITTEN
    num_in, bits, unit = given[NUM_IN], given[BITS], given[X_UNIT]
    # The ranges: of the input, where each row has a multiple of it, of the weight, and of the result.
    step, nothing = floats(given[X_SCALE], 1), np.int64(0)
    lower_owner, w_lower = np.empty(1, np.float32), np.empty(given[W_COUNT], np.float32)
    _lower(given[X_LOWER], floats(given[ZEROS], NUM_ZEROS)[X_ZERO], step, 1, lower_owner)
    multiples_owner = np.empty(rows, np.uint8)
    spec = _opened_map(given, rows, out, w_lower, lower_owner, multiples_owner, row_scale, addend, relu)
    also, also_lower = spec, w_lower
    if other:
        also_lower = np.empty(more[W_COUNT], np.float32)
        also = _opened_map(
            more, rows, other_out, also_lower, lower_owner, multiples_owner, nothing, nothing, nothing
        )

    depth, stretch = given[DEPTH], max(given[STRETCH], more[STRETCH])
    pitch = (4 * depth + GROUP - 1) // GROUP * GROUP  # bytes of a row of codes
    block = min(BLOCK_ROWS, (rows + 5) // 6 * 6)
    codes_owner = np.empty(block * pitch, np.uint8)
    codes, lanes = raw(codes_owner), raw(codes_owner.view(np.int32))
    acc_owner = np.empty(block * stretch + GROUP, np.float32)
    acc = raw_aligned(raw(acc_owner))
    sums_owner, tail_owner = np.empty(block, np.float32), np.empty(GROUP, np.float32)
    most, widest = max(given[OUT_BITS], more[OUT_BITS]), max(given[NUM_OUT], more[NUM_OUT])
    unpacked = np.empty(scratch_bytes(widest, most), np.uint8)
    x, sums, tail, found = raw_at(x_at, np.float32), raw(sums_owner), raw(tail_owner), DONE
    multiples = raw(multiples_owner)
    for first in range(0, rows, block):
        here = min(block, rows - first)
        if not _quantize_rows(
            x, first, here, num_in, unit, step[0], lower_owner[0], bits, multiples, codes, pitch, sums, tail
        ):
            found = NOT_FINITE
            break
        for part in range(2 if other else 1):
            one, end = (given, spec) if part == 0 else (more, also)
            weight, start = raw_at(one[WEIGHT], np.int32), raw_at(one[START], np.int32)
            multiply(lanes, pitch // 4, here, weight, one[STRETCH], depth, start, acc, one[NUM_OUT])
            finish_rows(acc, 0, one[STRETCH], sums, first, here, end, raw(unpacked))
    keep(lower_owner)
    keep(w_lower)
    keep(also_lower)
    keep(multiples_owner)
    keep(codes_owner)
    keep(acc_owner)
    keep(sums_owner)
    keep(tail_owner)
    keep(unpacked)
    return found


class Fixed:
    """The numbers and addresses that a kernel reads, and the tensors that these are of."""

    __slots__ = ("fixed", "place", "places", "row_bytes", "tensors", "zeros")

    def _gather(self, tensors: tuple[Tensor | None, ...], zeros: tuple[float, float, float]) -> None:
        self.tensors = tensors
        self.zeros = np.array(zeros, np.float32)
        self.fixed = np.zeros(NUM_FIXED, np.int64)
        self.fixed[ZEROS] = self.zeros.ctypes.data
        self.place = self.fixed.ctypes.data

    def room(self, rows: int) -> int:
        """Bytes of a message of ``rows`` rows."""
        return HEADER + rows * self.row_bytes

    def _places(self) -> tuple[int, ...]:
        return tuple([0 if tensor is None else tensor.data_ptr() for tensor in self.tensors])


class Dense(Fixed):
    """``y = r (x^ W^T + b + a)`` for few float rows, by one weight and one range of the input, its constants gathered
    once.

    Shapes, dtypes and devices are taken to be as these say, and tensors to be contiguous.

    Args:
        words: ``[O, row_words(K, w_bits)]`` int32.
        scale: One element or ``[O]``, float32.
        lower: Lower end of the weight's range, of the same shape; or the code that stands for zero.
        num_in: ``K``.
        bits: Width of the weight's codes, 1, 2, 4 or 8.
        taken: Range of the input.
        bias: ``[O]`` float32.
        out: Range of the result, a message then; :obj:`None` for float rows.
    """

    __slots__ = ("constants", "options")

    def __init__(
        self,
        words: Tensor,
        scale: Tensor,
        lower: Tensor | float,
        num_in: int,
        bits: int,
        taken: Range,
        bias: Tensor | None,
        out: Range | None = None,
    ) -> None:
        w_end = lower if isinstance(lower, Tensor) else None
        ends = (None, None, None) if out is None else out.tensors
        zeros = (taken.zero, 0.0 if w_end is not None else float(lower), 0.0 if out is None else out.zero)
        self._gather((words, scale, w_end, bias, *taken.tensors, *ends), zeros)
        self.options = (num_in, taken.bits, bits)
        self.row_bytes = 0 if out is None else 4 * row_words(words.size(0), out.bits) + 1
        self.fixed[[NUM_IN, NUM_OUT, BITS, W_COUNT]] = num_in, words.size(0), taken.bits, scale.numel()
        self.fixed[[DEPTH, OUT_BITS]] = -(-num_in // FEATURES), 0 if out is None else out.bits
        self._lay_out()

    def _lay_out(self) -> None:
        words, num_in, (_, x_bits, w_bits) = self.tensors[0], self.options[0], self.options
        self.constants = weight, start, colsum = weights_of(words, num_in, w_bits, x_bits == BITS_PER_BYTE)
        fixed = self.fixed
        fixed[[WEIGHT, STRETCH, START, COLSUM]] = weight.data_ptr(), start.numel(), start.data_ptr(), colsum.data_ptr()
        fixed[[WORD_BYTES, CONTENTS]] = words.numel() * words.element_size(), checksum(words)
        self.places = self._places()
        fixed[
            [WORDS, W_SCALE, W_LOWER, BIAS, X_SCALE, X_LOWER, X_UNIT, OUT_SCALE, OUT_LOWER, OUT_UNIT]
        ] = self.places  # fmt: skip

    def __call__(
        self,
        x_at: int,
        rows: int,
        out_at: int,
        row_scale_at: int = 0,
        addend_at: int = 0,
        relu: bool = False,
        other: Dense | None = None,
        other_at: int = 0,
    ) -> bool:
        """Write the result for ``rows`` contiguous rows at ``x_at`` to ``out_at``: ``[rows, O]`` float32, or a message.

        Args:
            x_at: Float32 ``[rows, K]``.
            rows: How many; 1 or more.
            out_at: Where the result goes, aligned to a cache line for a message.
            row_scale_at: A factor of each row, float32 ``[rows]``; or 0.
            addend_at: Float32 ``[rows, O]``, which may be ``out_at``; or 0.
            relu: Whether what is negative becomes 0, before the factor.
            other: A map of the same codes, those of the same range, by another weight.
            other_at: Where its result goes.

        Returns:
            Whether the rows are finite; what is written is of no use unless they are.
        """
        for one in (self,) if other is None else (self, other):
            if one._places() != one.places:
                one._lay_out()
        also = 0 if other is None else other.place
        args = (self.place, x_at, rows, row_scale_at, addend_at, int(relu), out_at, also, other_at)
        found = _mapped(*args)
        if found == REWRITTEN:
            self._lay_out()
            if other is not None:
                other._lay_out()
            found = _mapped(*args)
        return found == DONE
