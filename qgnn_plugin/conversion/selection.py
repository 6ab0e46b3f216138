"""Which layers of a model are converted: by name, pattern or type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..layers.base import QuantizedLayer
from ..layers.naming import float_class_of
from ..layers.own_weights import QuantizedOwnModule
from ..layers.registry import mixin_for
from ..quantizers import QLRQuantizer

__all__ = ["Selector", "is_in_copy", "is_output_projection", "output_layer", "select", "selectors"]

Selector = str | type[nn.Module]


def selectors(value: Selector | Iterable[Selector] | None) -> list[Selector] | None:
    if value is None:
        return None
    found = [value] if isinstance(value, (str, type)) else list(value) if isinstance(value, Iterable) else [value]
    for selector in found:
        if not isinstance(selector, (str, type)):
            raise TypeError(f"Expected layer names, patterns or types to select by (got {selector!r})")
    return found


def _matches(name: str, module: nn.Module, selectors: list[Selector]) -> bool:
    for selector in selectors:
        if isinstance(selector, str):
            if fnmatchcase(name, selector) or name.startswith(f"{selector}."):
                return True
        elif isinstance(module, selector):
            return True
    return False


def select(
    model: nn.Module, include: list[Selector] | None, exclude: list[Selector] | None
) -> list[tuple[str, nn.Module]]:
    convertible = [(n, m) for n, m in model.named_modules() if mixin_for(m) is not None]
    names = [name for name, _ in convertible]
    for selector in (include or []) + (exclude or []):
        if not any(_matches(name, module, [selector]) for name, module in convertible):
            raise ValueError(f"{selector!r} matches no layer{_nearest(selector, names)}. {_candidates(model, names)}")
    excluded = [n for n, m in convertible if exclude is not None and _matches(n, m, exclude)]
    included = [n for n, m in convertible if include is None or _matches(n, m, include)]
    chosen = [
        (name, module)
        for name, module in convertible
        if not any(is_within(name, outer) for outer in excluded) and any(is_within(name, outer) for outer in included)
    ]
    taken = {name for name, _ in chosen}
    chosen = [(name, module) for name, module in chosen if not _is_read_past(model, name, taken)]
    if not chosen:
        names = [name for name in names if not _is_read_past(model, name, set(names))]
        raise ValueError(f"Nothing to convert in {type(model).__name__}. {_candidates(model, names)}")
    return chosen


def _is_read_past(model: nn.Module, name: str, taken: set[str]) -> bool:
    """Whether a layer is part of a float attention that reads its weight."""
    return name.rpartition(".")[0] not in taken and is_output_projection(model, name)


def is_output_projection(model: nn.Module, name: str) -> bool:
    """Whether a layer is the ``out_proj`` of an attention: torch multiplies its weight, and never calls it."""
    around, _, own = name.rpartition(".")
    return own == "out_proj" and isinstance(model.get_submodule(around), nn.MultiheadAttention)


def is_within(name: str, outer: str) -> bool:
    return name == outer or outer == "" or name.startswith(f"{outer}.")


def _nearest(selector: Selector, names: list[str]) -> str:
    close = difflib.get_close_matches(selector, names, n=1) if isinstance(selector, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _candidates(model: nn.Module, names: list[str]) -> str:
    if names:
        return f"Layers that can be converted: {', '.join(name or '(the model itself)' for name in names)}"
    types = sorted({_described(type(m)) for n, m in model.named_modules() if not is_output_projection(model, n)})
    return (
        f"It has no Linear, MultiheadAttention or MessagePassing layer, only {', '.join(types)}; "
        f"register your own layer type with qgnn_plugin.register_layer"
    )


def _described(cls: type[nn.Module]) -> str:
    base = _known(cls)
    return cls.__name__ if base is None else f"{cls.__name__} (a {base.__name__} that computes something else)"


def _known(cls: type[nn.Module]) -> type | None:
    """The class with a conversion that ``cls`` is a subclass of."""
    return next((base for base in cls.__mro__[1:] if issubclass(base, nn.Module) and mixin_for(base)), None)


def _is_around(name: str, names: list[str]) -> bool:
    return any(other != name and is_within(other, name) for other in names)


def output_layer(names: list[str], mixin_of: Mapping[str, type[QuantizedLayer]]) -> str:
    """The last converted layer that is not inside another: its result is the model's output.

    A module that is converted for weights that its own code reads is one around layers, not such a layer.
    """
    inner = [name for name in names if not (issubclass(mixin_of[name], QuantizedOwnModule) and _is_around(name, names))]
    names = inner or names
    return [name for name in names if not any(name != outer and is_within(name, outer) for outer in names)][-1]


def is_in_copy(model: nn.Module, name: str, original: str) -> bool:
    """Whether layer ``name`` has the place in a copy of a part of ``model`` that ``original`` has in that part.

    A copy has the weights that the part has, or those of the past and no gradients, as the encoder of targets that
    follows another one by averages: ``for a, b in zip(part.parameters(), copy.parameters())``.  Of lists, whose parts
    may as well follow one another, none is taken for one.
    """
    ours, theirs = name.split("."), original.split(".")
    places = [place for place, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other]
    if len(ours) != len(theirs) or len(places) != 1 or ours[places[0]].isdigit():
        return False
    copied, part = (model.get_submodule(".".join(path[: places[0] + 1])) for path in (ours, theirs))
    if float_class_of(copied) is not float_class_of(part):
        return False
    weights, others = _float_weights(copied), _float_weights(part)
    if not weights or weights.keys() != others.keys():
        return False
    if not all(_is_like(weights[key], others[key]) for key in weights):
        return False
    if not any(weight.requires_grad for weight in weights.values()) and any(w.requires_grad for w in others.values()):
        return True
    return all(torch.equal(weights[key], others[key]) for key in weights)


def _float_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``module``, by name, apart from those of ranges."""
    inside = ((name, m) for name, m in module.named_modules() if not isinstance(m, QLRQuantizer))
    return {f"{name}.{key}": w for name, m in inside for key, w in m._parameters.items() if w is not None}


def _is_like(weight: nn.Parameter, other: nn.Parameter) -> bool:
    """Whether a weight, which is not the other one itself, can be compared with it."""
    if weight is other or isinstance(weight, UninitializedParameter) or isinstance(other, UninitializedParameter):
        return False
    return weight.shape == other.shape and weight.device == other.device and not weight.is_meta
