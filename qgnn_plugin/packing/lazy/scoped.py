"""Packed models whose layers may defer their results while the model runs (see :mod:`.deferred`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from . import deferred
from .calls import Scope, is_deferring
from .deferred import materialized
from .gathers import Gathering
from .weight import refuse_dtype

__all__ = ["defer_inside"]


def defer_inside(model: nn.Module) -> None:
    """Let the layers of ``model`` defer their results while it runs; what it returns are plain tensors.

    Its class is swapped for one that sees to that: hooks would not run where a call is interrupted.
    """
    if "inner_class" not in vars(type(model)):
        model.__class__ = _deferring_class(type(model))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _deferring_class(inner: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``inner`` whose calls open a scope, made once, under its name.

    It has no other base, since some classes find themselves among those of their instances (``fx.GraphModule``), and
    holds what PyG would otherwise generate onto it, past a layer that is the model itself.
    """
    if inner not in _CLASSES:
        names = ("__module__", "__qualname__", "__doc__")
        namespace: dict[str, Any] = {name: getattr(inner, name) for name in names}
        namespace |= {name: getattr(inner, name) for name in _GENERATED if hasattr(inner, name)}

        def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            refuse_dtype(type(self).__name__, fn)  # before any tensor is changed
            return inner._apply(self, fn, recurse)

        def train(self: Any, mode: bool = True) -> Any:
            for module in self.modules() if mode is False else ():
                if getattr(type(module), "_is_packed", False):  # before what calls it as it leaves
                    module.training = False
            return inner.train(self, mode)

        def reduce_ex(self: Any, protocol: Any) -> Any:
            reduced: Any = inner.__reduce_ex__(self, protocol)
            make, args, *rest = reduced
            args = tuple(inner if arg is type(self) else arg for arg in args)
            return _rebuild, (make, args), *rest

        namespace |= {"inner_class": inner, "forward": _scoped(inner), "_apply": apply, "train": train}
        namespace["__reduce_ex__"] = reduce_ex
        if hasattr(inner, "__deepcopy__"):
            namespace["__deepcopy__"] = _deferring_copy(inner)
        if issubclass(inner, GraphModule):
            namespace["recompile"] = _recompiling(inner)
        _CLASSES[inner] = type(inner.__name__, (inner,), namespace)
    return _CLASSES[inner]


_GENERATED = tuple(f"{prefix}{name}" for name in ("propagate", "edge_updater") for prefix in ("", "_orig_", "_jinja_"))


def _scoped(inner: Any) -> Callable[..., Any]:
    """The ``forward`` of a class in a scope of its own; hooks of the model run outside."""

    @functools.wraps(inner.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return inner.forward(self, *args, **kwargs)
        with Scope(Gathering.of(args, kwargs) if not is_deferring() else None) as scope:
            out = inner.forward(self, *args, **kwargs)
            scope.end_mode()  # it would see, and slow down, every function by which results are computed
            return materialized(out)

    return forward


def _deferring_copy(inner: Any) -> Callable[..., Any]:
    """The ``__deepcopy__`` of a class that has its own, which makes a model of a class that it knows."""

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        copied = inner.__deepcopy__(self, memo)
        if isinstance(copied, nn.Module):
            defer_inside(copied)
        return copied

    return deepcopy


def _recompiling(inner: Any) -> Callable[..., Any]:
    """The ``recompile`` of a traced model, which writes ``forward`` and ``__call__`` onto the class of its instance:
    onto ``inner``, so that the scope stays around them.  Pickling recompiles too.
    """

    def recompile(self: Any) -> Any:
        own = type(self)
        self.__class__ = inner
        try:
            return inner.recompile(self)
        finally:
            self.__class__ = own

    return recompile


def _rebuild(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    model = make(*args)
    defer_inside(model)
    return model


# Pickles of the time when hooks opened the scope name these two: the first call puts the class in their place.


def _enter(model: nn.Module, args: Any) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
    defer_inside(model)


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    """Nothing: :func:`_enter` has taken it off."""


# The module by which pickles of earlier versions know them.
vars(deferred).update(_enter=_enter, _leave=_leave, _rebuild=_rebuild)
