"""What every converted layer shares: class swapping that survives copying and pickling."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..aliases import Alias, public_names
from ..config import OFF, QuantConfig
from ..quantizers import QLRQuantizer
from ..smp.constraint import CONSTRAINT_ATTRIBUTES, SmoothLayer, constraint_names, reset_constraint
from .naming import annotated, attribute_names, float_class_of, named_as, shown_bits
from .saved import CarriesConfiguration
from .sites import SiteFactory

__all__ = [
    "WEIGHT",
    "QuantizedLayer",
    "SiteFactory",
    "SwappedLayer",
    "annotated",
    "float_state",
    "named_as",
    "quantized_class",
    "restore_class",
]

WEIGHT = "weight_quantizer"  # the site of a weight, whose range a packed layer holds with its words


class SwappedLayer:
    """Mixin of a layer whose class was swapped for a subclass of (mixin, the layer's own class), of the same name."""

    float_class: ClassVar[type[nn.Module]]
    own_names: ClassVar[tuple[str, ...]]  # aliases that mean attributes of the layer's own
    notes: ClassVar[tuple[str, ...]] = ()  # for its ``repr``
    _is_packed: ClassVar[bool] = False
    extended: ClassVar[type[nn.Module] | None] = None  # the class whose forward that of its own goes around
    has_others: ClassVar[bool] = False  # whether its parameters may be more than a weight and what it is made of

    def own_sites(self) -> dict[str, int]:
        """Bits of its quantization sites, by name."""
        raise NotImplementedError

    def added_names(self) -> Iterable[str]:
        """Names of the attributes that its own class does not know."""
        raise NotImplementedError

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Those of the layer itself to code of the model, which may run each of them; torch sees all."""
        hidden = self._hidden_from(None if torch.compiler.is_compiling() else sys._getframe(1).f_globals)
        found: Iterator[tuple[str, nn.Module]] = super().named_children()  # type: ignore[misc]
        return ((name, child) for name, child in found if name not in hidden)

    def children(self) -> Iterator[nn.Module]:
        """As :meth:`named_children`."""
        hidden = self._hidden_from(None if torch.compiler.is_compiling() else sys._getframe(1).f_globals)
        added = {id(self._modules.get(name)) for name in hidden}  # type: ignore[attr-defined]
        found: Iterator[nn.Module] = super().children()  # type: ignore[misc]
        return (child for child in found if id(child) not in added)

    def _hidden_from(self, caller: dict[str, Any] | None) -> frozenset[str]:
        """The children that code with the globals ``caller`` is not to see; what is compiled is code of the model."""
        sees_all = caller is not None and str(caller.get("__name__")).startswith(INFRASTRUCTURE)
        return frozenset() if sees_all else frozenset(self.added_names())

    def as_float(self) -> nn.Module:
        """The layer as its own class describes it, without what was added: a view to read, not to run or keep."""
        view = object.__new__(type(self).float_class)
        view.__dict__.update(float_state(self))
        return view

    def __prepare_scriptable__(self) -> Any:
        """Refused: what :func:`torch.jit.script` asks of every module.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"Expected a plain model for torch.jit.script (got one with a {' '.join((*self.notes, 'quantized'))} "
            f"{type(self).float_class.__name__}): its arithmetic is not TorchScript; use torch.compile, or compile "
            f"qgnn_plugin.restore_model(qmodel)"
        )

    def __repr__(self) -> str:
        """That of the layer's own class, and what is quantized to which range."""
        ranges = (f"{site.removesuffix('_quantizer')}={text}" for site, text in self._shown_ranges() if text)
        return annotated(repr(self.as_float()), shown_bits(self.own_sites()), *ranges, *self.notes)

    def _shown_ranges(self) -> Iterable[tuple[str, str]]:
        """The range of each site, by name, as people read it; empty where there is none."""
        return ()


def names_kept(mixin: type, layer: nn.Module) -> tuple[str, ...]:
    """The aliases of ``mixin`` that ``layer`` has attributes of its own under."""
    if isinstance(layer, SwappedLayer):
        return type(layer).own_names
    return tuple(sorted(name for name in public_names(mixin) - public_names(type(layer)) if hasattr(layer, name)))


