"""Linear maps of single edges inside a generated kernel: rows quantized, multiplied and finished in a thread's scratch.

Operations and their order are those of ``quantize_pack`` and then ``linear``.  Maps of edges are many and often narrow
(four logits, sixteen channels of a head), and a row of the graph may have few edges: tiles are no wider than what is
mapped to, constants of all multipliers are there before, and results are finished in the registers that they were
summed in.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER
from ..cpu import jit
from ..cpu.epilogue import floats
from ..cpu.finish import BIAS, GROUP, OFFSET, SCALE, TERM, quantize_group, row_multiplier
from ..cpu.simd import (
    has_feature,
    peek,
    poke,
    raw_at,
    vcast,
    vdot,
    vload,
    vmax,
    vsplat,
    vstore,
    vstore_first,
    vsum,
    vtop,
    vview,
)
from ..layout import BITS_PER_BYTE
from ..linear.cpu import FEATURES, LANES, SIGN, fill_terms, weights_of
from .program import Product

__all__ = ["BLOCK_ROWS", "EdgeProduct", "constants_of", "open_product", "run_product"]

BLOCK_ROWS = 48  # edges at a time
ROWS = 4  # edges whose sums are in registers at a time
HALF, QUARTER = LANES // 2, LANES // 4  # outputs of a narrower tile
NARROW = not has_feature("avx512f")  # registers hold no wider one
LARGEST = np.float32(3.4028235e38)
WITHOUT_SIGN = 0x7FFFFFFF
COLUMNS = 4  # SCALE, OFFSET, TERM and BIAS
INVERSE, STEP, LOW, NUM_RANGES = range(4)  # of the range that a multiplier makes
SUM, ROW_STEP, ROW_LOW, NUM_OF_ROWS = range(4)  # what is known of each edge in a block

# Entries of ``fixed``:
(
    WEIGHT, START, COLSUM, DEPTH, NUM_IN, NUM_OUT, BITS, W_SCALE, W_COUNT, W_LOWER, BIAS_AT, X_SCALE, X_LOWER,
    X_UNIT, NUM_FIXED,
) = range(15)  # fmt: skip


def _tiles(num_out: int) -> list[tuple[int, int]]:
    """The first output and the width of each tile, as :func:`run_product` takes them."""
    found, at = [], 0
    while num_out - at > HALF + QUARTER and not NARROW:
        found.append((at, LANES))
        at += LANES
    if num_out - at > QUARTER and not NARROW:
        found.append((at, HALF))
        at += HALF
    while num_out > at:
        found.append((at, QUARTER))
        at += QUARTER
    return found


def constants_of(product: Product, arrays: tuple[Tensor, ...]) -> tuple[np.ndarray, list[Any]]:
    """Numbers and addresses of a product, and what has to be kept while they are read; ``arrays`` as in
    :class:`~.program.Product`.
    """
    words, *rest = arrays
    held = [t.detach().contiguous() for t in rest]
    w_scale, w_lower, bias, x_scale, x_lower, unit = held
    weight, start, colsum = weights_of(words, product.num_in, product.w_bits, product.x_bits == BITS_PER_BYTE)
    depth, tiles = -(-product.num_in // FEATURES), _tiles(product.num_out)
    if tiles and tiles[-1][1] < LANES:
        by_tile = weight.view(-1, depth, LANES)
        parts = [by_tile[at // LANES, :, at % LANES : at % LANES + lanes].reshape(-1) for at, lanes in tiles]
        weight = torch.cat(parts)
    fixed = np.zeros(NUM_FIXED, np.int64)
    fixed[[WEIGHT, START, COLSUM]] = weight.data_ptr(), start.data_ptr(), colsum.data_ptr()
    fixed[[DEPTH, NUM_IN, NUM_OUT]] = depth, product.num_in, product.num_out
    fixed[[BITS, W_SCALE, W_COUNT, W_LOWER]] = product.x_bits, w_scale.data_ptr(), w_scale.numel(), w_lower.data_ptr()
    fixed[[X_SCALE, X_LOWER]] = x_scale.data_ptr(), x_lower.data_ptr()
    fixed[BIAS_AT] = bias.data_ptr() if product.has_bias else 0
    fixed[X_UNIT] = unit.data_ptr() if product.has_unit else 0
    return fixed, [held, weight, start, colsum]


class EdgeProduct(NamedTuple):
    """A product as a thread has it: numbers, and addresses of constants and scratch, so that calls copy no arrays."""

    weight: int
    start: int
    columns: int
    ranges: int
    valid: int
    of_rows: int
    codes: int
    stretch: int
    depth: int
    num_out: int
    pitch: int
    flip: int
    top: np.float32
    unit_inverse: np.float32  # 0 without multipliers


@njit
def open_product(fixed):
    """The product described by ``fixed``, and the array that its addresses are in."""
    num_in, num_out, bits, depth = fixed[NUM_IN], fixed[NUM_OUT], fixed[BITS], fixed[DEPTH]
    pitch, stretch = -(-num_in // GROUP) * GROUP, -(-num_out // LANES) * LANES
    sizes = (COLUMNS * stretch, NUM_RANGES * GROUP, GROUP, NUM_OF_ROWS * BLOCK_ROWS, BLOCK_ROWS * pitch // 4)
    owner = np.zeros(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4] + GROUP, np.float32)
    skipped = -(owner.ctypes.data // 4) % GROUP  # to the start of a cache line
    at = owner[skipped:]
    columns = at[: sizes[0]].reshape(COLUMNS, stretch)
    w_scale, w_lower = floats(fixed[W_SCALE], fixed[W_COUNT]), floats(fixed[W_LOWER], fixed[W_COUNT])
    bias = floats(fixed[BIAS_AT], num_out if fixed[BIAS_AT] else 0)
    for o in range(num_out):
        own = 0 if fixed[W_COUNT] == 1 else o
        columns[SCALE, o], columns[OFFSET, o] = w_scale[own], w_lower[own]
        if fixed[BIAS_AT]:
            columns[BIAS, o] = bias[o]
    fill_terms(columns, floats(fixed[COLSUM], num_out), np.float32(num_in))
    step, low = floats(fixed[X_SCALE], 1)[0], floats(fixed[X_LOWER], 1)[0]
    ranges = at[sizes[0] : sizes[0] + sizes[1]].reshape(NUM_RANGES, GROUP)
    for m in range(1, LARGEST_MULTIPLIER + 1):
        factor = np.float32(m)
        ranges[INVERSE, m] = np.float32(1) / (step * factor)
        ranges[STEP, m], ranges[LOW, m] = step * factor, low * factor
    valid = at[sizes[0] + sizes[1] :].view(np.int32)
    for f in range(GROUP):  # of the last features of a row
        valid[f] = -1 if pitch - GROUP + f < num_in else 0
    base = np.int64(owner.ctypes.data) + 4 * skipped
    ranges_at = base + 4 * sizes[0]
    valid_at = ranges_at + 4 * sizes[1]
    rows_at = valid_at + 4 * sizes[2]
    unit = fixed[X_UNIT]
    product = EdgeProduct(
        fixed[WEIGHT],
        fixed[START],
        base,
        ranges_at,
        valid_at,
        rows_at,
        rows_at + 4 * sizes[3],
        stretch,
        depth,
        num_out,
        pitch,
        np.int64(SIGN if bits == BITS_PER_BYTE else 0),
        np.float32((1 << bits) - 1),
        np.float32(1) / floats(unit, 1)[0] if unit else np.float32(0),
    )
    return owner, product


@njit(forceinline=True)
def _peak(x, base, pitch):
    """The largest absolute value of a row, NaN or infinity where there is any: compared as integers."""
    without_sign, peak = vsplat(WITHOUT_SIGN, GROUP), vsplat(0, GROUP)
    for f in range(0, pitch, GROUP):
        peak = vmax(vview(vload(x, base + f, GROUP), "i32") & without_sign, peak)
    return vtop(vview(peak, "f32"))


@njit(forceinline=True)
def _quantize(x, base, pitch, low, inverse, top, flip, codes, to, valid):
    """Codes of one row as bytes from ``codes[to]`` on, those behind the last feature zero; returns their sum."""
    lows, inverses = vsplat(low, GROUP), vsplat(inverse, GROUP)
    tops, flips = vsplat(top, GROUP), vsplat(flip, GROUP)
    total = vsplat(0, GROUP)
    last = pitch - GROUP
    for f in range(0, last, GROUP):
        c = quantize_group(vload(x, base + f, GROUP), lows, inverses, tops)
        total = total + c
        vstore(codes, to + f, vcast(c ^ flips, "u8"))
    c = quantize_group(vload(x, base + last, GROUP), lows, inverses, tops) & valid
    vstore(codes, to + last, vcast(c ^ flips, "u8"))
    return vsum(total + c)


def _tile_of(lanes: int):
    """Sums of products with ``lanes`` outputs, finished: a function of its own for each width."""

    @njit(forceinline=True)
    def finish(total, of_rows, r, columns, o, stretch, out, to, left):
        y = vcast(total, "f32")
        mass, factor = peek(of_rows, SUM * BLOCK_ROWS + r), peek(of_rows, ROW_STEP * BLOCK_ROWS + r)
        y = y * vload(columns, SCALE * stretch + o, lanes) + vsplat(mass, lanes) * vload(
            columns, OFFSET * stretch + o, lanes
        )
        y = y * vsplat(factor, lanes)
        low = peek(of_rows, ROW_LOW * BLOCK_ROWS + r)
        y = y + vload(columns, TERM * stretch + o, lanes) * vsplat(low, lanes)
        y = y + vload(columns, BIAS * stretch + o, lanes)
        if left >= lanes:
            vstore(out, to + o, y)
        else:
            vstore_first(out, to + o, y, left)

    @njit(forceinline=True)
    def tile(codes, pitch, rows, weight, depth, begin, of_rows, columns, o, stretch, out, first, num_out):
        left = num_out - o
        for r in range(0, rows, ROWS):
            at, to = r * pitch, (first + r) * num_out
            a = b = c = d = begin
            for k in range(depth):
                w = vload(weight, o * depth + k * lanes, lanes)
                a = vdot(a, w, vsplat(peek(codes, at + k), lanes))
                b = vdot(b, w, vsplat(peek(codes, at + pitch + k), lanes))
                c = vdot(c, w, vsplat(peek(codes, at + 2 * pitch + k), lanes))
                d = vdot(d, w, vsplat(peek(codes, at + 3 * pitch + k), lanes))
            finish(a, of_rows, r, columns, o, stretch, out, to, left)
            if r + 1 < rows:
                finish(b, of_rows, r + 1, columns, o, stretch, out, to + num_out, left)
            if r + 2 < rows:
                finish(c, of_rows, r + 2, columns, o, stretch, out, to + 2 * num_out, left)
            if r + 3 < rows:
                finish(d, of_rows, r + 3, columns, o, stretch, out, to + 3 * num_out, left)

    return tile


_whole_tile, _half_tile, _quarter_tile = _tile_of(LANES), _tile_of(HALF), _tile_of(QUARTER)


@jit.kernel
def run_product(product, x, out, rows, first):
    """Map the rows ``x[:rows]``, of :func:`.kept.pitch_of` numbers each and at most :data:`BLOCK_ROWS` of them, to the
    rows of ``out`` from ``first`` on; both are :func:`..cpu.simd.raw`.

    Returns whether all of ``x`` was finite; where it was not, the result is not written.
    """
    weight, start = raw_at(product.weight, np.int32), raw_at(product.start, np.int32)
    columns, ranges = raw_at(product.columns, np.float32), raw_at(product.ranges, np.float32)
    of_rows, codes = raw_at(product.of_rows, np.float32), raw_at(product.codes, np.uint8)
    lanes, valid = raw_at(product.codes, np.int32), vload(raw_at(product.valid, np.int32), 0, GROUP)
    pitch, stretch, depth, num_out = product.pitch, product.stretch, product.depth, product.num_out
    for r in range(rows):
        base = r * pitch
        peak = _peak(x, base, pitch)
        if not peak <= LARGEST:
            return False
        m = row_multiplier(peak, product.unit_inverse) if product.unit_inverse != np.float32(0) else np.int64(1)
        low, inverse = peek(ranges, LOW * GROUP + m), peek(ranges, INVERSE * GROUP + m)
        total = _quantize(x, base, pitch, low, inverse, product.top, product.flip, codes, base, valid)
        poke(of_rows, SUM * BLOCK_ROWS + r, total)
        poke(of_rows, ROW_STEP * BLOCK_ROWS + r, peek(ranges, STEP * GROUP + m))
        poke(of_rows, ROW_LOW * BLOCK_ROWS + r, low)
    o = 0
    while num_out - o > HALF + QUARTER and not NARROW:
        begin = vload(start, o, LANES)
        _whole_tile(
            lanes, pitch // 4, rows, weight, depth, begin, of_rows, columns, o, stretch, out, first, num_out
        )  # fmt: skip
        o += LANES
    if num_out - o > QUARTER and not NARROW:
        begin = vload(start, o, HALF)
        _half_tile(
            lanes, pitch // 4, rows, weight, depth, begin, of_rows, columns, o, stretch, out, first, num_out
        )  # fmt: skip
        o += HALF
    while num_out > o:
        begin = vload(start, o, QUARTER)
        _quarter_tile(
            lanes, pitch // 4, rows, weight, depth, begin, of_rows, columns, o, stretch, out, first, num_out
        )  # fmt: skip
        o += QUARTER
    return True
