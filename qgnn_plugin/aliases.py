"""Names that a mixin and a user's layer may both have: the layer keeps its own."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Alias", "LayersOwn", "public_names"]


class Alias:
    """The public name of an attribute that is private to this package.

    Nothing in the package reads by it, so that a layer whose own attribute has the name keeps that: see
    :class:`LayersOwn`.
    """

    def __init__(self, target: str) -> None:
        self.target = target

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        return getattr(owner if layer is None else layer, self.target)

    def __set__(self, layer: Any, value: Any) -> None:
        setattr(layer, self.target, value)

    def __delete__(self, layer: Any) -> None:
        delattr(layer, self.target)


class LayersOwn:
    """In place of an :class:`Alias`: the attribute of that name that a layer holds itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        return self if layer is None else nn.Module.__getattr__(layer, self.name)  # what is in __dict__ comes before


def public_names(cls: type) -> set[str]:
    """The names of every alias of a class."""
    return {name for base in cls.__mro__ for name, value in vars(base).items() if isinstance(value, Alias)}
