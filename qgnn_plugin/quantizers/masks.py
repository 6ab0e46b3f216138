"""ReLU and dropout with one bit per value for their backward passes; the gradients are bitwise those of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .first_order import first_order
from .packed import pack, unpack

__all__ = ["OneBitMasks"]


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(pack((y <= 0).logical_not(), 1))  # a NaN passes its gradient on, as in torch
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (words,) = ctx.saved_tensors
        return grad.masked_fill(unpack(words, grad.shape, 1) == 0, 0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.factor = float(torch.ones(1, dtype=x.dtype).div_(1 - p))
        if x.is_cuda:
            y, mask = torch.native_dropout(x, p, True)
        else:  # the draws of torch's own dropout
            mask = torch.empty_like(x).bernoulli_(1 - p)
            y = x * (mask * ctx.factor)
        ctx.save_for_backward(pack(mask, 1))
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (words,) = ctx.saved_tensors
        return grad * (unpack(words, grad.shape, 1).to(grad.dtype) * ctx.factor), None


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


class OneBitMasks(TorchFunctionMode):
    """Runs ReLU and dropout with one bit per value for their backward passes."""

    HANDLED: ClassVar[dict[Any, Callable[..., Tensor]]] = {
        F.relu: _relu, torch.relu: _relu, Tensor.relu: _relu, F.dropout: _dropout, torch.dropout: _dropout,
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside this method the mode is off.
        return self.HANDLED.get(func, func)(*args, **(kwargs or {}))
