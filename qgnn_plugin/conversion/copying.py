"""Copies of models that hold more than parameters and buffers."""

from __future__ import annotations

import copy
import copyreg
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CopyingMemo", "builtin_of", "copy_model", "copying_memo", "ordinary_tensors", "reachable"]

# Copied by reference, or holding nothing that a model computes.
ATOMIC = (type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, complex, bool)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``, also where :func:`copy.deepcopy` refuses or spoils it.

    A tensor that the model has computed and kept, such as its last embedding, is detached in the copy: it belongs to a
    graph through the original's parameters.  The parameters of a copied ``torch.jit.ScriptModule`` are leaves.  A
    function that the model holds and that refers to a part of it, such as ``self.read = lambda x: self.head(x)``,
    refers to that of the copy, as a weak reference does that one part holds to another.  Hooks on gradients of
    parameters are kept, which a deep copy drops.  What cannot be copied and holds no part of the model, such as a lock,
    an open file or a writer of logs, is shared.
    """
    with ordinary_tensors():
        memo = copying_memo(model)
        copied = copy.deepcopy(model, memo)
        memo.complete()
    return copied


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make ordinary tensors in ``torch.inference_mode`` too, for a model that outlives it.

    Nothing outside of it may write to those that are made in it, as training and ``load_state_dict`` do.
    """
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


