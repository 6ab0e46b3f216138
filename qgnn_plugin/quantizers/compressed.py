r"""Training steps that keep codes instead of floats for the backward pass: :func:`compressed_activations`.

Inside the context a quantizer hands on codes whose gradient is that of the *values* ``x^ = c s + l``, and applies the
gradients of DESIGN section 3 itself.  It keeps two bits per value for that: whether the value was below, inside (and on
which side of its level) or above the range.  The gradients of ``x`` are the same; those of the range take 1/4, its
mean, for ``|c - v|`` of values inside.  Layers that need the values in their backward pass keep the packed codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..kernels.plan import GraphPlan
from ..kernels.quantize_pack import quantize_pack
from ..kernels.spmm import edge_products, spmm
from ..kernels.unpack_dequantize import unpack_dequantize

__all__ = [
    "Packed",
    "aggregate_sum",
    "can_compress",
    "compressed_activations",
    "compressing",
    "dequantize",
    "linear",
    "quantize",
]

STATE_BITS = 2
BELOW, ABOVE = 0, 3  # inside: 1 where v < c, 2 where v >= c
MEAN_ROUNDING = 0.25  # mean of |c - v| inside the range

_compressing: ContextVar[bool] = ContextVar("qgnn_compressing", default=False)


def compressing() -> bool:
    """Whether :func:`compressed_activations` is on."""
    return _compressing.get()


@contextmanager
def compressed_activations() -> Iterator[None]:
    """Keep packed codes and bit masks for the backward passes of the forward passes run in this context.

    Converted layers keep two bits per quantized value, and its code where a weight needs it; ReLU and dropout, called
    through ``torch``, keep one bit per value, with bitwise the same gradients.  Values at a quantizer with
    ``truncation``, sparse features, one-bit features and half precision are kept as they are outside.  The
    gradients of ranges are estimates (see the module); everything else is the same to float32 rounding::

        with qgnn.compressed_activations():
            loss = F.cross_entropy(model(x, edge_index), y)
        loss.backward()
    """
    token = _compressing.set(True)
    try:
        with _OneBitMasks():
            yield
    finally:
        _compressing.reset(token)


class Packed(NamedTuple):
    """Packed codes of a tensor of ``shape`` ``[*, F]`` with their affine map."""

    words: Tensor
    scale: Tensor
    lower: Tensor
    bits: int
    shape: torch.Size

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, lower: Tensor, bits: int) -> Packed:
        """Pack ``codes``; the range broadcasts to them (one element, per channel or per row)."""
        return cls(_pack(codes.detach(), bits), scale.detach(), lower.detach(), bits, codes.shape)

    def values(self) -> Tensor:
        """``c s + l``."""
        return unpack_dequantize(self.words, *self.kernel_range(), self.shape[-1], self.bits).view(self.shape)

    def kernel_range(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``lower`` in the forms that kernels know for ``[N, F]``."""
        return _kernel_range(self.scale, self.shape), _kernel_range(self.lower, self.shape)


def _pack(codes: Tensor, bits: int) -> Tensor:
    one = torch.ones(1, device=codes.device)
    return quantize_pack(codes.float().reshape(-1, codes.shape[-1]), one, torch.zeros_like(one), bits)


def _unpack(words: Tensor, shape: torch.Size, bits: int) -> Tensor:
    one = torch.ones(1, device=words.device)
    return unpack_dequantize(words, one, torch.zeros_like(one), shape[-1], bits).view(shape)


def _kernel_range(value: Tensor, shape: torch.Size) -> Tensor:
    """A range that broadcasts to ``shape``: one element, ``[F]`` or ``[N, 1]``."""
    if value.numel() == 1:
        return value.reshape(1)
    return value if value.dim() == 1 else value.expand(*shape[:-1], 1).reshape(-1, 1)


