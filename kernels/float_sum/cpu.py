"""Sums of float32 rows over neighbourhoods, the products of training, with accumulators in registers."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba.core.typing.templates import signature
from numba.extending import intrinsic
from torch import Tensor

from ..cpu import jit
from ..cpu.memory import array_of, empty
from ..cpu.parallel import row_chunks, run_chunks
from ..cpu.simd import Vector, atomic_add, peek, vfma, vload, vload_first, vsplat, vstore, vstore_first
from . import edge_dots_reference, float_sum_reference, segment_largest_reference

__all__ = ["edge_dots", "float_sum", "segment_largest"]

LANES = 16
TILE = 4 * LANES


@jit.kernel
def _sum(rowptr, col, x, width, out, bounds, counter):
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            begin, end = peek(rowptr, i), peek(rowptr, i + 1)
            k = 0
            while k + TILE <= width:
                a, b, c, d = (
                    vsplat(0.0, LANES),
                    vsplat(0.0, LANES),
                    vsplat(0.0, LANES),
                    vsplat(0.0, LANES),
                )
                for e in range(begin, end):
                    row = np.int64(peek(col, e)) * width + k
                    a = a + vload(x, row, LANES)
                    b = b + vload(x, row + LANES, LANES)
                    c = c + vload(x, row + 2 * LANES, LANES)
                    d = d + vload(x, row + 3 * LANES, LANES)
                vstore(out, i * width + k, a)
                vstore(out, i * width + k + LANES, b)
                vstore(out, i * width + k + 2 * LANES, c)
                vstore(out, i * width + k + 3 * LANES, d)
                k += TILE
            while k < width:
                a = vsplat(0.0, LANES)
                for e in range(begin, end):
                    a = a + vload_first(x, np.int64(peek(col, e)) * width + k, LANES, width - k)
                vstore_first(out, i * width + k, a, width - k)
                k += LANES


@jit.kernel
def _sum_weighted(rowptr, col, edge, weight, heads, x, width, out, bounds, counter):
    # ``width`` is that of one head; ``edge`` names the row of ``weight`` at each position.
    stride = heads * width
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            begin, end = peek(rowptr, i), peek(rowptr, i + 1)
            for h in range(heads):
                k = 0
                while k + TILE <= width:
                    a, b, c, d = (
                        vsplat(0.0, LANES),
                        vsplat(0.0, LANES),
                        vsplat(0.0, LANES),
                        vsplat(0.0, LANES),
                    )
                    for e in range(begin, end):
                        w = vsplat(peek(weight, peek(edge, e) * heads + h), LANES)
                        row = np.int64(peek(col, e)) * stride + h * width + k
                        a = vfma(vload(x, row, LANES), w, a)
                        b = vfma(vload(x, row + LANES, LANES), w, b)
                        c = vfma(vload(x, row + 2 * LANES, LANES), w, c)
                        d = vfma(vload(x, row + 3 * LANES, LANES), w, d)
                    target = i * stride + h * width + k
                    vstore(out, target, a)
                    vstore(out, target + LANES, b)
                    vstore(out, target + 2 * LANES, c)
                    vstore(out, target + 3 * LANES, d)
                    k += TILE
                while k < width:
                    a = vsplat(0.0, LANES)
                    for e in range(begin, end):
                        w = vsplat(peek(weight, peek(edge, e) * heads + h), LANES)
                        row = np.int64(peek(col, e)) * stride + h * width + k
                        a = vfma(vload_first(x, row, LANES, width - k), w, a)
                    vstore_first(out, i * stride + h * width + k, a, width - k)
                    k += LANES


@intrinsic(prefer_literal=True)
def _pair(typingctx, weights, first):
    """Lanes ``first`` and ``first + 1`` of eight, each eight times: the weights of two heads of eight features."""
    target = Vector("f32", LANES)

    def codegen(context, builder, sig, args):
        order = [first.literal_value] * 8 + [first.literal_value + 1] * 8
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), order)
        return builder.shuffle_vector(args[0], args[0], mask)

    return signature(target, weights, first), codegen


@jit.kernel
def _sum_eights(rowptr, col, edge, weight, heads, x, out, bounds, counter):
    # Heads of eight features, eight of them at a time: one load of weights serves four vectors.
    stride = heads * 8
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            begin, end = peek(rowptr, i), peek(rowptr, i + 1)
            for h in range(0, heads, 8):
                a, b, c, d = (
                    vsplat(0.0, LANES),
                    vsplat(0.0, LANES),
                    vsplat(0.0, LANES),
                    vsplat(0.0, LANES),
                )
                for e in range(begin, end):
                    w = vload(weight, peek(edge, e) * heads + h, 8)
                    row = np.int64(peek(col, e)) * stride + 8 * h
                    a = vfma(vload(x, row, LANES), _pair(w, 0), a)
                    b = vfma(vload(x, row + LANES, LANES), _pair(w, 2), b)
                    c = vfma(vload(x, row + 2 * LANES, LANES), _pair(w, 4), c)
                    d = vfma(vload(x, row + 3 * LANES, LANES), _pair(w, 6), d)
                target = i * stride + 8 * h
                vstore(out, target, a)
                vstore(out, target + LANES, b)
                vstore(out, target + 2 * LANES, c)
                vstore(out, target + 3 * LANES, d)


@jit.kernel
def _edge_dots(rowptr, col, heads, grad, x, width, out, bounds, counter):
    stride = heads * width
    lanes = np.empty(LANES, np.float32)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            for e in range(peek(rowptr, i), peek(rowptr, i + 1)):
                for h in range(heads):
                    left = i * stride + h * width
                    right = np.int64(peek(col, e)) * stride + h * width
                    a, k = vsplat(0.0, LANES), 0
                    while k + LANES <= width:
                        a = vfma(vload(grad, left + k, LANES), vload(x, right + k, LANES), a)
                        k += LANES
                    if k < width:
                        rest = width - k
                        a = vfma(vload_first(grad, left + k, LANES, rest), vload_first(x, right + k, LANES, rest), a)
                    vstore(lanes, 0, a)
                    out[e, h] = lanes.sum()


@jit.kernel
def _largest(rowptr, x, empty, out):
    """``out[i, h]``: the largest of ``x[e, h]`` over the rows ``e`` of segment ``i``, or ``empty``."""
    for i in range(rowptr.size - 1):
        for h in range(x.shape[1]):
            out[i, h] = empty
        if rowptr[i] < rowptr[i + 1]:
            for h in range(x.shape[1]):
                out[i, h] = x[rowptr[i], h]
        for e in range(rowptr[i] + 1, rowptr[i + 1]):
            for h in range(x.shape[1]):
                out[i, h] = max(out[i, h], x[e, h])


def _array(tensor: Tensor) -> np.ndarray:
    return array_of(tensor.detach().contiguous())


def _reads(tensor: Tensor) -> bool:
    """Whether kernels here take it: float32, and not empty."""
    return tensor.dtype == torch.float32 and tensor.numel() > 0


def float_sum(
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    dst_scale: Tensor | None = None,
    src_scale: Tensor | None = None,
    weight: Tensor | None = None,
    edge: Tensor | None = None,
) -> Tensor:
    if not _reads(x) or rowptr.numel() == 1:
        return float_sum_reference(x, rowptr, col, dst_scale, src_scale, weight, edge)
    out = empty((rowptr.numel() - 1, x.size(1)), torch.float32)
    if src_scale is not None:
        x = x * src_scale.unsqueeze(1)
    pointers, sources = _array(rowptr), _array(col)
    if weight is None:
        run_chunks(_sum, row_chunks(pointers), pointers, sources, _array(x), x.size(1), out.numpy())
    else:
        edge = torch.arange(col.numel()) if edge is None else edge
        _weighted(pointers, sources, _array(edge), _array(weight), _array(x), out.numpy())
    return out if dst_scale is None else out.mul_(dst_scale.unsqueeze(1))


def _weighted(
    rowptr: np.ndarray, col: np.ndarray, edge: np.ndarray, weight: np.ndarray, x: np.ndarray, out: np.ndarray
) -> None:
    heads = weight.shape[1]
    width = x.shape[1] // heads
    if width == 8 and heads % 8 == 0:
        run_chunks(_sum_eights, row_chunks(rowptr), rowptr, col, edge, weight, heads, x, out)
    else:
        run_chunks(_sum_weighted, row_chunks(rowptr), rowptr, col, edge, weight, heads, x, width, out)


def edge_dots(a: Tensor, b: Tensor, rowptr: Tensor, col: Tensor, heads: int = 1) -> Tensor:
    if not _reads(a) or col.numel() == 0:
        return edge_dots_reference(a, b, rowptr, col, heads)
    out = empty((col.numel(), heads), torch.float32)
    pointers, width = _array(rowptr), a.size(1) // heads
    run_chunks(
        _edge_dots, row_chunks(pointers), pointers, _array(col), heads, _array(a), _array(b), width, out.numpy()
    )
    return out


def segment_largest(values: Tensor, rowptr: Tensor, fill: float = 0.0) -> Tensor:
    if not _reads(values):
        return segment_largest_reference(values, rowptr, fill)
    out = empty((rowptr.numel() - 1, values.size(1)), torch.float32)
    _largest(_array(rowptr), _array(values), fill, out.numpy())
    return out
