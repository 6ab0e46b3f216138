"""Backward passes that cannot be differentiated in turn, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["first_order"]

Backward = TypeVar("Backward", bound=Callable[..., Any])

MESSAGE = (
    b"Expected no second derivative through what compressed_activations keeps, which is codes, not values; run the "
    b"forward pass outside of qgnn_plugin.compressed_activations()"
)


def first_order(backward: Backward) -> Backward:
    """Let the backward pass of an :class:`torch.autograd.Function` have gradients that refuse a backward pass.

    As :func:`torch.autograd.function.once_differentiable`, also where the incoming gradient is a constant.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return out
        values = out if isinstance(out, tuple) else (out,)
        refuse: Any = torch._C._functions.DelayedError(MESSAGE, len(values))
        return refuse(*(value if value is None else value.detach().requires_grad_() for value in values))

    return wrapped  # type: ignore[return-value]
