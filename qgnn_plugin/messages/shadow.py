"""Copies of a layer to run its functions on: the same tensors, while what is written to the copy stays there."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from functools import cache
from operator import is_
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

__all__ = [
    "NotTraceable",
    "Snapshot",
    "expect_no_side_effects",
    "fingerprint",
    "named_tensors",
    "shadow_of",
    "written",
]

_PLAIN = (bool, int, float, str, type(None))
_LIBRARIES = ("torch.", "torch_geometric.", "builtins.", f"{__name__.partition('.')[0]}.")
_AROUND = ("__init__", "forward", "reset_parameters", "__repr__", "extra_repr")


class NotTraceable(Exception):
    """A message that is not traced; says why."""


def shadow_of(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None], memo: dict[int, Any]) -> Any:
    """A copy of ``module`` and of those inside it, that shares tensors.

    Args:
        module: The original.
        replace: Gives what takes the place of a module inside it; :obj:`None` for a copy.
        memo: Copies by the identity of the original.
    """
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = copy = object.__new__(type(module))
    state = {name: _copied(value) for name, value in module.__dict__.items()}
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = dict(module.__dict__[name])
    copy.__dict__.update(state)
    for name, child in module._modules.items():
        if child is not None:
            state["_modules"][name] = replace(child) or shadow_of(child, replace, memo)
    return copy


def _copied(value: Any) -> Any:
    """Containers are copied, so that what is put into them is seen and the layer's own stay as they are."""
    return type(value)(value) if type(value) in (list, dict, set) else value


def written(module: nn.Module, copy: Any) -> dict[str, Any]:
    """What was written to the copy itself since it was made, by name.

    Raises:
        NotTraceable: If something was written to a module inside it, or put into a container.
    """
    found = dict(_changes(module, copy))
    if any(isinstance(value, (list, dict, set)) for value in found.values()):
        raise NotTraceable(f"its functions write to {', '.join(sorted(found))}")
    for name, child in module._modules.items():
        inner = copy._modules.get(name)
        if child is None or type(inner) is not type(child):
            continue
        if written(child, inner):
            raise NotTraceable(f"its functions write to '{name}'")
    return found


def _changes(module: nn.Module, copy: Any) -> Iterator[tuple[str, Any]]:
    before, after = module.__dict__, copy.__dict__
    was: Any
    now: Any
    for name in before.keys() | after.keys():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        was, now = before.get(name), after.get(name)
        same = len(was) == len(now) if type(was) in (list, dict, set) and type(now) is type(was) else was is now
        if not same or name not in after:
            yield name, now