# What a mixin means to put in the place of the layer's own.
_REPLACED = frozenset({"forward", "reset_parameters", "weight", "_save_to_state_dict", "_load_from_state_dict"})
_EXTENDED = frozenset({"named_children", "children", "_apply"})  # of torch, where the layer's own run as well
INFRASTRUCTURE = ("torch.", __name__.partition(".")[0] + ".")
_LIBRARIES = (*INFRASTRUCTURE, "torch_geometric.")


def clashes(mixin: type, layer: nn.Module) -> list[str]:
    """Names of ``mixin`` that ``layer`` needs for attributes of its own: either would miss its own.

    Those are methods, what is kept on a layer, and, where a class of the layer's defines them, constants.
    """
    float_class = float_class_of(layer)
    users = [cls for cls in float_class.__mro__ if not f"{cls.__module__}.".startswith(_LIBRARIES)]
    of_class = {name for cls in users if cls is not object for name in vars(cls)}
    taken = of_class | attribute_names(float_state(layer))
    kept = "_packed" if getattr(mixin, "_is_packed", False) else "_conversion"
    methods, constants = {kept}, set(_CONCRETE)
    for cls in mixin.__mro__:
        if not issubclass(float_class, cls):
            for name, value in vars(cls).items():
                if name.startswith("__") or name in _REPLACED | _EXTENDED or isinstance(value, Alias):
                    continue
                is_method = callable(value) or isinstance(value, _METHODS)
                (methods if is_method else constants).add(name)
    return sorted((methods & taken) | (constants & of_class))


_METHODS = (property, classmethod, staticmethod)
_CONCRETE = ("mixin", "float_class", "own_names", "quantizes_output")


@dataclass(frozen=True)
class Conversion:
    """What a converted layer knows of its conversion.

    Args:
        config: Its configuration.
        name: Its qualified name in the model.
        added: Names of the attributes that it did not have before; :obj:`None` in a pickle that does not tell.
    """

    config: QuantConfig
    name: str
    added: frozenset[str] | None


