"""What decides, beside the tensors, what a model computes: the classes of its modules and their plain attributes."""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import inspect
import math
import types
import weakref
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch_geometric.nn.models.rev_gnn import InvertibleModule

from ...config import SMPConfig
from ...conversion.converted import SPECS
from ...layers.base import QuantizerDict, float_state
from ...layers.naming import float_class_of
from ...quantizers import QLRQuantizer
from ...smp.constraint import CONSTRAINT_ATTRIBUTES, SmoothLayer
from ..layers.ranges import PackedRange
from ..layers.weights import PackedWeight

__all__ = ["Difference", "ModuleSettings", "first_difference", "settings_of"]

# What changes initial values, training or speed, and nothing else.
IRRELEVANT = {"training", "inplace", "cached", "explain", "momentum", "decomposed_layers", "fuse"}
IRRELEVANT |= {"weight_initializer", "bias_initializer", *CONSTRAINT_ATTRIBUTES, SPECS}
OF_TRAINING: dict[type[nn.Module], set[str]] = {InvertibleModule: {"disable", "num_bwd_passes"}}  # of these classes
DROPOUT = "dropout"  # in the name of an attribute: a rate, which eval mode does not know

FRAMEWORKS = {"torch", "torch_geometric", "pytorch_lightning", "lightning", "torchmetrics"}
MODULE_NAMES = frozenset(vars(nn.Module()))
LARGEST = 64  # elements of a collection, and characters of a name, that are a setting and not data
DEEPEST = 4
LONGEST = 1000

_OTHER = object()  # not a plain value


class ModuleSettings(NamedTuple):
    """One module: the name of its (float) class, and its plain attributes."""

    type: str
    values: Mapping[str, Any]


class Difference(NamedTuple):
    """Where two models differ: in what, and how it is in either."""

    what: str
    saved: str
    found: str


def settings_of(model: nn.Module) -> dict[str, ModuleSettings]:
    """The settings of a float, converted or packed model, by the qualified names of its modules.

    Values are such as JSON knows.  Left out are dropout, which does nothing in eval mode, and what conversion adds.
    """
    return {
        name: ModuleSettings(float_class_of(module).__name__, _values(module))
        for name, module in model.named_modules()
        if not isinstance(module, (QLRQuantizer, QuantizerDict, PackedRange, PackedWeight, _DropoutNd, nn.Identity))
    }


def _values(module: nn.Module) -> dict[str, Any]:
    cls = float_class_of(module)
    private, state = _is_users_own(cls), _assigned_by_running(cls)
    state = state.union(*(names for base, names in OF_TRAINING.items() if issubclass(cls, base)))
    found = {}
    for name, value in float_state(module).items():
        hidden = name.startswith("_") and (not private or name.startswith("__") or name in MODULE_NAMES)
        if hidden or name in IRRELEVANT or name in state or DROPOUT in name:
            continue
        plain = _plain(value)
        if plain is not _OTHER:
            found[name] = plain
    smp = getattr(module, "smp", None) if issubclass(cls, SmoothLayer) else None  # its own, not of conversion
    if isinstance(smp, SMPConfig):
        found |= {"smp": smp.acting(), "eta": smp.eta, "mu": _plain(smp.mu)}
    return found