def named_tensors(copy: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the parameters and buffers of a copy are: its modules' dictionaries and names."""
    found = []
    for module in copy.modules():
        for held in (module._parameters, module._buffers):
            found += [(held, name) for name, value in held.items() if isinstance(value, Tensor)]
    return found


class _Same:
    """Equal to what holds the very same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@cache
def _own_functions(cls: type) -> tuple[FunctionType, ...]:
    """Functions that a user's classes define, but for those that run before or around messages."""
    found = []
    for base in cls.__mro__:
        if f"{base.__module__}.".startswith(_LIBRARIES):
            continue
        functions = [value for value in vars(base).values() if isinstance(value, FunctionType)]
        # Those that PyG has written onto the class are of modules of their own.
        found += [f for f in functions if f.__module__ == base.__module__ and f.__name__ not in _AROUND]
    return tuple(found)


@cache
def _numbers_around(cls: type) -> tuple[tuple[dict[str, Any], str], ...]:
    """Variables of their modules that are numbers: where they are, and their names."""
    found = {}
    for function in _own_functions(cls):
        names = function.__globals__
        for name in _globals(function.__code__):
            if name in names and isinstance(names[name], _PLAIN):
                found[id(names), name] = (names, name)
    return tuple(found.values())


def fingerprint(layer: nn.Module) -> tuple[Any, ...]:
    """What a trace may depend on beside the values of tensors: plain attributes, and which tensors there are."""
    cls: Any = type(layer)
    found: list[Any] = [(names.get(name, _Same(None)), name) for names, name in _numbers_around(cls)]
    for module in layer.modules():
        found.append(type(module))
        for name, value in module.__dict__.items():
            if isinstance(value, _PLAIN):
                found.append((name, value))
            elif isinstance(value, (tuple, list)) and all(isinstance(part, _PLAIN) for part in value):
                found.append((name, tuple(value)))
            elif callable(value) or isinstance(value, Tensor):
                found.append((name, _Same(value)))
        for held in (module._parameters, module._buffers):
            found += [(name, None if value is None else (value.shape, value.dtype)) for name, value in held.items()]
    return tuple(found)


class Snapshot:
    """What :func:`fingerprint` looks at, as objects: finds in a microsecond per module that nothing was replaced.

    It holds what is inside the layer, and not the layer itself.
    """

    def __init__(self, layer: nn.Module) -> None:
        children = list(layer.modules())[1:]
        self.children = [(child, type(child), child.__dict__) for child in children]
        cls: Any = type(layer)
        self.cls, self.state = cls, layer.__dict__
        states = [layer.__dict__, *(child.__dict__ for child in children)]
        held = [state[name] for state in states for name in ("_parameters", "_buffers", "_modules")]
        # Not as iterables: those of scripted modules have keys and values, and no more of a dict.
        self.dicts = [(d, tuple(d.keys()), tuple(d.values())) for d in (*states, *held)]
        self.numbers = [(names, name, names.get(name)) for names, name in _numbers_around(cls)]
        values = [value for state in states for value in state.values()]
        self.lists = [(value, tuple(value)) for value in values if type(value) is list]
        tensors = [t for state in states for kind in ("_parameters", "_buffers") for t in state[kind].values()]
        self.shapes = [(t, t.shape, t.dtype) for t in tensors if t is not None]

    def holds(self, layer: nn.Module) -> bool:
        """Whether :func:`fingerprint` would be what it was; where that takes a closer look, it says no."""
        if type(layer) is not self.cls or layer.__dict__ is not self.state:
            return False
        if any(type(child) is not cls or child.__dict__ is not state for child, cls, state in self.children):
            return False
        for found, names, values in self.dicts:
            if tuple(found.keys()) != names or not all(map(is_, found.values(), values)):
                return False
        if any(names.get(name) is not value for names, name, value in self.numbers):
            return False
        if any(len(value) != len(parts) or not all(map(is_, value, parts)) for value, parts in self.lists):
            return False
        return all(t.shape == shape and t.dtype == dtype for t, shape, dtype in self.shapes)


def expect_no_side_effects(layer: nn.Module) -> None:
    """Refuse functions of the user's own that reach for something to change: a closure, a container, a ``print``.

    Raises:
        NotTraceable: If there are any.
    """
    cls: Any = type(layer)
    read = {name for function in _own_functions(cls) for name in function.__code__.co_names}
    for name, value in layer.__dict__.items():
        if name in read and not _is_compared(value):
            raise NotTraceable(f"its '{name}' may change unseen")
    for stage in ("message", "aggregate"):
        function = getattr(type(layer), stage, None)
        if not isinstance(function, FunctionType) or function.__module__.startswith("torch_geometric."):
            continue
        if function.__closure__ and any(not _is_class_cell(cell) for cell in function.__closure__):
            raise NotTraceable(f"its {stage} refers to variables around it")
        names = _globals(function.__code__)
        for name in names:
            value = function.__globals__.get(name)
            if name == "print" or isinstance(value, (list, dict, set)):
                raise NotTraceable(f"its {stage} uses '{name}'")


def _is_compared(value: Any) -> bool:
    """Whether an attribute is one of those that :func:`fingerprint` compares, or a container of PyTorch's."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(part, _PLAIN) for part in value)
    return isinstance(value, (*_PLAIN, Tensor, nn.Module)) or callable(value) or type(value) is dict


def _is_class_cell(cell: Any) -> bool:
    """Whether a closure's cell holds what ``super()`` needs, or another class or function."""
    try:
        value = cell.cell_contents
    except ValueError:
        return False
    return isinstance(value, (type, FunctionType))


def _globals(code: CodeType) -> set[str]:
    reads = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
    return {str(i.argval) for i in dis.get_instructions(code) if i.opname in reads}
