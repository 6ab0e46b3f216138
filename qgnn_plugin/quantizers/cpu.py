"""Single-pass CPU kernels of :mod:`.functional` for ranges per tensor or per row.

The forward pass is bitwise that of the reference.  Nothing depends on the number of threads or on where buffers lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cpu import jit
from ..kernels.cpu.parallel import even_chunks, run_chunks
from ..kernels.cpu.simd import atomic_add

__all__ = ["codes", "codes_backward", "supports"]

CHUNK = 1 << 14
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
def _gradient(
    grad: Any, x: Any, width: int, inverse: Any, lower: Any, qmax: Any, grad_x: Any, bounds: Any, counter: Any
) -> None:
    per_row = inverse.size > 1
    top, zero = x.dtype.type(qmax), x.dtype.type(0)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            a, b = (inverse[i], lower[i]) if per_row else (inverse[0], lower[0])
            for k in range(i * width, min((i + 1) * width, x.size)):
                v = (x[k] - b) * a
                grad_x[k] = grad[k] * a if (v >= zero) & (v <= top) else zero


@jit.kernel
def _sums(grad_x: Any, x: Any, width: int, inverse: Any, lower: Any, sums: Any, bounds: Any, counter: Any) -> None:
    # Eight running sums by position: the order of additions is fixed, and they still fill a vector.
    per_row = inverse.size > 1
    total, weighted = np.empty(8, x.dtype), np.empty(8, x.dtype)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for i in range(bounds[chunk], bounds[chunk + 1]):
            a, b = (inverse[i], lower[i]) if per_row else (inverse[0], lower[0])
            total[:] = 0
            weighted[:] = 0
            begin, end = i * width, min((i + 1) * width, x.size)
            whole = begin + (end - begin) // 8 * 8
            for k in range(begin, whole, 8):
                for lane in range(8):
                    g = grad_x[k + lane]
                    total[lane] += g
                    # Outside the range g is 0; v may be infinite there, and 0 times that is not a number.
                    weighted[lane] += g * ((x[k + lane] - b) * a) if g != 0 else g
            for k in range(whole, end):
                g = grad_x[k]
                total[k - whole] += g
                weighted[k - whole] += g * ((x[k] - b) * a) if g != 0 else g
            sums[i, 0] = weighted.sum()
            sums[i, 1] = total.sum()


def supports(x: Tensor, scale: Tensor, lower: Tensor) -> bool:
    """Whether ``x`` is on the CPU in float32 or float64, and the range is per tensor or per row."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.numel() == 0:
        return False
    if torch.compiler.is_compiling() or scale.dtype != x.dtype or lower.dtype != x.dtype:
        return False
    per_row = x.dim() >= 2 and scale.shape == (*x.shape[:-1], 1)
    return lower.shape == scale.shape and (scale.numel() == 1 or per_row)


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(-1).numpy()


def _prepare(x: Tensor, scale: Tensor, lower: Tensor) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Length of a row (a chunk of fixed length where one range serves all), inverse scale, lower end, rows per task."""
    width = x.size(-1) if scale.numel() > 1 else CHUNK
    bounds = even_chunks(-(-x.numel() // width), -(-width // COST))
    return width, _flat(1 / scale.detach()), _flat(lower), bounds


def codes(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    """See :func:`qgnn_plugin.quantizers.functional.quantize_codes`."""
    width, inverse, low, bounds = _prepare(x, scale, lower)
    out = torch.empty(x.shape, dtype=x.dtype)
    run_chunks(_codes, bounds, _flat(x), width, inverse, low, qmax, _flat(out))
    return out


def codes_backward(grad: Tensor, x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and lower end; partial sums are added in a fixed order."""
    width, inverse, low, bounds = _prepare(x, scale, lower)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    values, result = _flat(x), _flat(grad_x)
    run_chunks(_gradient, bounds, _flat(grad), values, width, inverse, low, qmax, result)
    sums = torch.empty((-(-x.numel() // width), 2), dtype=x.dtype)
    run_chunks(_sums, bounds, result, values, width, inverse, low, sums.numpy())
    if scale.numel() == 1:
        sums = sums.double().sum(0, keepdim=True).to(x.dtype)
    return grad_x, -sums[:, 0].reshape(scale.shape), -sums[:, 1].reshape(lower.shape)