_RUNNING: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def _assigned_by_running(cls: type) -> frozenset[str]:
    """Attributes that ``forward``, or what it calls of its class, assigns: what it has seen, no settings."""
    if cls not in _RUNNING:
        found: set[str] = set()
        names, seen = ["forward"], set()
        while names:
            name = names.pop()
            if name in seen:
                continue
            seen.add(name)
            for code in _codes(inspect.getattr_static(cls, name, None)):
                found |= {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
                names += [other for other in code.co_names if hasattr(cls, other)]
        _RUNNING[cls] = frozenset(found)
    return _RUNNING[cls]


def _codes(method: Any) -> list[types.CodeType]:
    """The code of a method; of a property, what reads and what writes it."""
    if isinstance(method, property):
        return [code for part in (method.fget, method.fset) for code in _codes(part)]
    function = getattr(method, "__func__", method)
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return [] if code is None else [code]


def _is_users_own(cls: type) -> bool:
    """Whether a class has no base but :class:`torch.nn.Module` whose private attributes are a framework's."""
    bases = (base for base in cls.__mro__ if base not in (nn.Module, object))
    return not any(base.__module__.partition(".")[0] in FRAMEWORKS for base in bases)


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON knows it, or :data:`_OTHER`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return _plain_scalar(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _function(value, depth)
    if depth == DEEPEST:
        return _OTHER
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, Mapping):
        named = len(value) <= LARGEST and all(isinstance(key, (str, int)) for key in value)
        return _all_plain({str(key): _plain(item, depth + 1) for key, item in value.items()}) if named else _OTHER
    if isinstance(value, (tuple, list)) and len(value) <= LARGEST:
        items = dict(enumerate(_plain(item, depth + 1) for item in value))
        return _OTHER if _all_plain(items) is _OTHER else list(items.values())
    return _OTHER


def _function(value: Any, depth: int) -> str:
    """The name of a function or class; of one without a place of its own also what it calls and holds."""
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" not in name or not isinstance(value, types.FunctionType) or depth == DEEPEST:
        return name
    code, cells = value.__code__, value.__closure__ or ()
    held = [_plain(item, depth + 1) for item in (*code.co_consts, *(cell.cell_contents for cell in cells))]
    return f"{name}: {[*code.co_names, *(repr(item) for item in held if item is not _OTHER)]}"


def _plain_scalar(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    if isinstance(value, str) and len(value) > LONGEST:
        return _OTHER
    if isinstance(value, int) and abs(value) >= 2**63:
        return _OTHER
    return value


def _all_plain(items: dict[Any, Any]) -> Any:
    return _OTHER if any(item is _OTHER for item in items.values()) else items


def first_difference(
    saved: Mapping[str, ModuleSettings],
    found: Mapping[str, ModuleSettings],
    layers: Iterable[str],
    ignore: Iterable[str],
) -> Difference | None:
    """Where a model first differs from the one that was saved.

    An attribute that one of the two does not have says nothing: versions of a class may differ in those.  Modules must
    be the same, but for those inside converted layers, which are these layers' own affair.

    Args:
        saved: Settings of the saved model.
        found: Settings of the other.
        layers: Names of converted layers, whose classes were compared before.
        ignore: Patterns (as in :mod:`fnmatch`) of attributes, or of ``module.attribute``, that need not agree.
    """
    layers, ignore = set(layers), list(ignore)
    inside = tuple(f"{name}." for name in layers if name)
    whole = "" in layers  # the model is one converted layer
    for name in (*found, *(name for name in saved if name not in found)):
        if name in saved and name in found:
            mine = found[name] if name not in layers else found[name]._replace(type=saved[name].type)
            difference = _differing(name, saved[name], mine, ignore)
            if difference is not None:
                return difference
        elif not whole and not name.startswith(inside):
            types = (settings[name].type if name in settings else "nothing" for settings in (saved, found))
            return Difference(f"module '{name}'", *types)
    return None


def _differing(name: str, saved: ModuleSettings, found: ModuleSettings, ignore: list[str]) -> Difference | None:
    what = f"module '{name}'" if name else "the model"
    if saved.type != found.type:
        return Difference(what, saved.type, found.type)
    for key, value in found.values.items():
        if key not in saved.values or _agree(key, saved.values[key], value):
            continue
        if not any(fnmatchcase(key, pattern) or fnmatchcase(f"{name}.{key}", pattern) for pattern in ignore):
            return Difference(f"setting '{key}' of {what}, a {found.type}", repr(saved.values[key]), repr(value))
    return None


def _agree(key: str, saved: Any, found: Any) -> bool:
    """Whether two values are the same; a width of -1 was left to the first batch, and tensors tell it."""
    open_width = key == "in_channels" and any(-1 in (v if isinstance(v, list) else [v]) for v in (saved, found))
    return saved == found or open_width