class QuantizedLayer(CarriesConfiguration, SwappedLayer):
    """Mixin of every converted layer.

    Converting sets ``layer.__class__`` to a subclass of (mixin, the layer's own class), so parameters, hooks, buffers
    and ``isinstance`` stay as they were, and so does the class's name.  The subclass is made on demand; copies and
    pickles refer to it by the pair.
    """

    mixin: ClassVar[type[QuantizedLayer]]
    quantizes_output: ClassVar[bool]
    units: ClassVar[tuple[str, ...]] = ()  # inner layers that this one converts itself, where it has them

    quant_config = Alias("_quant_config")
    layer_name = Alias("_qualified_name")
    _conversion: Conversion

    @property
    def _quant_config(self) -> QuantConfig:
        return self._conversion.config

    @property
    def _qualified_name(self) -> str:
        return self._conversion.name

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        """Add this layer's quantizers to ``layer``; called once, before its class is swapped."""
        raise NotImplementedError

    @classmethod
    def _own_methods(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        """Methods of the concrete class, made of those of ``float_class``."""
        del float_class
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _rebuild, (cls.mixin, cls.float_class, cls.quantizes_output, cls.own_names), self.__dict__.copy()

    def __setstate__(self, data: dict[str, Any]) -> None:
        super().__setstate__(data if "_conversion" in data else self._renamed(data))  # type: ignore[misc]

    @classmethod
    def _renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The attributes of a pickle written when what conversion adds had public names."""
        private = {"constraint_state", "deep_place", "deep_config", "deep_stack"}
        private |= set() if issubclass(cls.float_class, SmoothLayer) else {"smp"}
        data = {f"_{name}" if name in private else name: value for name, value in data.items()}
        data["_conversion"] = Conversion(data.pop("quant_config"), data.pop("layer_name"), None)
        return data

    def own_quantizers(self) -> Iterator[tuple[str, QLRQuantizer]]:
        """Quantizers that belong to this layer itself, not to a layer inside it."""
        for name, child in self._modules.items():  # type: ignore[attr-defined]
            if isinstance(child, QLRQuantizer):
                yield name, child
            elif isinstance(child, QuantizerDict):
                yield from ((f"{name}.{key}", q) for key, q in child.items() if isinstance(q, QLRQuantizer))

    def own_sites(self) -> dict[str, int]:
        return {name.removesuffix("_quantizer"): quantizer.bits for name, quantizer in self.own_quantizers()}

    def _shown_ranges(self) -> Iterable[tuple[str, str]]:
        return ((name, quantizer.shown_range()) for name, quantizer in self.own_quantizers())

    def _weight_sites(self: Any) -> dict[str, Tensor]:
        """The matrices that its own sites quantize, by the name of the site."""
        return {WEIGHT: self.weight} if WEIGHT in self._modules else {}

    def _weight_matrices(self) -> dict[str, Tensor]:
        """The same as ``[O, K]``: rows that features are multiplied by."""
        return self._weight_sites()

    def added_names(self) -> Iterable[str]:
        added = self._conversion.added
        if added is None:
            added = _added_before(self)
        constrained = issubclass(type(self).float_class, SmoothLayer)  # by itself
        return (*added, *_LATER, *(() if constrained else CONSTRAINT_ATTRIBUTES))

    @property
    def is_off(self) -> bool:
        """Whether every site of this layer is at full precision."""
        return all(q.bits == OFF for _, q in self.own_quantizers())

    @property
    def follows_autocast(self) -> bool:
        """Whether the layer runs as its float class does, under autocast too (see :mod:`..quantizers.autocast`)."""
        return self.is_off


class QuantizerDict(nn.ModuleDict):
    """Quantizers of a layer, by argument name or step."""


_CLASSES: dict[tuple[type, type, bool, tuple[str, ...]], type] = {}
CONVERTS: dict[type[nn.Module], type[QuantizedLayer]] = {}  # which mixin converts which layer type


def extended_class(float_class: type[nn.Module], mixins: Collection[type[QuantizedLayer]]) -> type[nn.Module] | None:
    """The class converted by one of ``mixins`` whose ``forward`` that of ``float_class`` goes around, if it does."""
    base: Any = next((cls for cls in float_class.__mro__ if CONVERTS.get(cls) in mixins), None)
    return None if base is None or base.forward is float_class.forward else base


def around_super(
    float_class: type[nn.Module], concrete: type, extended: type[nn.Module], namespace: dict[str, Any]
) -> type:
    """The subclass of ``float_class``, whose ``super().forward`` is that of ``concrete``, a form of ``extended``."""
    return type(float_class.__name__, (float_class, concrete), {**namespace, "extended": extended})


def quantized_class(
    mixin: type[QuantizedLayer], float_class: type[nn.Module], output: bool = False, own_names: tuple[str, ...] = ()
) -> type:
    """The subclass of ``(mixin, float_class)``, made once.

    Args:
        mixin: What quantizes the layer.
        float_class: The layer's own class.
        output: Whether its result is quantized as well.
        own_names: Names of aliases that mean the layer's own attributes (see :func:`names_kept`).
    """
    key = (mixin, float_class, output, own_names)
    if key not in _CLASSES:
        namespace = {**named_as(float_class, own_names), "mixin": mixin, "quantizes_output": output}
        # Before those of a class that shares a base with the mixin, which then comes first.
        namespace["__repr__"] = SwappedLayer.__repr__
        if hasattr(float_class, "reset_parameters"):
            namespace["reset_parameters"] = _resetting_ranges(float_class.reset_parameters)
        extended = extended_class(float_class, {mixin})
        if extended is not None:
            concrete = quantized_class(mixin, extended, output, own_names)
            _CLASSES[key] = around_super(float_class, concrete, extended, namespace)
            return _CLASSES[key]
        # PyG generates a `propagate` onto a subclass that has none in its own namespace, on the first copy or
        # unpickling of an instance, and `explain` reads the two aliases: all three must be in the concrete class.
        propagate = getattr(mixin, "quantized_propagate", None)
        if propagate is not None:
            namespace |= {"propagate": propagate, "_orig_propagate": propagate, "_jinja_propagate": propagate}
        updater = getattr(mixin, "quantized_edge_updater", None)
        if updater is not None and hasattr(float_class, "edge_updater"):
            namespace |= {"edge_updater": updater, "_orig_edge_updater": updater, "_jinja_edge_updater": updater}
        namespace |= mixin._own_methods(float_class)
        bases: tuple[type, ...] = (mixin, float_class)
        if output:
            forward = namespace.get("forward", getattr(mixin, "forward", float_class.forward))
            namespace["forward"] = _quantizing_output(forward)
        _CLASSES[key] = type(float_class.__name__, bases, namespace)
    return _CLASSES[key]


def _quantizing_output(forward: Any) -> Any:
    @functools.wraps(forward)
    def quantized(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if isinstance(out, tuple):  # GATConv with its attention weights
            return (self.output_quantizer(out[0]).dequantize(), *out[1:])
        return self.output_quantizer(out).dequantize()

    return quantized


def _resetting_ranges(reset_parameters: Any) -> Any:
    @functools.wraps(reset_parameters)
    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = reset_parameters(self, *args, **kwargs)
        for _, quantizer in self.own_quantizers():
            quantizer.unset()
        if isinstance(self, SmoothLayer):
            reset_constraint(self)
        return out

    return reset


def _rebuild(
    mixin: type[QuantizedLayer], float_class: type[nn.Module], output: bool, own_names: tuple[str, ...] = ()
) -> Any:
    return object.__new__(quantized_class(mixin, float_class, output, own_names))


def float_state(layer: Any) -> dict[str, Any]:
    """The ``__dict__`` that a layer, swapped or not, has as a float layer: a new one, of the same values."""
    state: dict[str, Any] = layer.__dict__.copy()
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        state[name] = copy.copy(state[name])
    for name in layer.added_names() if isinstance(layer, SwappedLayer) else ():
        for held in (state, state["_parameters"], state["_buffers"], state["_modules"]):
            held.pop(name, None)
        state["_non_persistent_buffers_set"].discard(name)
    return state


def _added_before(layer: Any) -> frozenset[str]:
    """What conversion had added to a layer from a pickle that does not tell."""
    children = [name for name, m in layer._modules.items() if isinstance(m, (QLRQuantizer, QuantizerDict))]
    constrained = issubclass(type(layer).float_class, SmoothLayer)
    return frozenset({*children, *_ATTRIBUTES, *(() if constrained else constraint_names(layer))})


def restore_class(layer: Any) -> None:
    """Undo a conversion in place: remove quantizers and buffers, give the layer its own class back."""
    plain = float_state(layer)
    layer.__dict__.clear()
    layer.__dict__.update(plain)
    layer.__class__ = type(layer).float_class
    release_propagate(layer)
    state: Any = layer
    if getattr(state, "explain", False) or getattr(state, "decomposed_layers", 1) > 1:
        state.propagate = type(state)._orig_propagate.__get__(state)


_LATER = ("_conversion", "_deep_stack", "is_adopted", "_is_read_past")  # added after the conversion itself
_ATTRIBUTES = (
    "gap_quantizer",
    "state_quantizers",
    "step_meter",
    "_deep_place",
    "_deep_config",
    "float_arguments",
    "is_adopted",
    "attention_bits",
    "input_quantizer",
    "message_quantizer",
    "target_quantizer",
)


def release_propagate(layer: Any) -> None:
    """Let ``propagate`` be the one of the layer's class.

    PyG binds a ``propagate`` to the instance when ``explain`` or ``decomposed_layers`` are set; it would outlive a
    change of class.

    Raises:
        ValueError: If something else is bound there: conversion would have no effect on it.
    """
    bound = layer.__dict__.get("propagate")
    if bound is not None and getattr(bound, "__func__", bound).__name__ not in ("propagate", "quantized_propagate"):
        raise ValueError(
            f"Expected the class of a {type(layer).__name__} to define 'propagate' (got one bound to the instance, "
            f"which conversion cannot reach); define it in a subclass"
        )
    layer.__dict__.pop("propagate", None)
