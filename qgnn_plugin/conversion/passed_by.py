"""Code that would pass a converted layer by: what compares its class, or holds its ``forward``."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..inputs import Forward, run_model, tensors_in
from ..layers.base import QuantizedLayer
from ..layers.naming import float_class_of
from .copying import reachable

__all__ = ["Reached", "check_methods", "functions_of", "takes_tensors_alone", "warn_of_comparisons"]

FRAMEWORK = ("torch.", "torch_geometric.", "pytorch_lightning.", "lightning.", f"{__name__.partition('.')[0]}.")
SHOWN = 5
READERS = {"to_dlpack"}  # functions in C++ that take the memory of a tensor as it is


def check_methods(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose ``forward`` is held somewhere as a method: a call of it would be one of the float layer.

    Args:
        model: A model that is about to be converted.
        layers: Those of its layers that are, by name.

    Raises:
        ValueError: If there is one.
    """
    names = {id(layer): name for name, layer in layers.items()}
    for value in reachable(model):
        if not isinstance(value, types.MethodType) or id(value.__self__) not in names:
            continue
        layer: Any = value.__self__
        # One that has a forward of its own, which may well call the method, is refused for that.
        if value.__func__.__name__ == "forward" and "forward" not in vars(layer):
            raise ValueError(
                f"Expected '{names[id(layer)]}', a {type(layer).__name__}, to be kept as a layer (got its method "
                f"'forward' in an attribute of the model, which is that of the float layer for good); keep the layer "
                f"and call it, or exclude it"
            )


# The user's code ######################################################################################################

CALLED = 2  # how far functions are followed that methods call by their name


def functions_of(owner: type) -> Iterator[tuple[str, ast.AST, _Names]]:
    """The methods of ``owner``, and the functions that they call by name, apart from those of the framework's: what
    they are called, their code, and what names mean in it."""
    seen: set[Any] = set()
    for base in owner.__mro__:
        if base is object or f"{base.__module__}.".startswith(FRAMEWORK):
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if inspect.isfunction(method) else None
            if function is not None and name != "__init__":
                yield from _with_called(f"{base.__name__}.{name}", function, base, CALLED, seen)


def _with_called(
    name: str, function: types.FunctionType, owner: type, depth: int, seen: set[Any]
) -> Iterator[tuple[str, ast.AST, _Names]]:
    if function.__code__ in seen or f"{function.__module__}.".startswith(FRAMEWORK):
        return
    seen.add(function.__code__)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return
    known = _Names(function, owner)
    yield name, tree, known
    for called in function.__code__.co_names if depth else ():
        value = known.names.get(called)
        if inspect.isfunction(value):
            yield from _with_called(called, inspect.unwrap(value), owner, depth - 1, seen)


# Comparisons of classes ###############################################################################################


def warn_of_comparisons(model: nn.Module, stacklevel: int) -> None:
    """Warn where the model's own code compares ``type(layer)`` with the class of a converted layer."""
    classes = {type(m).float_class for m in model.modules() if isinstance(m, QuantizedLayer)}
    owners = {float_class_of(m) for m in model.modules()}
    found = sorted({text for owner in owners for text in _comparisons(owner, classes)})
    if found:
        warnings.warn(
            f"Converted layers are of subclasses, which {'; '.join(found[:SHOWN])} does not find: layers told apart so "
            f"are passed by; use isinstance, which is true of both",
            stacklevel=stacklevel + 1,
        )


def _comparisons(owner: type, classes: set[type]) -> Iterator[str]:
    """Where code of ``owner`` compares the class of something with one of ``classes``, in words."""
    for name, function, known in functions_of(owner):
        for node in ast.walk(function):
            if any(known.has_one_of(other, classes) for other in _compared_with(node)):
                yield f"'{ast.unparse(node)}' in {name}"


def takes_tensors_alone(model: nn.Module) -> bool:
    """Whether the model's own code takes tensors alone, and no subclass.

    It asks whether the class of something is that of tensors, or hands memory on past Python.
    """
    owners = {float_class_of(module) for module in model.modules()}
    return any(_asks_for_tensors(owner) for owner in owners)


def _asks_for_tensors(owner: type) -> bool:
    for _, function, known in functions_of(owner):
        for node in ast.walk(function):
            if isinstance(node, (ast.Attribute, ast.Name)) and _name(node) in READERS:
                return True
            if any(known.has_one_of(other, {torch.Tensor}) for other in _compared_with(node)):
                return True
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                named = any(isinstance(s, ast.Attribute) and s.attr == "__name__" and _is_class(s.value) for s in sides)
                texts = (part for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant))
                if named and any(part.value == "Tensor" for part in texts):
                    return True
    return False


def _name(node: ast.Attribute | ast.Name) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id


