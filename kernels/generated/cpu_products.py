"""Linear maps of single edges inside a generated kernel: rows quantized, multiplied and finished in a thread's scratch.

Operations and their order are those of :mod:`..few_rows.cpu`, and so of ``quantize_pack`` and then ``linear``.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

from ..cpu import jit
from ..cpu.epilogue import GROUP, HAS_BIAS, HAS_DST, HAS_TERM, MULTIPLIED, Epilogue, finish_rows, floats, opened
from ..cpu.finish import row_multiplier
from ..cpu.simd import poke, raw, raw_aligned, raw_at, vload, vload_first, vmax, vsplat, vtop, vview
from ..few_rows.cpu import _quantize_row
from ..linear.cpu import BLOCK_ROWS, FEATURES, SIGN, fill_terms, multiply, weights_of
from .program import Product

__all__ = ["BLOCK_ROWS", "EdgeProduct", "constants_of", "open_product", "run_product"]

FULL_BYTE = 8  # bits
LARGEST = np.float32(3.4028235e38)
WITHOUT_SIGN = 0x7FFFFFFF

# Entries of ``fixed``:
(
    WEIGHT, STRETCH, START, COLSUM, DEPTH, NUM_IN, NUM_OUT, BITS, W_SCALE, W_COUNT, W_LOWER, BIAS, X_SCALE, X_LOWER,
    X_UNIT, NUM_FIXED,
) = range(16)  # fmt: skip


def constants_of(product: Product, arrays: tuple[Tensor, ...]) -> tuple[np.ndarray, list[Any]]:
    """Numbers and addresses of a product, and what has to be kept while they are read; ``arrays`` as in
    :class:`~.program.Product`.
    """
    words, *rest = arrays
    held = [t.detach().contiguous() for t in rest]
    w_scale, w_lower, bias, x_scale, x_lower, unit = held
    weight, start, colsum = weights_of(words, product.num_in, product.w_bits, product.x_bits == FULL_BYTE)
    fixed = np.zeros(NUM_FIXED, np.int64)
    fixed[[WEIGHT, STRETCH, START, COLSUM]] = weight.data_ptr(), start.numel(), start.data_ptr(), colsum.data_ptr()
    fixed[[DEPTH, NUM_IN, NUM_OUT]] = -(-product.num_in // FEATURES), product.num_in, product.num_out
    fixed[[BITS, W_SCALE, W_COUNT, W_LOWER]] = product.x_bits, w_scale.data_ptr(), w_scale.numel(), w_lower.data_ptr()
    fixed[[X_SCALE, X_LOWER]] = x_scale.data_ptr(), x_lower.data_ptr()
    fixed[BIAS] = bias.data_ptr() if product.has_bias else 0
    fixed[X_UNIT] = unit.data_ptr() if product.has_unit else 0
    return fixed, [held, weight, start, colsum]


class EdgeProduct(NamedTuple):
    """A product as a thread has it, with its scratch."""

    spec: Epilogue
    weight: int  # address
    start: int
    stretch: int
    depth: int
    num_in: int
    top: np.float32
    flip: int
    step: np.float32
    low: np.float32
    unit_inverse: np.float32  # 0 without multipliers
    pitch: int  # bytes of a row of codes
    codes: np.ndarray
    acc: np.ndarray
    sums: np.ndarray
    tail: np.ndarray
    multiples: np.ndarray
    unused: np.ndarray


@njit
def open_product(fixed, out, rows):
    """The product described by ``fixed``, which writes to the array ``out`` of ``rows`` rows."""
    num_out, bits, depth, stretch = fixed[NUM_OUT], fixed[BITS], fixed[DEPTH], fixed[STRETCH]
    multiples = np.ones(rows, np.uint8)
    unit = fixed[X_UNIT]
    flags = HAS_DST | HAS_TERM | MULTIPLIED | (HAS_BIAS if fixed[BIAS] else 0)
    nothing = np.int64(0)
    spec = opened((
        rows, num_out, nothing, np.int64(flags), np.int64(out.ctypes.data), nothing, nothing,
        fixed[W_SCALE], fixed[W_COUNT], fixed[W_LOWER], fixed[W_COUNT], nothing, fixed[BIAS],
        nothing, nothing, nothing, nothing, nothing,
        fixed[X_SCALE], nothing, fixed[X_LOWER], nothing,
        nothing, nothing, np.int64(multiples.ctypes.data),
    ))  # fmt: skip
    fill_terms(spec.columns, floats(fixed[COLSUM], num_out), np.float32(fixed[NUM_IN]))
    pitch = (4 * depth + GROUP - 1) // GROUP * GROUP
    return EdgeProduct(
        spec,
        fixed[WEIGHT],
        fixed[START],
        stretch,
        depth,
        fixed[NUM_IN],
        np.float32((1 << bits) - 1),
        SIGN if bits == FULL_BYTE else 0,
        floats(fixed[X_SCALE], 1)[0],
        floats(fixed[X_LOWER], 1)[0],
        np.float32(1) / floats(unit, 1)[0] if unit else np.float32(0),
        pitch,
        np.zeros(BLOCK_ROWS * pitch, np.uint8),
        np.empty(BLOCK_ROWS * stretch + GROUP, np.float32),
        np.empty(BLOCK_ROWS, np.float32),
        np.empty(GROUP, np.float32),
        multiples,
        np.empty(1, np.uint8),
    )


@njit(forceinline=True)
def _peak(x, base, width):
    """The largest absolute value of a row, NaN or infinity where there is any: compared as integers."""
    without_sign, peak = vsplat(WITHOUT_SIGN, GROUP), vsplat(0, GROUP)
    whole = width - width % GROUP
    for f in range(0, whole, GROUP):
        peak = vmax(vview(vload(x, base + f, GROUP), "i32") & without_sign, peak)
    if whole < width:
        peak = vmax(vview(vload_first(x, base + whole, GROUP, width - whole), "i32") & without_sign, peak)
    return vtop(vview(peak, "f32"))


@jit.kernel
def run_product(product, x, rows, first):
    """Map the rows ``x[:rows]``, at most :data:`BLOCK_ROWS` of them, to the rows of the result from ``first`` on.

    Returns whether all of ``x`` was finite; where it was not, the rest of the result is not written.
    """
    weight, start = raw_at(product.weight, np.int32), raw_at(product.start, np.int32)
    codes, lanes = raw(product.codes), raw(product.codes.view(np.int32))
    acc, sums, tail = raw_aligned(raw(product.acc)), raw(product.sums), raw(product.tail)
    num_in, pitch, flip = product.num_in, product.pitch, product.flip
    for r in range(rows):
        base = r * num_in
        peak = _peak(x, base, num_in)
        if not peak <= LARGEST:
            return False
        m = row_multiplier(peak, product.unit_inverse) if product.unit_inverse != np.float32(0) else np.int64(1)
        product.multiples[first + r] = m
        factor = np.float32(m)
        inverse, low = np.float32(1) / (product.step * factor), product.low * factor
        poke(sums, r, _quantize_row(x, base, num_in, low, inverse, product.top, flip, codes, r * pitch, tail))
    multiply(lanes, pitch // 4, rows, weight, product.stretch, product.depth, start, acc)
    finish_rows(acc, 0, product.stretch, sums, first, rows, product.spec, raw(product.unused))
    return True
