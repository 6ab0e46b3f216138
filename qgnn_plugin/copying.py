"""Copies of models that hold more than parameters and buffers."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copy_model", "copying_memo"]

# Copied by reference, or holding nothing that a model computes.
ATOMIC = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float, complex, bool)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``, also where :func:`copy.deepcopy` refuses or spoils it.

    A tensor that the model has computed and kept, such as its last embedding, is detached in the copy: it belongs to a
    graph through the original's parameters.  The parameters of a copied ``torch.jit.ScriptModule`` are leaves.
    """
    return copy.deepcopy(model, copying_memo(model))


def copying_memo(model: nn.Module) -> dict[int, Any]:
    """What :func:`copy.deepcopy` takes in place of the parts of ``model`` that :func:`copy_model` mends."""
    memo: dict[int, Any] = {}
    for value in _reachable(model):
        if isinstance(value, torch.jit.ScriptModule):
            memo[id(value)] = _copy_scripted(value)
        elif not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif value.grad is not None and not value.grad.is_leaf:  # of backward(create_graph=True)
            memo[id(value)] = _copy_leaf(value)
    return memo


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


def _reachable(root: Any) -> Iterator[Any]:
    """Every tensor and scripted module that a deep copy of ``root`` comes to."""
    seen: set[int] = set()
    held = []  # containers made on the way: an id is unique only while its object lives
    queue: deque[Any] = deque([root])
    while queue:
        value = queue.popleft()
        if value is None or isinstance(value, ATOMIC) or id(value) in seen:
            continue
        seen.add(id(value))
        held.append(value)
        if isinstance(value, (Tensor, torch.jit.ScriptModule)):
            yield value
            continue
        queue.extend(_parts(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__]
    else:
        parts = []
    parts += getattr(value, "__dict__", {}).values()
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            parts.append(getattr(value, name, None))
    return parts