def _compared_with(node: ast.AST) -> list[ast.expr]:
    """What the class of something is compared with, or looked up in."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return [side for side in sides if not _is_class(side)] if any(map(_is_class, sides)) else []
    if isinstance(node, ast.Subscript) and _is_class(node.slice):
        return [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        return [node.func.value] if node.args and _is_class(node.args[0]) else []
    return []


def _is_class(node: ast.expr) -> bool:
    """Whether ``node`` is ``type(x)`` or ``x.__class__``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "type" and len(node.args) == 1
    return isinstance(node, ast.Attribute) and node.attr == "__class__"


class _Names:
    """What names mean in a function of a class."""

    def __init__(self, function: types.FunctionType, owner: type) -> None:
        try:
            nonlocals = inspect.getclosurevars(function).nonlocals
        except ValueError:  # of names that are not given a value yet
            nonlocals = {}
        self.names = {**function.__globals__, **nonlocals}
        self.owner = owner

    def has_one_of(self, node: ast.expr, classes: set[type]) -> bool:
        """Whether ``node`` is one of ``classes``, or a collection with one."""
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(self.has_one_of(item, classes) for item in node.elts)
        if isinstance(node, ast.Dict):
            return any(key is not None and self.has_one_of(key, classes) for key in node.keys)
        value = self._value(node)
        if isinstance(value, (tuple, list, set, frozenset, dict)):
            return any(isinstance(item, type) and item in classes for item in value)
        return isinstance(value, type) and value in classes

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                return inspect.getattr_static(self.owner, node.attr, None)
            outer = self._value(node.value)
            return None if outer is None else inspect.getattr_static(outer, node.attr, None)
        return None


# What data reach ######################################################################################################


class Reached:
    """Which converted layers are called, where nothing passes their sites either."""

    def __init__(self, qmodel: nn.Module) -> None:
        named = qmodel.named_modules()
        self._layers: dict[str, Any] = {n: m for n, m in named if isinstance(m, QuantizedLayer) and not m.is_off}
        self._model = qmodel
        self._idle = set(self._layers)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the first batch runs."""
        with _noting_calls(self._layers) as called:
            yield
        self._idle -= called

    def expect_all(self, batch: Any, forward: Forward | None) -> None:
        """Raise where layers that a batch comes to in the float model are passed by in the converted one.

        Args:
            batch: The first one, as long as sites observe.
            forward: Runs the model, as in :func:`qgnn_plugin.calibrate`.

        Raises:
            ValueError: If there is such a layer, or no batch came to any layer.
        """
        sites = {name: [q.values_seen for _, q in self._layers[name].own_quantizers()] for name in self._idle}
        idle = {name: self._layers[name] for name, seen in sorted(sites.items()) if not any(seen)}
        if not idle:
            return
        called = self._called_as_float(idle, batch, forward)
        missed = [name for name in idle if name in called and not any(name.startswith(f"{n}.") for n in called)]
        if missed:
            kind = type(idle[missed[0]]).__name__
            listed = ", ".join(f"'{name}' ({type(idle[name]).__name__})" for name in missed[:SHOWN])
            raise ValueError(
                f"Expected the converted model to call the layers that the float model calls (got {listed} passed by): "
                f"its code tells layers by what conversion changes, as 'type(layer) is {kind}' does, which is not true "
                f"of a subclass; use isinstance(layer, {kind}), or exclude these layers"
            )
        if len(idle) == len(self._layers):
            raise ValueError(
                f"Expected data to come to a converted layer (got none at {', '.join(map(repr, list(idle)[:SHOWN]))}, "
                f"nor in the float model); calibrate on data, or with a 'forward', that run them"
            )

    def _called_as_float(self, idle: Mapping[str, Any], batch: Any, forward: Forward | None) -> set[str]:
        """Which of the layers ``idle`` a batch comes to where all layers are of their own classes."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        classes = [(layer, type(layer)) for layer in self._layers.values()]
        try:
            for layer, cls in classes:
                layer.__class__ = cls.float_class
            with _noting_calls(idle) as called, torch.random.fork_rng(devices=[]):
                run_model(self._model, batch, forward)
        except Exception:  # of code that knows it runs converted: it tells nothing then
            return set()
        finally:
            for layer, cls in classes:
                layer.__class__ = cls
            for buffer, value in buffers:  # such as a memory that each batch is written to
                buffer.copy_(value)
        return called


@contextmanager
def _noting_calls(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The names of those of ``layers`` that are called with something."""
    called: set[str] = set()

    def note(name: str, args: Any, kwargs: Any) -> None:
        if any(tensor.numel() for tensor in tensors_in([args, kwargs])):
            called.add(name)

    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, *given, name=name: note(name, *given), with_kwargs=True)
            stack.callback(hook.remove)
        yield called
