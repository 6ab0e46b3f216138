r"""Rounding to codes, with the gradients of the straight-through surrogate.

With ``Q = 2^b - 1``, scale ``s`` and lower end ``l``, in exactly this order of float operations (docs/arithmetic.md)::

    v = (x - l) * (1 / s)        c = clamp(floor(v + 1/2), 0, Q)        x^ = c * s + l

The surrogate replaces rounding by the identity, so that inside the range ``dc/dx = 1/s``, ``dc/dl = -1/s`` and
``dc/ds = -v/s``, and outside all three are 0.  Composed with ``x^ = c s + l`` this gives docs/quantizer.md's gradients:
``dx^/dx = 1`` inside and 0 outside; ``dx^/du = (c - v)/Q`` inside, 1 above, 0 below; ``dx^/dl = -(c - v)/Q`` inside,
0 above, 1 below (at fixed ``u``).

Of two levels (``Q = 1``) this would train neither: most values lie outside of a range whose ends are means of values.
As in binary networks, gradients then pass within half a step around the range, where rounding is no further off than
half a step either, and ``dc/ds = -1/(2 s)``: the code turns at ``l + s/2``, wherever ``v`` is.  So ``dx^/dx = 1`` for
``-1/2 <= v <= 3/2``, else 0, and with the middle ``l + s/2`` fixed ``dx^/ds = c - 1/2`` everywhere, which is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.autograd import with_signature
from ..kernels.backend import implementation, is_direct
from ..kernels.fake_quantize import passed
from ..kernels.layout import PACKED_BITS, top_code

__all__ = ["FINE_BITS", "FINE_LEVELS", "HALF", "passed", "quantize_codes", "truncate"]

HALF = (torch.float16, torch.bfloat16)  # they hold codes, but neither what leads to a code nor sums of codes
FINE_BITS = 8
FINE_LEVELS = top_code(FINE_BITS)


def truncate(fine: Tensor, qmax: int, skew: Tensor) -> Tensor:
    r"""Bitwise truncation of 8-bit codes to ``qmax + 1`` levels: BT with ``skew = 0``, else BT*.

    .. math:: c = \mathrm{clamp}(\lfloor (c_8 + \mathrm{skew}) / (255 / Q) + 1/2 \rfloor, 0, Q)
    """
    base = FINE_LEVELS / qmax
    return ((fine + skew) / base + 0.5).floor_().clamp_(0, qmax)


def _sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    return grad if grad.shape == shape else grad.sum_to_size(shape)


@with_signature
class _QuantizeCodes(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor, lower: Tensor, qmax: int, skew: Tensor | None) -> Tensor:
        if skew is None:
            return _rounded(x, scale, lower, qmax)
        return truncate(_rounded(x, scale * (qmax / FINE_LEVELS), lower, FINE_LEVELS), qmax, skew)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, lower, ctx.qmax, _ = inputs
        ctx.save_for_backward(x, scale, lower)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, lower = ctx.saved_tensors
        # Where gradients are differentiated in turn, those of the surrogate are, by operations that know how.
        # So are they where the gradient is a batch of gradients, as torch.autograd.grad(is_grads_batched=True) has it.
        batched = not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)
        by_op = not (torch.is_grad_enabled() or batched)
        gradients = (_rounded_backward if by_op else _codes_backward)(grad, x, scale, lower, ctx.qmax)
        needs = ctx.needs_input_grad
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=False)), None, None


_BITS = {top_code(bits): bits for bits in PACKED_BITS}
_DEVICES = ("cpu", "cuda")  # of which the op has kernels, or may run its reference
_DTYPES = (torch.float32, torch.float64)  # the latter on the CPU, past the dispatcher


def _op_bits(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> int | None:
    """The width at which the op ``fake_quantize`` takes ``x`` ``[*, F]``; :obj:`None` where it does not."""
    dtype, shape = x.dtype, scale.shape
    if dtype not in _DTYPES or scale.dtype is not dtype or lower.dtype is not dtype or lower.shape != shape:
        return None
    fits = scale.numel() == 1 or (x.dim() >= 2 and shape == (*x.shape[:-1], 1))
    return _BITS.get(qmax) if fits and x.numel() else None


def _dispatched_bits(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> int | None:
    """:func:`_op_bits` where the op is called through the dispatcher.

    A compiler makes one kernel of the formula and what is around it, so it has the formula.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type not in _DEVICES:
        return None
    return None if x.dtype is not torch.float32 else _op_bits(x, scale, lower, qmax)


