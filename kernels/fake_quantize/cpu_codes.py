"""Codes of ``fake_quantize`` on the CPU, forward and backward in one pass each, for ranges per tensor or per row.

The forward pass is bitwise that of the reference.  Nothing depends on the number of threads or on where buffers lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu import jit
from ..cpu.epilogue import GROUP, quantize_group
from ..cpu.memory import array_of
from ..cpu.parallel import even_chunks, run_chunks
from ..cpu.simd import atomic_add, peek, vcast, vload_first, vsplat, vstore, vstore_first, vwithin
from ..layout import top_code
from . import passed

__all__ = ["codes", "codes_backward"]

CHUNK = 1 << 14
LANES = GROUP  # partial sums of a row
COST = 8  # elements that cost as much as an edge of a sparse kernel, the unit of `even_chunks`


@jit.kernel
def _codes(x: Any, width: int, inverse: Any, lower: Any, qmax: Any, out: Any, bounds: Any, counter: Any) -> None:
    per_row = inverse.size > 1
    half, top, zero = x.dtype.type(0.5), x.dtype.type(qmax), x.dtype.type(0)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            a, b = (inverse[i], lower[i]) if per_row else (inverse[0], lower[0])
            for k in range(i * width, min((i + 1) * width, x.size)):
                c = np.floor((x[k] - b) * a + half)
                out[k] = min(max(c, zero), top)


@jit.kernel
def _codes_float32(
    x: Any, width: int, inverse: Any, lower: Any, qmax: Any, out: Any, bounds: Any, counter: Any
) -> None:
    """:func:`_codes` on explicit vectors."""
    per_row = inverse.size > 1
    top = vsplat(np.float32(qmax), LANES)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            at = i if per_row else 0
            a, b = vsplat(peek(inverse, at), LANES), vsplat(peek(lower, at), LANES)
            end = min((i + 1) * width, x.size)
            for k in range(i * width, end, LANES):
                code = quantize_group(vload_first(x, k, LANES, end - k), b, a, top)
                vstore_first(out, k, vcast(code, "f32"), end - k)


@jit.kernel
def _gradients(
    grad: Any,
    x: Any,
    width: int,
    inverse: Any,
    lower: Any,
    ends: Any,
    grad_x: Any,
    sums: Any,
    bounds: Any,
    counter: Any,
) -> None:
    """``grad_x``, and :data:`LANES` partial sums of ``grad_x * v`` and of ``grad_x`` per row."""
    per_row = inverse.size > 1
    least, most, zero = ends[0], ends[1], x.dtype.type(0)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            a, b = (inverse[i], lower[i]) if per_row else (inverse[0], lower[0])
            for k in range(i * width, min((i + 1) * width, x.size)):
                v = (x[k] - b) * a
                inside = (v >= least) & (v <= most)
                g = grad[k] * a if inside else zero
                grad_x[k] = g
                lane = (k - i * width) % LANES
                # Outside the range g is 0; v may be infinite there, and 0 times that is not a number.
                sums[i, 0, lane] += g * v if inside else zero
                sums[i, 1, lane] += g


@jit.kernel
def _gradients_float32(
    grad: Any,
    x: Any,
    width: int,
    inverse: Any,
    lower: Any,
    ends: Any,
    grad_x: Any,
    sums: Any,
    bounds: Any,
    counter: Any,
) -> None:
    """:func:`_gradients` on explicit vectors, the same operations in the same order."""
    per_row = inverse.size > 1
    least, most, zero = vsplat(ends[0], LANES), vsplat(ends[1], LANES), vsplat(np.float32(0), LANES)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            at = i if per_row else 0
            a, b = vsplat(peek(inverse, at), LANES), vsplat(peek(lower, at), LANES)
            weighted = total = zero
            end = min((i + 1) * width, x.size)
            for k in range(i * width, end, LANES):
                v = (vload_first(x, k, LANES, end - k) - b) * a
                g = vwithin(v, least, most, vload_first(grad, k, LANES, end - k) * a, zero)
                vstore_first(grad_x, k, g, end - k)
                weighted = weighted + g * vwithin(v, least, most, v, zero)
                total = total + g
            vstore(sums, 2 * LANES * i, weighted)
            vstore(sums, 2 * LANES * i + LANES, total)


def _flat(x: Tensor) -> np.ndarray:
    return array_of(x.detach().contiguous().view(-1))


def _prepare(x: Tensor, scale: Tensor, lower: Tensor) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Length of a row (a chunk of fixed length where one range serves all), inverse scale, lower end, rows per task."""
    width = x.size(-1) if scale.numel() > 1 else CHUNK
    bounds = even_chunks(-(-x.numel() // width), -(-width // COST))
    return width, _flat(scale.detach().reciprocal()), _flat(lower), bounds


def codes(x: Tensor, scale: Tensor, lower: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` ``[*, F]``, in its dtype; the range is of one element or ``[*, 1]``, in the same dtype."""
    width, inverse, low, bounds = _prepare(x, scale, lower)
    out = torch.empty(x.shape, dtype=x.dtype)
    kernel = _codes_float32 if x.dtype == torch.float32 else _codes
    run_chunks(kernel, bounds, _flat(x), width, inverse, low, top_code(bits), _flat(out))
    return out


def codes_backward(grad: Tensor, x: Tensor, scale: Tensor, lower: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, scale and lower end; partial sums are added in a fixed order."""
    width, inverse, low, bounds = _prepare(x, scale, lower)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    explicit = x.dtype == torch.float32
    ends = np.array(passed(top_code(bits)), array_of(x[:0].detach()).dtype)
    lanes = (torch.empty if explicit else torch.zeros)((-(-x.numel() // width), 2, LANES), dtype=x.dtype)
    kernel = _gradients_float32 if explicit else _gradients
    run_chunks(kernel, bounds, _flat(grad), _flat(x), width, inverse, low, ends, _flat(grad_x), lanes.numpy())
    sums = lanes.sum(-1)
    if scale.numel() == 1:
        sums = sums.double().sum(0, keepdim=True).to(x.dtype)
    grad_lower = -sums[:, 1].reshape(lower.shape)
    return grad_x, grad_lower * 0.5 if bits == 1 else -sums[:, 0].reshape(scale.shape), grad_lower
