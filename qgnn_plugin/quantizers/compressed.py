r"""Training steps that keep codes instead of floats for the backward pass: :func:`compressed_activations`.

Inside the context a quantizer hands on codes whose gradient is that of the *values* ``x^ = c s + l``, and applies the
gradients of docs/quantizer.md itself.  What it keeps for that depends on where its input comes from:

- a product of packed codes, such as a message ``d^-1/2 (x^ W^^T)``: nothing.  The product keeps its packed factors
  anyway, and its values are computed again from them (selective recomputation), so that all gradients are exact;
- anything else, where a product keeps the codes as well: one bit per value, from which and the code follows whether the
  value was below, inside (and on which side of its level) or above the range;
- anything else: these four states themselves, two bits per value.

From states the gradients of ``x`` are the same; those of the range take 1/4, its mean, for ``|c - v|`` inside.  Of two
levels, where the gradient takes ``v = 1/2`` inside (see :mod:`.functional`), states tell the codes, and all is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .autocast import backward_without_autocast
from .first_order import first_order
from .functional import passed
from .masks import OneBitMasks
from .packed import PackedTensor, pack, unpack
from .rows import RowRange

__all__ = [
    "Recipe",
    "can_compress",
    "compressed_activations",
    "compressing",
    "dequantize",
    "multiples",
    "quantize",
    "recipe",
]

STATE_BITS = 2
BELOW, ABOVE = 0, 3  # inside: 1 where v < c, 2 where v >= c; of two levels 1 and 2 for the codes 0 and 1
MEAN_ROUNDING = 0.25  # mean of |c - v| inside the range

Recipe = Callable[[], Tensor]

_compressing: ContextVar[bool] = ContextVar("qgnn_compressing", default=False)
_open_contexts = 0  # of the whole process
_lock = Lock()


def compressing() -> bool:
    """Whether :func:`compressed_activations` is on."""
    # Compiled code can depend on a number, but cannot read a context variable.
    return _open_contexts > 0 and _compressing.get()


def _count(change: int) -> None:
    global _open_contexts
    with _lock:
        _open_contexts += change


@contextmanager
def compressed_activations() -> Iterator[None]:
    """Keep packed codes and bit masks for the backward passes of the forward passes run in this context.

    Converted layers keep the codes that a weight needs, and at most two bits per quantized value; what follows from the
    packed factors of a product is computed again in the backward pass, at the cost of another product.  ReLU and
    dropout, called through ``torch``, keep one bit per value, with bitwise the same gradients.  Values at a quantizer
    with ``truncation``, sparse features, one-bit features and half precision are kept as they are outside.  The
    gradients of some ranges are estimates (see the module); everything else is the same to float32 rounding::

        with qgnn.compressed_activations():
            loss = F.cross_entropy(model(x, edge_index), y)
        loss.backward()
    """
    token = _compressing.set(True)
    _count(1)
    try:
        with OneBitMasks():
            yield
    finally:
        _count(-1)
        _compressing.reset(token)


# Recomputation ########################################################################################################


def recipe(x: Tensor) -> Recipe | None:
    """How to compute ``x`` again from what the autograd graph keeps before it; :obj:`None` if it keeps too little.

    Nodes that can have an attribute ``again``, which computes their result from the node (see
    :mod:`qgnn_plugin.layers.compressed`).  Its saved tensors are there until a backward pass has run through it, hence
    through all that came of ``x``.
    """
    node: Any = x.grad_fn
    while node is not None and node.name() == "ViewBackward0":
        node = node.next_functions[0][0]
    again = getattr(node, "again", None)
    if again is None:
        return None
    shape = x.shape
    return lambda: again(node).view(shape)


# Quantizers ###########################################################################################################


def can_compress(x: Tensor, scale: Tensor) -> bool:
    """Whether :func:`quantize` handles ``x`` ``[*, F]`` with this range."""
    plain = x.dtype == scale.dtype == torch.float32 and x.layout == torch.strided and x.dim() >= 2 and x.numel() > 0
    return plain and torch.is_grad_enabled() and (scale.numel() == 1 or scale.dim() == 1 or scale.size(-1) == 1)


def _steps(x: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
    """``v``: how many steps ``x`` is above the lower end."""
    return (x - lower) * (1 / scale)


def _outside(v: Tensor, qmax: int) -> Tensor:
    """Where no gradient passes."""
    least, most = passed(qmax)
    return (v < least) | (v > most)


def _gradients(ctx: Any, grad: Tensor, outside: Tensor, slope: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``x``, scale and lower end, the first three inputs; ``slope`` is ``dx^/ds``."""
    scale_shape, lower_shape = ctx.range_shapes
    needs_x, needs_scale, needs_lower, *others = ctx.needs_input_grad
    grad_x = grad.masked_fill(outside, 0)
    grad_scale = (grad * slope).sum_to_size(scale_shape) if needs_scale else None
    grad_lower = (grad - grad_x).sum_to_size(lower_shape) if needs_lower else None
    return grad_x if needs_x else None, grad_scale, grad_lower, *(None for _ in others)


