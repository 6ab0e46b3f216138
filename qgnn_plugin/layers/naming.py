"""How a swapped class is called and shown, and what names there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..aliases import LayersOwn
from ..config import OFF

__all__ = ["annotated", "attribute_names", "float_class_of", "named_as", "shown_bits", "vars_of"]


def shown_bits(sites: Mapping[str, int]) -> str:
    """``bits=4``, or the bits of every site where they differ; nothing where all are off."""
    if all(bits == OFF for bits in sites.values()):
        return ""
    if len(set(sites.values())) == 1:
        return f"bits={next(iter(sites.values()))}"
    return "bits=" + "/".join(f"{bits} {site}" for site, bits in sites.items())


def annotated(text: str, *notes: str) -> str:
    """The ``repr`` of a module with further arguments."""
    note = ", ".join(filter(None, notes))
    if not note:
        return text
    head, opening, rest = text.partition("(")
    if not opening or not text.endswith(")"):
        return f"{text} ({note})"
    if rest.startswith("\n"):  # of one with children: a line of its own
        return f"{head}(\n  {note}{rest}"
    return f"{head}({note})" if rest == ")" else f"{text[:-1]}, {note})"


def named_as(float_class: type[nn.Module], own_names: tuple[str, ...] = ()) -> dict[str, Any]:
    """What makes a subclass go by the name of ``float_class``, by which models look layers up.

    ``own_names`` are aliases of the mixin's that mean what ``float_class`` or its instances have under these names.
    """
    return {
        **{name: vars_of(float_class).get(name, LayersOwn(name)) for name in own_names},
        "float_class": float_class,
        "own_names": own_names,
        "__module__": float_class.__module__,
        "__qualname__": float_class.__qualname__,
        "__doc__": float_class.__doc__,
    }


def float_class_of(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, swapped or not."""
    found: type[nn.Module] = getattr(type(module), "float_class", type(module))
    return found


def vars_of(cls: type) -> dict[str, Any]:
    """Every attribute of a class as it was defined, those of its bases included."""
    return {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}


def attribute_names(state: Mapping[str, Any]) -> set[str]:
    """Every attribute that a layer's ``__dict__`` gives it."""
    return {*state, *state["_parameters"], *state["_buffers"], *state["_modules"]}