class CopyingMemo(dict[int, Any]):
    """A memo of :func:`copy.deepcopy`, to be completed once the model is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[tuple[types.FunctionType, types.FunctionType]] = []
        self.parts: dict[int, Any] = {}  # of the model, by identity

    def add_function(self, function: types.FunctionType) -> None:
        """Have a copy of ``function`` take its place."""
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        copied = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        functools.update_wrapper(copied, function, updated=())
        vars(copied).pop("__wrapped__", None)
        vars(copied).update(vars(function))
        self[id(function)] = copied
        self.functions.append((function, copied))

    def complete(self) -> None:
        """Have copied functions and references refer to the parts of the copy, and its parameters keep their hooks."""
        for part in self.parts.values():
            copied = self.get(id(part))
            if isinstance(part, nn.Module) and isinstance(copied, nn.Module):
                for name, value in vars(part).items():
                    if isinstance(value, weakref.ref) and id(value()) in self.parts:
                        vars(copied)[name] = weakref.ref(self[id(value())])
            elif isinstance(part, nn.Parameter) and isinstance(copied, nn.Parameter) and copied.requires_grad:
                for hook in _gradient_hooks(part):
                    copied.register_hook(self._taken(hook))
        for function, copied in self.functions:
            for cell, target in zip(function.__closure__ or (), copied.__closure__ or (), strict=True):
                if (content := _content(cell)) is not cell:
                    target.cell_contents = self._taken(content)
            if function.__defaults__ is not None:
                copied.__defaults__ = tuple(map(self._taken, function.__defaults__))
            if function.__kwdefaults__ is not None:
                copied.__kwdefaults__ = {name: self._taken(value) for name, value in function.__kwdefaults__.items()}

    def _taken(self, value: Any) -> Any:
        return copy.deepcopy(value, self) if self.refers(value) else value

    def refers(self, value: Any, depth: int = 4) -> bool:
        """Whether ``value`` is a part of the model, or holds one where functions have them."""
        if id(value) in self.parts:
            return True
        if depth == 0 or isinstance(value, (Tensor, nn.Module, *ATOMIC)):
            return False
        if isinstance(value, types.FunctionType):
            parts: list[Any] = _held(value)
        elif isinstance(value, (types.MethodType, functools.partial, list, tuple, set, dict)):
            parts = _parts(value)
        else:
            return False
        return any(self.refers(part, depth - 1) for part in parts)


def copying_memo(model: nn.Module) -> CopyingMemo:
    """What :func:`copy.deepcopy` takes in place of the parts of ``model`` that :func:`copy_model` mends.

    It is to be completed when everything is copied.
    """
    memo = CopyingMemo()
    memo.parts = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    memo.update({id(value): value for value in _shared(model, memo.parts)})
    for value in reachable([model, *(hook for p in model.parameters() for hook in _gradient_hooks(p))]):
        if isinstance(value, types.FunctionType):
            if memo.refers(value):
                memo.add_function(value)
        elif isinstance(value, types.MethodType):
            continue
        elif isinstance(value, torch.jit.ScriptModule):
            memo[id(value)] = _copy_scripted(value)
        elif not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif value.grad is not None and not value.grad.is_leaf:  # of backward(create_graph=True)
            memo[id(value)] = _copy_leaf(value)
    return memo


def _gradient_hooks(parameter: Tensor) -> list[Any]:
    return list((parameter._backward_hooks or {}).values())


def _shared(model: nn.Module, own: dict[int, Any]) -> Iterator[Any]:
    """The outermost objects that cannot be copied, or hold such a thing, and hold nothing of ``own``."""
    if not any(map(_is_uncopyable, _walk(model))):
        return
    for value in _walk(model, enter=lambda value: not _is_apart(value, own)):
        if _is_apart(value, own) and any(map(_is_uncopyable, _walk(value))):
            yield value


def _is_apart(value: Any, own: dict[int, Any]) -> bool:
    """Whether ``value`` is an object that holds nothing of ``own``."""
    return not isinstance(value, (nn.Module, Tensor, *_TRANSPARENT)) and all(id(v) not in own for v in _walk(value))


def _is_uncopyable(value: Any) -> bool:
    """Whether :func:`copy.deepcopy` refuses ``value`` itself, not something inside it."""
    cls: Any = type(value)
    known = cls in copy._deepcopy_dispatch or cls in copyreg.dispatch_table or hasattr(cls, "__deepcopy__")  # type: ignore[attr-defined]
    if known or isinstance(value, torch.jit.ScriptModule):
        return False
    try:
        value.__reduce_ex__(4)
    except Exception:  # of any class
        return True
    return False


def _copy_leaf(value: Tensor) -> Tensor:
    copied = value.detach().clone()
    if isinstance(value, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=value.requires_grad)
    else:
        copied.requires_grad_(value.requires_grad)
    assert value.grad is not None
    copied.grad = value.grad.detach().clone()
    return copied


def _copy_scripted(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    with torch.no_grad():  # its tensors are cloned, which would make them results
        copied = copy.deepcopy(module)
    for mine, theirs in zip(copied.parameters(), module.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return copied


def reachable(root: Any) -> Iterator[Any]:
    """Every tensor, scripted module, function and method that a deep copy of ``root`` comes to."""
    kinds = (Tensor, torch.jit.ScriptModule, types.FunctionType, types.MethodType)
    return (value for value in _walk(root) if isinstance(value, kinds))


def _walk(root: Any, enter: Callable[[Any], bool] = lambda value: True) -> Iterator[Any]:
    """All that a deep copy of ``root`` comes to, but for constants and what is inside of tensors and scripted modules.

    Args:
        root: Where to begin.
        enter: Whether to go on inside of a value.
    """
    seen: set[int] = set()
    held = []  # containers made on the way: an id is unique only while its object lives
    queue: deque[Any] = deque([root])
    while queue:
        value = queue.popleft()
        is_constant = isinstance(value, ATOMIC) and not isinstance(value, types.ModuleType)
        if value is None or id(value) in seen or is_constant:
            continue
        seen.add(id(value))
        held.append(value)
        yield value
        if not isinstance(value, (Tensor, torch.jit.ScriptModule, types.ModuleType)) and enter(value):
            queue.extend(_parts(value))


def _parts(value: Any) -> list[Any]:
    base = builtin_of(value)
    if base is dict:
        parts = [*dict.keys(value), *dict.values(value)]
    elif base is not None:
        parts = [*base.__iter__(value)]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        return [value.__self__]
    elif isinstance(value, types.FunctionType):
        return [part for part in _held(value) if isinstance(part, _CALLABLE)]
    else:
        parts = []
    parts += _state(value).values()
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            parts.append(getattr(value, name, None))
    return parts


def builtin_of(value: Any) -> Any:
    """The container that ``value`` is at heart, whose own iterator comes to what a class of it may hide, or nothing."""
    return next((base for base in _CONTAINERS if isinstance(value, base)), None)


def _state(value: Any) -> dict[str, Any]:
    """The attributes of ``value`` that are copied: a LightningModule leaves its trainer out."""
    own = getattr(type(value), "__getstate__", None)
    if own in (None, getattr(object, "__getstate__", None)) or hasattr(type(value), "__deepcopy__"):
        return getattr(value, "__dict__", {})
    state = value.__getstate__()
    return state if isinstance(state, dict) else {}


_CONTAINERS = (tuple, list, set, frozenset, deque, dict)
_CALLABLE = (types.FunctionType, types.MethodType, functools.partial)
_TRANSPARENT = (*_CALLABLE, *_CONTAINERS)


def _held(function: types.FunctionType) -> list[Any]:
    """What a function refers to besides globals."""
    cells = (_content(cell) for cell in function.__closure__ or ())
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _content(cell: types.CellType) -> Any:
    """What ``cell`` holds; the cell itself where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell
