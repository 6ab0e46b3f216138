"""Layers that a model holds where torch does not look: in lists, dictionaries, functions and plain objects.

They are in no ``modules()``, so nothing converts them, no optimizer gets their weights and no state dict has them.  A
model may mean that, as with a teacher kept out of the way in a list; others have forgotten an ``nn.ModuleList``.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .copying import builtin_of

__all__ = ["unregistered_layers"]

DEPTH = 4
LIBRARIES = (
    "torch.", "torch_geometric.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "torchmetrics.", "numpy.",
    "qgnn_plugin.", "builtins.", "collections.", "networkx.", "scipy.",
)  # fmt: skip


def unregistered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that attributes of ``model``, or of a module in it, lead to past ``modules()``, by where they are."""
    known = {id(module) for module in model.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = vars(nn.Module())
        for key, value in vars(module).items():
            if key in own or key.startswith("_packed") or isinstance(value, nn.Module):
                continue
            for where, layer in _layers_in(value, f"{name}.{key}" if name else key, DEPTH, known):
                found[where] = layer
                known |= {id(inner) for inner in layer.modules()}
    return found


def _layers_in(value: Any, where: str, depth: int, known: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        if id(value) not in known:
            yield where, value
        return
    for place, part in _parts(value) if depth else ():
        yield from _layers_in(part, f"{where}{place}", depth - 1, known)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What ``value`` holds, and how it is come to."""
    if isinstance(value, (str, bytes, type, Tensor, types.ModuleType)):
        return
    base = builtin_of(value)
    if base in (list, tuple, deque):
        yield from ((f"[{i}]", part) for i, part in enumerate(base.__iter__(value)))
    elif base in (set, frozenset):
        yield from (("{...}", part) for part in base.__iter__(value))
    elif base is dict:
        yield from ((f"[{key!r}]", part) for key, part in dict.items(value))
    elif isinstance(value, functools.partial):
        yield from (("(...)", part) for part in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield "(...)", cell.cell_contents
            except ValueError:  # of a name that is not given a value yet
                continue
        yield from (("(...)", part) for part in value.__defaults__ or ())
    elif not f"{type(value).__module__}.".startswith(LIBRARIES) or isinstance(value, types.SimpleNamespace):
        yield from ((f".{key}", part) for key, part in getattr(value, "__dict__", {}).items())