def can_compress(x: Tensor, scale: Tensor) -> bool:
    """Whether :func:`quantize` handles ``x`` ``[*, F]`` with this range."""
    plain = x.dtype == torch.float32 and x.layout == torch.strided and x.dim() >= 2 and x.numel() > 0
    return plain and torch.is_grad_enabled() and (scale.numel() == 1 or scale.dim() == 1 or scale.size(-1) == 1)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lower: Tensor, codes: Tensor, qmax: int) -> Tensor:
        v = (x - lower) * (1 / scale)
        state = (v >= codes).to(x.dtype).add_(1).masked_fill_(v < 0, BELOW).masked_fill_(v > qmax, ABOVE)
        ctx.save_for_backward(_pack(state, STATE_BITS))
        ctx.qmax, ctx.shape, ctx.range_shapes = qmax, x.shape, (scale.shape, lower.shape)
        return codes.view_as(codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (words,) = ctx.saved_tensors
        state = _unpack(words, ctx.shape, STATE_BITS)
        outside = (state == BELOW) | (state == ABOVE)
        grad_x = grad.masked_fill(outside, 0)
        # c - v inside, c outside: 0, 1/4, -1/4, Q for the states 0 to 3.
        slope = ((1.5 - state) * (2 * MEAN_ROUNDING)).masked_fill_(outside, 0).masked_fill_(state == ABOVE, ctx.qmax)
        scale_shape, lower_shape = ctx.range_shapes
        grad_scale = (grad * slope).sum_to_size(scale_shape) if ctx.needs_input_grad[1] else None
        grad_lower = (grad - grad_x).sum_to_size(lower_shape) if ctx.needs_input_grad[2] else None
        return grad_x if ctx.needs_input_grad[0] else None, grad_scale, grad_lower, None, None


def quantize(x: Tensor, scale: Tensor, lower: Tensor, codes: Tensor, qmax: int) -> Tensor:
    """``codes``, those of ``x``, with gradients for ``x`` and its range; their own gradient is that of the values."""
    return _Quantize.apply(x, scale, lower, codes.detach(), qmax)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
        return codes * scale + lower

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def dequantize(codes: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
    """``c s + l`` of codes from :func:`quantize`."""
    return _Dequantize.apply(codes, scale.detach(), lower.detach())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, weight: Tensor, packed: Packed, product: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(weight, *packed[:3])
        ctx.layout = packed[3:]
        return product()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rest = ctx.saved_tensors
        grad_codes = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            values = Packed(*rest, *ctx.layout).values()
            grad_weight = grad.reshape(-1, grad.size(-1)).t() @ values.reshape(-1, weight.size(1))
        return grad_codes, grad_weight, None, None


def linear(codes: Tensor, weight: Tensor, packed: Packed, product: Callable[[], Tensor]) -> Tensor:
    """``x^ W^^T``: ``product()`` computes it; the gradients are those of values.

    Args:
        codes: ``[*, K]``, from :func:`quantize`.
        weight: ``[O, K]``, the dequantized weight.
        packed: The same codes, packed.
        product: The forward pass, without bias.
    """
    return _Linear.apply(codes, weight, packed, product)


class _AggregateSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, weight: Tensor | None, plan: GraphPlan, packed: Packed, total: Callable[[], Tensor]
    ) -> Tensor:
        ctx.plan, ctx.layout = plan, packed[3:]
        # The codes matter to the gradient of the weights alone.
        ctx.save_for_backward(weight, *(packed[:3] if ctx.needs_input_grad[1] else ()))
        return total()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, (weight, *rest) = ctx.plan, ctx.saved_tensors
        grad_codes = spmm(plan.transpose, grad, None if weight is None else plan.transpose.sort(weight))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            values = Packed(*rest, *ctx.layout).values()
            heads = weight.size(1) if weight.dim() == 2 else 1
            by_head = (v.reshape(v.size(0), heads, -1) for v in (grad, values))
            grad_weight = edge_products(plan, *by_head).view_as(weight)
        return grad_codes, grad_weight, None, None, None


def aggregate_sum(
    codes: Tensor, weight: Tensor | None, plan: GraphPlan, packed: Packed, total: Callable[[], Tensor]
) -> Tensor:
    """``sum_j w_ij x^_j``, computed by ``total()``; the backward pass runs on the transposed plan.

    Args:
        codes: ``[num_src, F]`` or ``[num_src, H, C]``, from :func:`quantize`.
        weight: ``[E]`` or ``[E, H]`` in CSR order, or :obj:`None`.
        plan: The graph.
        packed: The same codes, packed.
        total: The forward pass.
    """
    return _AggregateSum.apply(codes, weight, plan, packed, total)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(_pack((y <= 0).logical_not(), 1))  # a NaN passes its gradient on, as in torch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (words,) = ctx.saved_tensors
        return grad.masked_fill(_unpack(words, grad.shape, 1) == 0, 0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.factor = float(torch.ones(1, dtype=x.dtype).div_(1 - p))
        if x.is_cuda:
            y, mask = torch.native_dropout(x, p, True)
        else:  # the draws of torch's own dropout
            mask = torch.empty_like(x).bernoulli_(1 - p)
            y = x * (mask * ctx.factor)
        ctx.save_for_backward(_pack(mask, 1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (words,) = ctx.saved_tensors
        return grad * (_unpack(words, grad.shape, 1).to(grad.dtype) * ctx.factor), None


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    if inplace or not _has_rows(x):
        return torch.relu_(x) if inplace else torch.relu(x)
    return _ReLU.apply(x)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace or not training or not 0 < p < 1 or not _has_rows(x):
        return torch.dropout_(x, p, training) if inplace else torch.dropout(x, p, training)
    return _Dropout.apply(x, p)


def _has_rows(x: Tensor) -> bool:
    return x.dim() >= 1 and x.numel() > 0 and x.requires_grad and x.is_floating_point()


class _OneBitMasks(TorchFunctionMode):
    """Runs ReLU and dropout with one bit per value for their backward passes."""

    HANDLED: ClassVar[dict[Any, Callable[..., Tensor]]] = {
        F.relu: _relu, torch.relu: _relu, Tensor.relu: _relu, F.dropout: _dropout, torch.dropout: _dropout,
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside this method the mode is off.
        return self.HANDLED.get(func, func)(*args, **(kwargs or {}))
