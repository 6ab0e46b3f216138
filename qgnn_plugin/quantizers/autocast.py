"""Arithmetic over codes outside of autocast.

Under :class:`torch.autocast` products run in bfloat16 or float16, which hold a code but not a sum of codes.  What
converted and packed layers compute therefore runs with autocast off, in the precision of their parameters; that is
also the precision of their results, which every operation under autocast takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .functional import HALF

__all__ = ["backward_without_autocast", "full_precision", "is_autocasting", "without_autocast"]

DEVICE_TYPES = ("cpu", "cuda")
Method = TypeVar("Method", bound=Callable[..., Any])


def is_autocasting() -> bool:
    """Whether autocast is on, for any device."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off, on every device where it is on."""
    with ExitStack() as stack:
        for kind in DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def full_precision(method: Method) -> Method:
    """Let a layer's method run with autocast off and take half-precision arguments in the layer's own precision.

    A layer with a true attribute ``follows_autocast``, where nothing is quantized, runs as it is.
    """

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_autocasting() or getattr(self, "follows_autocast", False):
            return method(self, *args, **kwargs)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        with without_autocast():
            return method(self, *_widened(args, dtype), **{k: _widened(v, dtype) for k, v in kwargs.items()})

    return guarded  # type: ignore[return-value]


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """Half-precision tensors in ``value``, also in tuples and lists, in another precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in HALF else value
    if type(value) in (tuple, list):
        return type(value)(_widened(item, dtype) for item in value)
    return value


def backward_without_autocast(backward: Method) -> Method:
    """Let the backward pass of an :class:`torch.autograd.Function` run with autocast off, wherever it is called."""

    @functools.wraps(backward)
    def guarded(*args: Any) -> Any:
        if not is_autocasting():
            return backward(*args)
        with without_autocast():
            return backward(*args)

    return guarded  # type: ignore[return-value]
