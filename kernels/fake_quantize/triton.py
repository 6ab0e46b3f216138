"""``fake_quantize`` on Triton, forward and backward.

The backward reduces the range gradients in two stages, so that no atomic decides the order of a
sum: every program writes one partial result per range entry it touches, and a second reduction in a
fixed order adds them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import next_power_of_two
from ..triton.bits import COLUMN, ONE
from ..triton.epilogue import quantize
from ..triton.launch import UNSPECIALIZED, check_devices, config_for, launch
from ..triton.ranges import range_kind

__all__ = [
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_backward_kernel",
    "fake_quantize_kernel",
]

TILE = 2048  # elements of a program's tile
MAX_COLUMNS = 256


@triton.jit
def _range(ptr, kind: tl.constexpr, row, row_ok, column, column_ok):  # type: ignore[no-untyped-def]
    """A range tensor broadcast to ``[ROWS, COLUMNS]``."""
    if kind == ONE:
        value = tl.load(ptr)
    elif kind == COLUMN:
        value = tl.load(ptr + column, mask=column_ok, other=1.0)[None, :]
    else:
        value = tl.load(ptr + row, mask=row_ok, other=1.0)[:, None]
    return value


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fake_quantize_kernel(  # type: ignore[no-untyped-def]
    x, scale, offset, out, num_rows, num_columns,
    BITS: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """``x^ = c s + l`` with ``c = clamp(floor((x - l) / s + 1/2), 0, Q)``, or the ``CODES`` themselves."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < num_rows, column < num_columns
    ok = row_ok[:, None] & column_ok[None, :]
    at = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    s = _range(scale, SCALE, row, row_ok, column, column_ok)
    start = _range(offset, OFFSET, row, row_ok, column, column_ok)
    codes = quantize(tl.load(x + at, mask=ok, other=0.0), s, start, BITS).to(tl.float32)
    tl.store(out + at, codes if CODES else codes * s + start, mask=ok)


@triton.jit
def _store_partial(  # type: ignore[no-untyped-def]
    value, out, kind: tl.constexpr, row, row_ok, column, column_ok, num_rows, num_columns
):
    """Sum a tile over the axes that a range lacks; one entry per program and range entry."""
    if kind == ONE:
        index = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(out + index, tl.sum(tl.sum(value, 1), 0))
    elif kind == COLUMN:
        index = tl.program_id(0).to(tl.int64) * num_columns + column
        tl.store(out + index, tl.sum(value, 0), mask=column_ok)
    else:
        index = tl.program_id(1).to(tl.int64) * num_rows + row
        tl.store(out + index, tl.sum(value, 1), mask=row_ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fake_quantize_backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, scale, offset, grad_x, partial_scale, partial_offset, num_rows, num_columns,
    BITS: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    r"""With ``v = (x - l) / s``: ``dx = g [0 <= v <= Q]``, ``ds = g (c - v)`` inside and ``g c``
    outside, ``dl = g`` outside; of ``CODES`` ``dx = g / s``, ``ds = -dx v`` and ``dl = -dx`` where gradients pass.
    """
    top: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < num_rows, column < num_columns
    ok = row_ok[:, None] & column_ok[None, :]
    at = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    s = _range(scale, SCALE, row, row_ok, column, column_ok)
    start = _range(offset, OFFSET, row, row_ok, column, column_ok)
    g = tl.load(grad + at, mask=ok, other=0.0)
    inverse = tl.div_rn(1.0, s)
    v = (tl.load(x + at, mask=ok, other=0.0) - start) * inverse
    if CODES:
        margin: tl.constexpr = 0.5 if BITS == 1 else 0.0  # as `passed` has it
        inside = (v >= -margin) & (v <= top + margin)
        g = tl.where(inside, g * inverse, 0.0)
        tl.store(grad_x + at, g, mask=ok)
        grad_scale = -g * (0.5 if BITS == 1 else tl.where(inside, v, 0.0))
        grad_offset = -g
    else:
        inside = (v >= 0) & (v <= top)
        codes = tl.floor(v + 0.5)
        codes = tl.where(codes < 0, 0.0, tl.where(codes > top, top * 1.0, codes))  # keeps NaN
        tl.store(grad_x + at, tl.where(inside, g, 0.0), mask=ok)
        grad_scale = g * tl.where(inside, codes - v, codes)
        grad_offset = tl.where(inside, 0.0, g)
    _store_partial(
        tl.where(ok, grad_scale, 0.0), partial_scale, SCALE, row, row_ok, column, column_ok,
        num_rows, num_columns,
    )  # fmt: skip
    _store_partial(
        tl.where(ok, grad_offset, 0.0), partial_offset, OFFSET, row, row_ok, column,
        column_ok, num_rows, num_columns,
    )  # fmt: skip


def tile_shape(num_columns: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(MAX_COLUMNS, next_power_of_two(num_columns))
    return TILE // columns, columns


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor, bits: int, as_codes: bool = False) -> Tensor:
    device = check_devices(x, scale, offset)
    x = x.contiguous()
    out = torch.empty_like(x)
    num_rows, num_columns = x.shape
    rows, columns = tile_shape(num_columns)
    launch(
        fake_quantize_kernel,
        (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns)), device,
        x, scale.contiguous(), offset.contiguous(), out, num_rows, num_columns,
        BITS=bits, CODES=as_codes, ROWS=rows, COLUMNS=columns, SCALE=range_kind(scale), OFFSET=range_kind(offset),
        num_warps=config_for("elementwise", device, num_columns).num_warps,
    )  # fmt: skip
    return out


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, bits: int, as_codes: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    device = check_devices(grad, x, scale, offset)
    grad, x = grad.contiguous(), x.contiguous()
    num_rows, num_columns = x.shape
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(scale), torch.zeros_like(offset)
    rows, columns = tile_shape(num_columns)
    grid = triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns)

    def partial(like: Tensor) -> Tensor:
        stages = (grid[0] * grid[1], grid[0], grid[1])[range_kind(like)]
        return x.new_empty((stages, like.numel()))

    partial_scale, partial_offset = partial(scale), partial(offset)
    launch(
        fake_quantize_backward_kernel, grid, device,
        grad, x, scale.contiguous(), offset.contiguous(), grad_x, partial_scale, partial_offset,
        num_rows, num_columns, BITS=bits, CODES=as_codes, ROWS=rows, COLUMNS=columns, SCALE=range_kind(scale),
        OFFSET=range_kind(offset),
        num_warps=config_for("elementwise", device, num_columns).num_warps,
    )  # fmt: skip
    return (
        grad_x,
        partial_scale.sum(0).reshape(scale.shape),
        partial_offset.sum(0).reshape(offset.shape),
    )