def _rounded(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    """Codes by the op; those that it does not know by the formula, bitwise the same."""
    if x.is_cpu and is_direct():
        if (bits := _op_bits(x, scale, lower, qmax)) is not None:
            return implementation("fake_quantize", "cpu")(x, scale, lower, bits, True)
    elif (bits := _dispatched_bits(x, scale, lower, qmax)) is not None:
        return torch.ops.qgnn.fake_quantize(_matrix(x), *_ranges(scale, lower), bits, True).view(x.shape)
    return _codes(x, scale, lower, qmax)


def _rounded_backward(
    grad: Tensor, x: Tensor, scale: Tensor, lower: Tensor, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the op, which adds up those of the range in an order of its own."""
    if x.is_cpu and is_direct():
        if (bits := _op_bits(x, scale, lower, qmax)) is not None:
            return implementation("fake_quantize_backward", "cpu")(grad, x, scale, lower, bits, True)
    elif (bits := _dispatched_bits(x, scale, lower, qmax)) is not None:
        found = torch.ops.qgnn.fake_quantize_backward(_matrix(grad), _matrix(x), *_ranges(scale, lower), bits, True)
        grad_x, grad_scale, grad_lower = found
        return grad_x.view(x.shape), grad_scale.view(scale.shape), grad_lower.view(lower.shape)
    return _codes_backward(grad, x, scale, lower, qmax)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1)) if x.dim() else x.view(1, 1)


def _ranges(scale: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """One element, or ``[N, 1]``."""
    shape = (1,) if scale.numel() == 1 else (-1, 1)
    return scale.reshape(shape), lower.reshape(shape)


def _codes(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    return ((x - lower) * (1 / scale)).add_(0.5).floor_().clamp_(0, qmax)


def _codes_backward(grad: Tensor, x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    inverse = 1 / scale
    v = (x - lower) * inverse
    least, most = passed(qmax)
    grad_x = (grad * inverse).masked_fill_((v < least) | (v > most), 0)
    if qmax == 1:
        return grad_x, _sum_to(grad_x * -0.5, scale.shape), _sum_to(-grad_x, lower.shape)
    v.clamp_(0, qmax)  # far outside the range v overflows, and 0 * inf is not 0
    return grad_x, _sum_to(-(grad_x * v), scale.shape), _sum_to(-grad_x, lower.shape)


def quantize_codes(x: Tensor, scale: Tensor, lower: Tensor, qmax: int, skew: Tensor | None = None) -> Tensor:
    """Codes of ``x`` as integer-valued floats in ``[0, qmax]``, differentiable in ``x``, ``scale`` and ``lower``.

    Args:
        x: Values, any shape.
        scale: Step size, positive, broadcastable to ``x``.
        lower: Lower end of the range, broadcastable to ``x``.
        qmax: Largest code.
        skew: If given, quantize to 8 bits and truncate with this skewness correction (see :func:`truncate`).
    """
    if x.dtype in HALF:
        wide = _QuantizeCodes.apply(x.float(), scale.float(), lower.float(), qmax, skew)
        return wide.to(x.dtype)
    return _QuantizeCodes.apply(x, scale, lower, qmax, skew)


PER = {"node": " times the largest of each row", "row": " times the multiplier of each row"}


def shown_range(scale: Tensor, lower: Tensor, bits: int, granularity: str) -> str:
    """What the lowest and the highest code mean, as people read it, over all ranges; empty for tensors without data."""
    if scale.is_meta or type(scale) not in (Tensor, torch.nn.Parameter):  # such as those of tracing
        return ""
    low, high = float(lower.min()) + 0.0, float((lower + scale * top_code(bits)).max())
    several = f" in {scale.numel()} ranges" if scale.numel() > 1 else ""
    return f"[{low:.3g}, {high:.3g}]{several}{PER.get(granularity, '')}"
