"""Errors of a layer's call that say which layer it was."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["REFUSALS", "expect_features", "name_layer", "names_layer"]

Method = TypeVar("Method", bound=Callable[..., Any])
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)


def name_layer(error: Exception, name: str) -> None:
    """Add the layer that refuses something to the message, unless that names it."""
    message = error.args[0] if error.args else None
    if name and isinstance(message, str) and f"'{name}" not in message:
        error.args = (f"{message} (in '{name}')", *error.args[1:])


def expect_features(x: Any) -> None:
    """Raise unless ``x``, the first argument of a layer, is a tensor or a pair of them."""
    if isinstance(x, Tensor):
        if x.dim() == 0 and x.is_floating_point():  # an index may be a single one
            raise ValueError("Expected a tensor of features (got a single number)")
        return
    if not isinstance(x, (tuple, list)) or not all(part is None or isinstance(part, Tensor) for part in x):
        raise TypeError(
            f"Expected a tensor of features, or a pair of them (got {type(x).__name__}); use torch.as_tensor(x)"
        )


_WIDTHS = re.compile(r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)")
_KINDS = re.compile(r"to have the same dtype, but got: (\S+) != (\S+)")


def _explained(error: Exception, args: tuple[Any, ...]) -> Exception | None:
    """What is wrong with the features, where torch only says what it could not multiply."""
    message = str(error.args[0]) if error.args else ""
    if widths := _WIDTHS.search(message):
        rows, found, expected, _ = widths.groups()
        return ValueError(
            f"Expected {expected} features (got [{rows}, {found}]); check that the features are those of the model"
        )
    if kinds := _KINDS.search(message):
        return TypeError(
            f"Expected features of the kind of the weights, {kinds[2]} (got {kinds[1]}); convert them with .to(dtype)"
        )
    # Layers of the user's own take what they like.
    if args and (args[0] is None or type(args[0]).__module__ == "numpy" or isinstance(args[0], list)):
        try:
            expect_features(args[0])
        except (TypeError, ValueError) as refusal:
            return refusal
    return None


def names_layer(forward: Method) -> Method:
    """Name the converted layer in what its ``forward`` raises."""

    @functools.wraps(forward)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        try:
            return forward(self, *args, **kwargs)
        except (*REFUSALS, AttributeError) as error:
            explained = _explained(error, args)
            name_layer(explained or error, getattr(self, "_qualified_name", ""))
            if explained is not None:
                raise explained from error
            raise

    return named  # type: ignore[return-value]
