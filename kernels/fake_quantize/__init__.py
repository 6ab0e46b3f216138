r"""``fake_quantize``: quantize and dequantize in one pass, with the gradients of a learnable range.

With ``v = (x - l) / s``, ``c = clamp(floor(v + 1/2), 0, Q)`` and ``x^ = c s + l`` (docs/quantizer.md, there in
terms of ``u = l + Q s``), straight through the rounding and exact for the clamp:

.. math::
    \partial x^/\partial x = [0 \le v \le Q] \qquad
    \partial x^/\partial s = \begin{cases} 0 & v < 0 \\ c - v & 0 \le v \le Q \\ Q & v > Q
    \end{cases} \qquad \partial x^/\partial l = 1 - [0 \le v \le Q]

As codes, what training sums over, the result is ``c`` itself, with the gradients of ``v`` clamped:

.. math::
    \partial c/\partial x = 1/s \qquad \partial c/\partial l = -1/s \qquad \partial c/\partial s = -v/s

where :func:`passed` says that gradients pass, else 0; of two levels ``dc/ds = -1/(2 s)``.  With ``x^ = c s + l`` after
it, autograd has the gradients above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arithmetic import check_range
from ..checks import check_float, check_matrix
from ..layout import check_bits, top_code
from ..library import register

__all__ = ["fake_quantize", "fake_quantize_backward_reference", "fake_quantize_reference", "passed"]


def passed(top: int) -> tuple[float, float]:
    """The least and the largest ``v`` at which gradients of codes up to ``top`` pass straight through."""
    return (-0.5, 1.5) if top == 1 else (0.0, float(top))


def fake_quantize_reference(x: Tensor, scale: Tensor, offset: Tensor, bits: int, as_codes: bool = False) -> Tensor:
    v = (x - offset) * scale.reciprocal()
    codes = torch.floor(v + 0.5).clamp_(0, top_code(bits)).nan_to_num_(0)
    return codes if as_codes else codes * scale + offset


def _reduce_to(value: Tensor, like: Tensor) -> Tensor:
    """Sum ``[N, F]`` down to the shape of a range tensor."""
    if like.numel() == 1:
        return value.sum().reshape(like.shape)
    return value.sum(1, keepdim=True) if like.dim() == 2 else value.sum(0)


def fake_quantize_backward_reference(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, bits: int, as_codes: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    top, inverse = top_code(bits), scale.reciprocal()
    v = (x - offset) * inverse
    if as_codes:
        least, most = passed(top)
        grad_x = (grad * inverse).masked_fill_(~((v >= least) & (v <= most)), 0)
        # Far outside the range v overflows, and 0 * inf is not 0.
        slope = -0.5 if bits == 1 else -v.clamp_(0, top).nan_to_num_(0)
        return grad_x, _reduce_to(grad_x * slope, scale), _reduce_to(-grad_x, offset)
    inside = (v >= 0) & (v <= top)
    codes = torch.floor(v + 0.5).clamp_(0, top)
    grad_scale = grad * torch.where(inside, codes - v, codes)
    grad_offset = grad.masked_fill(inside, 0)
    return (
        grad.masked_fill(~inside, 0),
        _reduce_to(grad_scale, scale),
        _reduce_to(grad_offset, offset),
    )


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(x: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(scale),
        torch.empty_like(offset),
    )


def _check(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> None:
    check_bits(bits)
    check_matrix(x, "x")
    check_range(scale, offset, *x.shape)


def _check_backward(grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> None:
    _check(x, scale, offset, bits)
    check_float(grad, "grad", tuple(x.shape))


register(fake_quantize_reference, _fake, _check)
register(fake_quantize_backward_reference, _fake_backward, _check_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bits, ctx.as_codes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.qgnn.fake_quantize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.bits, ctx.as_codes)
    return *gradients, None, None


torch.library.register_autograd("qgnn::fake_quantize", _backward, setup_context=_setup_context)


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor, bits: int, *, as_codes: bool = False) -> Tensor:
    r"""Round ``x`` to the levels of a learnable range, differentiable in ``x``, ``scale`` and
    ``offset``.

    Args:
        x: ``[N, F]`` float32.
        scale: Step ``s > 0``: one element, ``[F]`` or ``[N, 1]``, float32.
        offset: Range start ``l``, shaped likewise.
        bits: 1, 2, 4 or 8; gradients of values are those of more than two levels (docs/quantizer.md) at every width.
        as_codes: Whether to return codes, as quantizers in training do, in place of values.

    Returns:
        ``[N, F]`` float32, bitwise ``unpack_dequantize(quantize_pack(x))``, or its integer-valued codes.
    """
    return torch.ops.qgnn.fake_quantize(x, scale, offset, bits, as_codes)
