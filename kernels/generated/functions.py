"""Functions of numbers in generated Triton kernels."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expm1", "log1p", "sigmoid", "softplus", "tanh"]


@triton.jit
def expm1(x):
    """``exp(x) - 1``; near zero by its series, to the ninth power."""
    p = x / 9.0 + 1.0
    p = p * x / 8.0 + 1.0
    p = p * x / 7.0 + 1.0
    p = p * x / 6.0 + 1.0
    p = p * x / 5.0 + 1.0
    p = p * x / 4.0 + 1.0
    p = p * x / 3.0 + 1.0
    near = (p * x / 2.0 + 1.0) * x
    return tl.where(tl.abs(x) < 0.34, near, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """``log(1 + x)``, also of small ``x``."""
    w = 1.0 + x
    rest = w - 1.0
    exact = rest != 0.0
    return tl.where(exact, tl.log(w) * (x / tl.where(exact, rest, 1.0)), x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """``tanh(x)`` (Cephes, tanhf)."""
    a = tl.abs(x)
    s = 1.0 - 2.0 / (tl.exp(a + a) + 1.0)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a > 0.625, tl.where(x > 0, s, -s), p * z * x + x)


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``; ``x`` itself above 20, as in torch."""
    y = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
    return tl.where(x > 20.0, x, y)
