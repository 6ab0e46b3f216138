"""Weights that code of the model takes past their layers, in ways that its source does not tell (:mod:`.reads`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import OFF
from .base import INFRASTRUCTURE, QuantizedLayer
from .factors import readings
from .reads import ABOUT

__all__ = ["is_read_past", "noting_reads"]

MARK = "_is_read_past"


def is_read_past(layer: nn.Module) -> bool:
    """Whether code has taken a quantized weight of ``layer`` as it is, while ranges were set."""
    return MARK in vars(layer)


@contextmanager
def noting_reads(model: nn.Module) -> Iterator[None]:
    """While ``model`` runs: note the layers whose weights are read by code that is not theirs."""
    held: list[tuple[nn.Module, dict[str, Any]]] = []
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            vars(layer).pop(MARK, None)
            names = {site.removesuffix("_quantizer") for site, q in layer.own_quantizers() if q.bits != OFF}
            if names.intersection(layer._parameters):
                held.append((layer, layer._parameters))
                vars(layer)["_parameters"] = _Noting(layer, names)
    try:
        yield
    finally:
        for layer, parameters in held:
            made = dict(dict.items(layer._parameters))
            parameters.clear()
            parameters.update(made)
            vars(layer)["_parameters"] = parameters


class _Noting(dict[str, Any]):
    """The parameters of a layer."""

    def __init__(self, layer: nn.Module, names: set[str]) -> None:
        super().__init__(layer._parameters)
        self._layer, self._names = layer, names

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if name not in self._names or torch.compiler.is_compiling() or readings(self._layer) is not None:
            return value
        return NotedWeight.of(value, self._layer) if isinstance(value, Tensor) and _is_read_outside() else value


def _is_read_outside() -> bool:
    """Whether it is code of the model, or of a library, that asks a layer for an attribute."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name == "__getattr__" and _is_infrastructure(frame):
        frame = frame.f_back
    return not _is_infrastructure(frame)


def _is_infrastructure(frame: Any) -> bool:
    return f"{frame.f_globals.get('__name__')}.".startswith(INFRASTRUCTURE)


def _asking() -> set[Any]:
    """Functions that ask a tensor for no value."""
    members = [getattr(Tensor, name) for name in ABOUT if hasattr(Tensor, name)]
    found = {member if callable(member) else member.__get__ for member in members}
    return {*found, *(getattr(torch, f"{name}_like") for name in ("zeros", "ones", "empty", "full", "rand", "randn"))}


_ASKING = _asking()
_AS_OTHER = {Tensor.to, Tensor.type_as}  # of another tensor, whose dtype and device are taken


class NotedWeight(Tensor):
    """A weight that notes the first operation on its values."""

    _layer: nn.Module

    @staticmethod
    def of(value: Tensor, layer: nn.Module) -> NotedWeight:
        weight = value.as_subclass(NotedWeight)
        weight._layer = layer
        weight._is_param = isinstance(value, nn.Parameter)
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _ASKING and not (func in _AS_OTHER and not isinstance(args[0], cls)):
                for leaf in tree_leaves([args, kwargs]):
                    if isinstance(leaf, cls):
                        vars(leaf._layer)[MARK] = True
            out = func(*args, **kwargs)
            return out.as_subclass(Tensor) if isinstance(out, cls) else out
