"""What follows a product on Triton, from the registers that it was added up in: the canonical epilogue, codes, and dot
products of heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.bits import load_range
from ..triton.epilogue import part_peak, quantize, relu, row_multipliers

__all__ = ["MOST_VECTORS", "finish"]

LANES = tl.constexpr(16)  # arithmetic.DOT_LANES
MOST_VECTORS = 2  # of a fused kernel, which says everything once for each


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    y, other, row, row_ok, column, column_ok, bias, row_scale, addend, vectors, dots, out, out_scale, out_offset,
    out_unit, out_multiplier, num_rows, num_out, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    RELU: tl.constexpr, OUT_BITS: tl.constexpr, OUT_BYTES: tl.constexpr, OUT_SCALE: tl.constexpr,
    OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr, HEADS: tl.constexpr, VECTORS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Bias, ``other`` values, addend, ReLU, the row's factor, dot products of heads with vectors, and either floats or
    codes.
    """
    if bias is not None:
        y = y + tl.load(bias + column, mask=column_ok, other=0.0)[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    row64 = row.to(tl.int64)[:, None]
    if other is not None:
        y = y + other
    if addend is not None:
        y = y + tl.load(addend + row64 * num_out + column[None, :], mask=ok, other=0.0)
    if RELU:
        y = relu(y)
    if row_scale is not None:
        y = y * tl.load(row_scale + row, mask=row_ok, other=0.0)[:, None]
    for v in tl.static_range(VECTORS):
        a = tl.load(vectors + v * y.shape[1] + column)
        _store_dots(y * a[None, :], dots + tl.cast(v, tl.int64) * num_rows * HEADS, row, row_ok, HEADS)
    if OUT_BITS == 0:
        tl.store(out + row64 * num_out + column[None, :], y, mask=ok)
    else:
        parts: tl.constexpr = 8 // OUT_BITS
        scale = load_range(out_scale, OUT_SCALE, row, row_ok, column, column_ok)
        start = load_range(out_offset, OUT_OFFSET, row, row_ok, column, column_ok)
        if out_unit is not None:
            peak = part_peak(y, column_ok)
            times = row_multipliers(peak, out_unit, LARGEST)
            tl.store(out_multiplier + row, times.to(tl.uint8), mask=row_ok)
            scale, start = scale * times[:, None], start * times[:, None]
        codes = quantize(y, scale, start, OUT_BITS)
        if not WHOLE:
            codes = tl.where(column_ok[None, :], codes, 0)
        codes = tl.reshape(codes, [BLOCK_M, GROUPS, parts, WIDTH // GROUPS])
        lanes = tl.sum(codes << (OUT_BITS * tl.arange(0, parts))[None, None, :, None], 2)
        lanes = tl.reshape(lanes, [BLOCK_M, WIDTH])
        byte = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        byte_ok = row_ok[:, None]
        if not WHOLE:
            byte_ok = byte_ok & (byte < OUT_BYTES)[None, :]
        tl.store(out + row64 * OUT_BYTES + byte[None, :], lanes.to(tl.int8), mask=byte_ok)


@triton.jit
def _store_dots(products, target, row, row_ok, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the heads of ``[ROWS, F]``, in the order of :func:`..head_dots.head_dots_reference`: a lane adds up its
    groups one after the other, then lanes fold by halves.
    """
    rows: tl.constexpr = products.shape[0]
    width: tl.constexpr = products.shape[1] // HEADS
    lanes: tl.constexpr = width if width < LANES else LANES
    total = tl.zeros([rows, HEADS, lanes], tl.float32)
    groups = _groups(tl.reshape(products, [rows, HEADS, width // lanes, lanes]))
    for i in tl.static_range(width // lanes):
        total += tl.reshape(groups[i], [rows, HEADS, lanes])
    if lanes >= 16:
        total = _fold(total)
    if lanes >= 8:
        total = _fold(total)
    if lanes >= 4:
        total = _fold(total)
    if lanes >= 2:
        total = _fold(total)
    head = tl.arange(0, HEADS)
    tl.store(
        target + row.to(tl.int64)[:, None] * HEADS + head[None, :], tl.reshape(total, [rows, HEADS]),
        mask=row_ok[:, None],
    )  # fmt: skip


@triton.jit
def _groups(x):
    """``[ROWS, HEADS, GROUPS, LANES]`` as a tuple of its groups, in their order."""
    tl.static_assert(x.shape[2] <= 32)
    groups = (x,)
    for _ in tl.static_range(5):
        if groups[0].shape[2] > 1:
            halves = ()
            for i in tl.static_range(len(groups)):
                halves += _halves(groups[i])
            groups = halves  # type: ignore[assignment]
    return groups


@triton.jit
def _halves(x):
    """The first and the second half of the groups."""
    pair = tl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2, x.shape[3]])
    return tl.split(tl.permute(pair, (0, 1, 3, 4, 2)))


@triton.jit
def _fold(x):
    """The upper half of the lanes added to the lower one: of two numbers, in whatever order."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2]), 2)
