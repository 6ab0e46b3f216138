"""Errors of a layer's call that say which layer it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["REFUSALS", "name_layer", "names_layer"]

Method = TypeVar("Method", bound=Callable[..., Any])
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)


def name_layer(error: Exception, name: str) -> None:
    """Add the layer that refuses something to the message, unless that names it."""
    message = error.args[0] if error.args else None
    if name and isinstance(message, str) and f"'{name}" not in message:
        error.args = (f"{message} (in '{name}')", *error.args[1:])


def names_layer(forward: Method) -> Method:
    """Name the converted layer in what its ``forward`` raises."""

    @functools.wraps(forward)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        try:
            return forward(self, *args, **kwargs)
        except REFUSALS as error:
            name_layer(error, getattr(self, "_qualified_name", ""))
            raise

    return named  # type: ignore[return-value]
