"""Whether a layer computes what the class does that a conversion is made for: whatever it changes decides."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import MaxAggregation, MeanAggregation, SumAggregation

__all__ = ["aggregates_as_named", "bound_changes", "changes", "defined", "is_generated", "strays"]

# What PyG writes onto a class for its own use; a class that defines one of these changes nothing by it.
_TEMPLATES = {
    "_orig_propagate",
    "_jinja_propagate",
    "collect",
    "_orig_edge_updater",
    "_jinja_edge_updater",
    "edge_collect",
}
# Attributes of `nn.Module` that a forward pass goes through; none of the others takes part in it.
_CALLS = {"forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__"}
_HARMLESS = {
    "__init__",
    "__new__",
    "__module__",
    "__qualname__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__init_subclass__",
    "__class_getitem__",
    "__repr__",
    "extra_repr",
    "explain_message",  # of PyG's own `propagate`, which every layer runs while it is being explained
    "reset_parameters",
    "SUPPORTS_FUSED_EDGE_INDEX",
}
_AGGREGATIONS = {"add": SumAggregation, "sum": SumAggregation, "mean": MeanAggregation, "max": MaxAggregation}


def is_generated(cls: type, name: str) -> bool:
    """Whether ``cls`` has a ``propagate`` or ``edge_updater`` of its own that PyG wrote, not its author."""
    value = vars(cls).get(name)
    return getattr(value, "__module__", None) == f"{cls.__module__}_{cls.__name__}_{name}"


def defined(base: type) -> dict[str, Any]:
    """What ``base`` and its parents define now; a later change of one of them changes its behaviour."""
    found: dict[str, Any] = {}
    for cls in base.__mro__:
        if cls not in (nn.Module, object):
            for name in vars(cls):
                found.setdefault(name, inspect.getattr_static(base, name))
    written = ("propagate", "edge_updater")  # by PyG, at the first instance
    return {n: value for n, value in found.items() if _acts(value) and not _is_beside_the_point(n) and n not in written}


def changes(cls: type, base: type, before: dict[str, Any]) -> list[str]:
    """What ``cls`` computes with that ``base`` defined otherwise at first, by name.

    Args:
        cls: ``base`` or a subclass.
        base: The class that a conversion is made for.
        before: What :func:`defined` said of ``base``.
    """
    names = {name for name, value in before.items() if inspect.getattr_static(base, name, None) is not value}
    for owner in cls.__mro__:
        if owner not in base.__mro__:  # a subclass, or a mixin of one
            names |= {name for name in vars(owner) if _is_changed(cls, owner, name, base)}
    return sorted(names)


def _is_changed(cls: type, owner: type, name: str, base: type) -> bool:
    if _is_beside_the_point(name) or is_generated(owner, name):
        return False
    value, inherited = inspect.getattr_static(cls, name), inspect.getattr_static(base, name, None)
    if inherited is None or value is inherited:
        return False  # a name of its own
    return _acts(value) or _acts(inherited)


def _is_beside_the_point(name: str) -> bool:
    if name in _HARMLESS or name in _TEMPLATES:
        return True
    return name not in _CALLS and (name in vars(nn.Module) or name in vars(object))


def _acts(value: Any) -> bool:
    """Whether a class attribute is code."""
    return callable(value) or isinstance(value, (property, classmethod, staticmethod)) or hasattr(value, "__get__")


def bound_changes(layer: nn.Module) -> dict[str, Any]:
    """Functions bound to ``layer`` itself in the place of its class's own, by name."""
    cls = type(layer)
    found = {}
    for name, value in vars(layer).items():
        if not callable(value) or isinstance(value, nn.Module):
            continue
        inherited = inspect.getattr_static(cls, name, None)
        if inherited is None or not _acts(inherited) or _is_beside_the_point(name):
            continue
        if getattr(value, "__func__", None) not in _own_methods(cls, name):
            found[name] = value
    return found


def _own_methods(cls: type, name: str) -> list[Any]:
    """Methods of ``cls`` that PyG may bind to an instance as ``name``."""
    return [getattr(cls, alias, None) for alias in (name, f"_orig_{name}", f"_jinja_{name}") if hasattr(cls, alias)]


def strays(layer: nn.Module) -> Iterator[str]:
    """Functions bound to ``layer`` that may call a layer they were made with, which a copy of ``layer`` is not."""
    for name, value in bound_changes(layer).items():
        if isinstance(value, MethodType) and value.__self__ is layer:
            continue
        # A function that is given no layer can run one's `forward` by what it holds alone.
        if name in _CALLS or not isinstance(value, FunctionType) or any(map(_is_of_layer, _held(value))):
            yield name


def _held(function: FunctionType) -> Iterator[Any]:
    """What ``function`` refers to from outside."""
    yield from inspect.getclosurevars(function).nonlocals.values()
    yield from (function.__globals__.get(name) for name in function.__code__.co_names)


def _is_of_layer(value: Any) -> bool:
    return isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)


def aggregates_as_named(layer: Any) -> bool:
    """Whether the aggregation that ``layer`` runs is the one that ``layer.aggr`` names."""
    if not isinstance(layer, MessagePassing):
        return True
    named = _AGGREGATIONS.get(layer.aggr) if isinstance(layer.aggr, str) else None
    return named is None or type(layer.aggr_module) is named
