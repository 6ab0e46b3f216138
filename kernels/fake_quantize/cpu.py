"""``fake_quantize`` and its backward on the CPU, one pass each; as codes: :mod:`.cpu_codes`."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..arithmetic import is_per_row
from ..cpu import jit
from ..cpu.epilogue import GROUP, flat
from ..cpu.memory import empty
from ..cpu.parallel import run_chunks
from ..cpu.simd import (
    atomic_add,
    peek,
    vcast,
    vload_first,
    vmax,
    vmin,
    vsplat,
    vstore_first,
    vwithin,
)
from ..layout import top_code
from . import fake_quantize_backward_reference, fake_quantize_reference
from .cpu_codes import codes, codes_backward

__all__ = ["fake_quantize", "fake_quantize_backward"]

BLOCK_ROWS = 64  # rows of a partial sum: fixed, so that sums do not depend on the threads


def _table(scale: Tensor, offset: Tensor, width: int) -> tuple[np.ndarray, bool]:
    """Scale, inverse and offset as ``[3, ceil16(F)]``, or ``[3, N]`` where a range is per row."""
    inverse = scale.reciprocal()
    if is_per_row(scale) or is_per_row(offset):
        rows = max(scale.numel(), offset.numel())
        parts = [value.reshape(-1).expand(rows) for value in (scale, inverse, offset)]
        return torch.stack(parts).contiguous().numpy(), True
    table = torch.zeros((3, -(-width // GROUP) * GROUP), dtype=torch.float32)
    for row, value in zip(table, (scale, inverse, offset), strict=True):
        row[:width] = value.reshape(-1)
    return table.numpy(), False


@njit(forceinline=True)
def _range(table, per_row, row, f):
    """``(scale, inverse, offset)`` of sixteen features of a row."""
    stretch = table.shape[1]
    if per_row:
        return (
            vsplat(peek(table, row), GROUP),
            vsplat(peek(table, stretch + row), GROUP),
            vsplat(peek(table, 2 * stretch + row), GROUP),
        )
    return (
        vload_first(table, f, GROUP, None),
        vload_first(table, stretch + f, GROUP, None),
        vload_first(table, 2 * stretch + f, GROUP, None),
    )


@njit(forceinline=True)
def _round(v, top):
    """``clamp(floor(v + 1/2), 0, top)`` in float lanes, NaN to 0."""
    half, zero = vsplat(np.float32(0.5), GROUP), vsplat(np.float32(0.0), GROUP)
    return vcast(vcast(vmin(vmax(v + half, zero), top), "i32"), "f32")


@jit.kernel
def _forward(x, width, table, per_row, qmax, out, bounds, counter):
    top = vsplat(np.float32(qmax), GROUP)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            for f in range(0, width, GROUP):
                scale, inverse, offset = _range(table, per_row, i, f)
                value = vload_first(x, i * width + f, GROUP, width - f)
                code = _round((value - offset) * inverse, top)
                vstore_first(out, i * width + f, code * scale + offset, width - f)


@jit.kernel
def _backward(grad, x, width, table, per_row, qmax, grad_x, sums, bounds, counter):
    """``sums`` is ``[2, blocks, ceil16(F)]``, or ``[2, N, 16]`` where the range is per row."""
    top, zero = vsplat(np.float32(qmax), GROUP), vsplat(np.float32(0.0), GROUP)
    half, pitch = sums.shape[1] * sums.shape[2], sums.shape[2]
    while True:
        block = atomic_add(counter, 0, 1)
        if block >= bounds.size - 1:
            break
        for i in range(bounds[block], bounds[block + 1]):
            for f in range(0, width, GROUP):
                _, inverse, offset = _range(table, per_row, i, f)
                value = vload_first(x, i * width + f, GROUP, width - f)
                g = vload_first(grad, i * width + f, GROUP, width - f)
                v = (value - offset) * inverse
                code = _round(v, top)
                inside = vwithin(v, zero, top, g, zero)
                vstore_first(grad_x, i * width + f, inside, width - f)
                at = i * pitch if per_row else block * pitch + f
                ds = vload_first(sums, at, GROUP, None) + g * vwithin(v, zero, top, code - v, code)
                dl = vload_first(sums, half + at, GROUP, None) + (g - inside)
                vstore_first(sums, at, ds, GROUP)
                vstore_first(sums, half + at, dl, GROUP)


def _blocks(rows: int) -> np.ndarray:
    return np.append(np.arange(0, rows, BLOCK_ROWS), rows)


def _has_codes(x: Tensor, scale: Tensor, offset: Tensor) -> bool:
    """Whether :mod:`.cpu_codes` knows the range: not one per column."""
    shared = scale.numel() == 1 and offset.numel() == 1
    return x.numel() > 0 and (shared or (scale.dim() >= 2 and scale.shape == offset.shape))


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor, bits: int, as_codes: bool = False) -> Tensor:
    if as_codes:
        known = _has_codes(x, scale, offset)
        return codes(x, scale, offset, bits) if known else fake_quantize_reference(x, scale, offset, bits, True)
    rows, width = x.shape
    out = empty((rows, width), torch.float32)
    if out.numel():
        table, per_row = _table(scale.detach(), offset.detach(), width)
        args = (flat(x), width, table, per_row, top_code(bits), flat(out))
        run_chunks(_forward, _blocks(rows), *args)
    return out


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, bits: int, as_codes: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    if as_codes:
        if _has_codes(x, scale, offset):
            return codes_backward(grad, x, scale, offset, bits)
        return fake_quantize_backward_reference(grad, x, scale, offset, bits, True)
    rows, width = x.shape
    grad_x = empty((rows, width), torch.float32)
    if not grad_x.numel():
        return grad_x, torch.zeros_like(scale), torch.zeros_like(offset)
    table, per_row = _table(scale.detach(), offset.detach(), width)
    bounds = _blocks(rows)
    shape = (2, rows, GROUP) if per_row else (2, bounds.size - 1, table.shape[1])
    sums = np.zeros(shape, np.float32)
    args = (flat(grad), flat(x), width, table, per_row, top_code(bits), flat(grad_x), sums)
    run_chunks(_backward, bounds, *args)
    total = sums.sum(2 if per_row else 1, dtype=np.float64)[:, : rows if per_row else width]
    return grad_x, _shaped(total[0], scale), _shaped(total[1], offset)


def _shaped(total: np.ndarray, like: Tensor) -> Tensor:
    """Second stage of the reduction: to one element, or the shape of the range."""
    value = torch.from_numpy(total)
    if like.numel() == 1:
        value = value.sum()
    return value.to(torch.float32).reshape(like.shape)
