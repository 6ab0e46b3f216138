"""Single-pass CPU kernels of :mod:`.functional` for ranges per tensor or per row, bitwise the same in the forward pass."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["codes", "codes_backward", "supports"]

CHUNK = 1 << 14


@numba.njit(parallel=True, cache=True, nogil=True)
def _codes(x: Any, width: int, inverse: Any, lower: Any, qmax: Any, out: Any) -> None:
    # No fastmath: a contracted multiply-add would round differently from the reference.
    per_row = inverse.size > 1
    half, top, zero = x.dtype.type(0.5), x.dtype.type(qmax), x.dtype.type(0)
    for i in numba.prange((x.size + width - 1) // width):
        a, b = (inverse[i], lower[i]) if per_row else (inverse[0], lower[0])
        for k in range(i * width, min((i + 1) * width, x.size)):
            c = np.floor((x[k] - b) * a + half)
            out[k] = min(max(c, zero), top)


@numba.njit(parallel=True, fastmath={"reassoc", "nsz"}, cache=True, nogil=True)
def _backward(grad: Any, x: Any, width: int, inverse: Any, lower: Any, qmax: Any, grad_x: Any, sums: Any) -> None:
    per_row = inverse.size > 1
    top, zero = x.dtype.type(qmax), x.dtype.type(0)
    for i in numba.prange((x.size + width - 1) // width):
        a, b = (inverse[i], lower[i]) if per_row else (inverse[0], lower[0])
        total, weighted = zero, zero
        for k in range(i * width, min((i + 1) * width, x.size)):
            v = (x[k] - b) * a
            inside = (v >= zero) & (v <= top)
            g = grad[k] * a if inside else zero
            v = v if inside else zero  # far outside the range v overflows, and 0 * inf is not 0
            grad_x[k] = g
            total += g
            weighted += g * v
        sums[i, 0] = weighted
        sums[i, 1] = total


def supports(x: Tensor, scale: Tensor, lower: Tensor) -> bool:
    """Whether ``x`` is on the CPU, in float32 or float64, and the range is per tensor or per row of its last dimension."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.numel() == 0:
        return False
    if torch.compiler.is_compiling() or scale.dtype != x.dtype or lower.dtype != x.dtype:
        return False
    per_row = x.dim() >= 2 and scale.shape == (*x.shape[:-1], 1)
    return lower.shape == scale.shape and (scale.numel() == 1 or per_row)


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(-1).numpy()


def _prepare(x: Tensor, scale: Tensor, lower: Tensor) -> tuple[int, np.ndarray, np.ndarray]:
    """Length of a row (a chunk of fixed length where one range serves all), inverse scale and lower end."""
    numba.set_num_threads(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))
    width = x.size(-1) if scale.numel() > 1 else CHUNK
    return width, _flat(1 / scale.detach()), _flat(lower)


def codes(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    """See :func:`qgnn_plugin.quantizers.functional.quantize_codes`."""
    width, inverse, low = _prepare(x, scale, lower)
    out = torch.empty(x.shape, dtype=x.dtype)
    _codes(_flat(x), width, inverse, low, qmax, _flat(out))
    return out


def codes_backward(grad: Tensor, x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and lower end; partial sums are added in a fixed order, whatever the thread count."""
    width, inverse, low = _prepare(x, scale, lower)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    sums = torch.empty((-(-x.numel() // width), 2), dtype=x.dtype)
    _backward(_flat(grad), _flat(x), width, inverse, low, qmax, _flat(grad_x), sums.numpy())
    if scale.numel() == 1:
        sums = sums.double().sum(0, keepdim=True).to(x.dtype)
    return grad_x, -sums[:, 0].reshape(scale.shape), -sums[:, 1].reshape(lower.shape)