class _QuantizeAgain(torch.autograd.Function):
    """Keeps nothing: ``x`` is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lower: Tensor, codes: Tensor, qmax: int, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(scale, lower)
        ctx.qmax, ctx.recipe, ctx.range_shapes = qmax, recipe, (scale.shape, lower.shape)
        return codes.view_as(codes)

    @staticmethod
    @first_order
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v = _steps(ctx.recipe(), *ctx.saved_tensors)
        outside = _outside(v, ctx.qmax)
        codes = (v + 0.5).floor_().clamp_(0, ctx.qmax)
        v = v.fill_(0.5) if ctx.qmax == 1 else v
        return _gradients(ctx, grad, outside, codes - v.masked_fill_(outside, 0))


class _QuantizeState(torch.autograd.Function):
    """Keeps the state of every value in two bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lower: Tensor, codes: Tensor, qmax: int) -> Tensor:
        v = _steps(x, scale, lower)
        inside = codes if qmax == 1 else (v >= codes).to(x.dtype)
        least, most = passed(qmax)
        state = (inside + 1).masked_fill_(v < least, BELOW).masked_fill_(v > most, ABOVE)
        ctx.save_for_backward(pack(state, STATE_BITS))
        ctx.qmax, ctx.range_shapes = qmax, (scale.shape, lower.shape)
        return codes.view_as(codes)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (words,) = ctx.saved_tensors
        state = unpack(words, grad.shape, STATE_BITS)
        outside = (state == BELOW) | (state == ABOVE)
        # c - v inside, c outside: 0, 1/4, -1/4, Q for the states 0 to 3; of two levels 0, -1/2, 1/2, 1.
        slope = state - 1.5 if ctx.qmax == 1 else (1.5 - state) * (2 * MEAN_ROUNDING)
        slope = slope.masked_fill_(outside, 0).masked_fill_(state == ABOVE, ctx.qmax)
        return _gradients(ctx, grad, outside, slope)


class _QuantizeSide(torch.autograd.Function):
    """Keeps the codes, which something else keeps as well, and a bit: ``v >= c``, at the last code ``v > c``; of two
    levels whether gradients pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, lower: Tensor, codes: Tensor, qmax: int, packed: PackedTensor
    ) -> Tensor:
        v = _steps(x, scale, lower)
        side = ~_outside(v, qmax) if qmax == 1 else (v >= codes) & ((codes < qmax) | (v > qmax))
        ctx.save_for_backward(pack(side, 1), packed.words)
        ctx.qmax, ctx.bits, ctx.range_shapes = qmax, packed.bits, (scale.shape, lower.shape)
        return codes.view_as(codes)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sides, words = ctx.saved_tensors
        side, codes = unpack(sides, grad.shape, 1), unpack(words, grad.shape, ctx.bits)
        if ctx.qmax == 1:
            return _gradients(ctx, grad, side == 0, codes - 0.5 * side)
        above = (codes == ctx.qmax) & (side == 1)
        outside = above | ((codes == 0) & (side == 0))
        slope = ((0.5 - side) * (2 * MEAN_ROUNDING)).masked_fill_(outside, 0).masked_fill_(above, ctx.qmax)
        return _gradients(ctx, grad, outside, slope)


def quantize(
    x: Tensor, scale: Tensor, lower: Tensor, codes: Tensor, packed: PackedTensor, qmax: int, codes_kept: bool = False
) -> Tensor:
    """``codes``, those of ``x``, with gradients for ``x`` and its range; their own gradient is that of the values.

    Args:
        x: ``[*, F]``.
        scale: Step, broadcastable to ``x``.
        lower: Lower end of the range.
        codes: ``[*, F]``.
        packed: The same codes, packed.
        qmax: The largest code.
        codes_kept: Whether ``packed`` will be kept by what reads the codes.
    """
    codes, again = codes.detach(), recipe(x)
    if again is not None:
        return _QuantizeAgain.apply(x, scale, lower, codes, qmax, again)
    if codes_kept:
        return _QuantizeSide.apply(x, scale, lower, codes, qmax, packed)
    return _QuantizeState.apply(x, scale, lower, codes, qmax)


class _Multiples(torch.autograd.Function):
    """``s m`` and ``l m`` of rows; keeps ``m`` in a byte."""

    @staticmethod
    def forward(ctx: Any, multiplier: Tensor, scale: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(multiplier.to(torch.uint8))
        ctx.range_shapes = scale.shape, lower.shape
        return scale * multiplier, lower * multiplier

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_scale: Tensor, grad_lower: Tensor) -> tuple[None, Tensor, Tensor]:
        (multiplier,) = ctx.saved_tensors
        scale, lower = ctx.range_shapes
        return None, (grad_scale * multiplier).sum_to_size(scale), (grad_lower * multiplier).sum_to_size(lower)


def multiples(rows: RowRange) -> tuple[Tensor, Tensor]:
    """Scale and lower end of every row."""
    return _Multiples.apply(*rows)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
        return codes * scale + lower

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def dequantize(codes: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
    """``c s + l`` of codes from :func:`quantize`."""
    return _Dequantize.apply(codes, scale.detach(), lower.detach())
