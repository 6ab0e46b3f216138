"""Packing a whole model: its module tree with converted layers swapped for packed ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch_geometric.nn.aggr import EquilibriumAggregation
from torch_geometric.nn.models.rev_gnn import InvertibleModule

from ..config import OFF
from ..conversion.converted import SPECS, expect_values, is_packed, is_quantized, kind_of, quantized_layers
from ..conversion.copying import copying_memo, ordinary_tensors
from ..conversion.coverage import has_run
from ..conversion.passed_by import takes_tensors_alone
from ..layers.base import QuantizedLayer, attribute_names, clashes, float_state, names_kept
from ..layers.message_passing import QuantizedMessagePassing
from ..layers.naming import float_class_of
from ..layers.normalized import still
from ..layers.own_weights import own_tables
from ..layers.read_past import is_read_past
from ..layers.registry import deep_mixin, mixin_for
from ..quantizers import QLRQuantizer
from ..saved import CONFIG_KEY
from ..smp.constraint import constraint_names
from ..smp.deep import DeepLayer, StackPlace, connect_stacks
from .layers.base import NEVER_RAN, LayerSpec, PackedLayer, frozen_class, packed_class
from .layers.ranges import PackedRange
from .layers.weights import PackedWeight
from .lazy.scoped import defer_inside
from .message_passing.own_weights import PackedOwnModule, PackedOwnWeights

__all__ = ["PackedBytes", "is_packed", "pack_model", "packed_bytes", "packed_layers"]

EXTRA_STATE = "_extra_state"


class PackedBytes(NamedTuple):
    """Sizes of a packed model, in bytes: ``float`` of the float state dict, ``packed`` of its own."""

    float: int
    packed: int

    @property
    def ratio(self) -> Any:
        """How many times smaller the packed state is."""
        return self.float / max(1, self.packed)


def pack_model(qmodel: nn.Module) -> nn.Module:
    """Turn a converted model into an integer model for inference, with the outputs of ``qmodel.eval()``.

    The user's modules and their ``forward`` stay as they are; converted layers are swapped for packed
    ones that hold their weights as packed words and run on fused kernels.  A layer that cannot be
    packed keeps its quantized-float path, and one that never ran while ranges were set stays as the float layer that
    it was, with a warning (:func:`qgnn_plugin.summary` says which, and why).

    Args:
        qmodel: A converted model whose ranges are set; it is left untouched.

    Returns:
        A new model with the same ``forward`` signature, in eval mode, on the same device; no
        parameter requires a gradient.

    Raises:
        ValueError: If ``qmodel`` is plain or already packed, or no range was set at all.
    """
    if not isinstance(qmodel, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module (got {type(qmodel).__name__})")
    if is_packed(qmodel):
        raise ValueError("Expected a model made by quantize_model (got one that is already packed); use it as it is")
    if not is_quantized(qmodel):
        raise ValueError(
            f"Expected a model made by quantize_model (got a plain {type(qmodel).__name__}); "
            f"convert it first: qgnn_plugin.quantize_model(model)"
        )
    expect_values(qmodel)
    layers = quantized_layers(qmodel)
    differentiated = [name for name, m in qmodel.named_modules() if isinstance(m, EquilibriumAggregation)]
    with still(qmodel), ordinary_tensors():
        specs = _describe(layers, differentiated)
        _say_what_never_ran(specs)
        packed = assemble(qmodel, layers, specs)
        for name, layer in layers.items():
            target = packed.get_submodule(name)
            if isinstance(target, PackedLayer):
                target.fill(layer)
    return packed.eval()


def assemble(model: nn.Module, layers: Mapping[str, Any], specs: Iterable[LayerSpec]) -> nn.Module:
    """Copy ``model`` with ``layers`` swapped for packed ones as described; their numbers are still to be filled in.

    It has the mode of ``model``: modules that compute something as they leave training, as ``TGNMemory`` stores its
    messages, do so with numbers that are filled in.
    """
    specs = list(specs)
    memo = copying_memo(model)  # and what stands for a layer, before anything that refers to it is copied
    for spec in specs:
        layer = layers[spec.name]
        if spec.reason is None:
            mixin, float_class = _packed_class(layer, spec), float_class_of(layer)
            memo[id(layer)] = object.__new__(frozen_class(mixin, float_class, names_kept(mixin, layer)))
        elif spec.stays_plain:
            memo[id(layer)] = object.__new__(float_class_of(layer))
    for spec in specs:
        layer = layers[spec.name]
        if spec.reason is None or spec.stays_plain:
            copied = memo[id(layer)]
            kept = type(copied).kept(layer) if isinstance(copied, PackedLayer) else float_state(layer)
            copied.__dict__.update(copy.deepcopy(kept, memo))
            if isinstance(copied, PackedLayer):
                copied.freeze(layer, spec)
                copied._packed.added = frozenset(attribute_names(copied.__dict__) - attribute_names(kept))
    packed = copy.deepcopy(model, memo)
    memo.complete()
    for spec in specs:
        layer = packed.get_submodule(spec.name)
        if isinstance(layer, QuantizedMessagePassing):
            layer.adopt(spec.sites)
    for module in packed.modules():
        for read in own_tables(module) if isinstance(module, PackedOwnWeights) else ():
            if isinstance(read, PackedLayer):
                read._packed.is_read = True
        if isinstance(module, InvertibleModule):
            module.disable = True  # it frees its input for a backward pass to restore, and there is none
    for parameter in packed.parameters():
        parameter.requires_grad_(False)
    setattr(packed, SPECS, specs)
    connect_stacks(packed, stack_places(specs))
    if (not isinstance(packed, PackedLayer) or isinstance(packed, PackedOwnModule)) and not takes_tensors_alone(packed):
        defer_inside(packed)
    return packed


def stack_places(specs: Iterable[LayerSpec]) -> dict[str, StackPlace]:
    """The deep stacks that the layers form."""
    return {spec.name: spec.deep_place for spec in specs if spec.deep_place is not None}


def layer_mixin(layer: Any, spec: LayerSpec) -> type[QuantizedLayer] | None:
    """What converts, or has converted, ``layer``, a float layer or a converted one."""
    if isinstance(layer, QuantizedLayer):
        return type(layer).mixin
    mixin = mixin_for(layer)
    return mixin if spec.deep_place is None else deep_mixin(mixin)


def _packed_class(layer: Any, spec: LayerSpec) -> type[PackedLayer]:
    mixin = layer_mixin(layer, spec)
    cls = None if mixin is None else packed_class(mixin)
    assert cls is not None
    return cls


DIFFERENTIATED = "differentiated in the forward pass"
READ_PAST = "its weight is read past it, by code that takes it as it is"


def _describe(layers: Mapping[str, Any], differentiated: Iterable[str] = ()) -> list[LayerSpec]:
    decided: dict[int, str | None] = {}  # by a layer for the layers inside it
    specs = []
    for name, layer in layers.items():
        cls = packed_class(type(layer).mixin)
        if any(name.startswith(f"{around}.") or not around for around in differentiated):
            reason: str | None = DIFFERENTIATED
        elif id(layer) in decided:
            reason = decided[id(layer)]
            if reason is None and not has_run(layer):
                reason = NEVER_RAN
        elif not has_run(layer):
            reason = NEVER_RAN
        elif any(is_read_past(one) for one in (layer, *_units(layer))):
            reason = READ_PAST
        elif cls is None:
            deep = " in a deep stack" if isinstance(layer, DeepLayer) else ""
            reason = f"no packed {type(layer).float_class.__name__}{deep}"
        elif taken := [*clashes(cls, layer), *(name for name in cls.adds if hasattr(layer, name))]:
            reason = f"it has attributes of its own named {', '.join(taken)}"
        else:
            reason = cls.refuses(layer)
        # Maps that take codes from it, not values: they are of its kind, or on their own where others call them.
        if type(layer).units:
            inner = None if reason in (None, NEVER_RAN) else f"part of '{name}'"
            decided |= {id(child): inner for child in _units(layer)}
        specs.append(LayerSpec.of(name, layer, reason))
    return specs


def _units(layer: Any) -> list[nn.Module]:
    """The layers inside ``layer`` that it converts itself."""
    return [child for name in type(layer).units if (child := getattr(layer, name, None)) is not None]


def _say_what_never_ran(specs: list[LayerSpec]) -> None:
    """Warn of layers that stay float because nothing reached them.

    Raises:
        ValueError: If nothing reached any layer.
    """
    idle = [spec for spec in specs if spec.reason == NEVER_RAN]
    if not idle:
        return
    ran = [spec for spec in specs if spec.reason != NEVER_RAN and any(s.bits != OFF for s in spec.sites.values())]
    if not ran:
        site = next(iter(idle[0].sites)).removesuffix("_quantizer")
        raise ValueError(
            f"Expected every range to be set (got none at '{idle[0].name}.{site}'): call "
            f"qgnn_plugin.calibrate(model, data) or train before packing"
        )
    names = ", ".join(f"'{spec.name}'" for spec in idle)
    warnings.warn(
        f"Layers that never ran while ranges were set stay float in the packed model: {names}; calibrate on data that "
        f"reach them and pack again, or leave it where they are not used",
        stacklevel=3,
    )


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """Every packed layer, by qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}


def specs_of(model: nn.Module) -> list[LayerSpec]:
    """The descriptions that a packed model carries.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If it is not packed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a model made by pack_model (got {kind_of(model)})")
    specs: list[LayerSpec] | None = vars(model).get(SPECS)  # not of what a wrapper passes attributes on from
    if specs is None:
        inside = next((name for name, module in model.named_modules() if SPECS in vars(module)), None)
        remedy = "pack it first: qgnn_plugin.pack_model(qmodel)"
        if inside is not None:
            remedy = f"its '{inside}' is one: pass that, or pack a {type(model).__name__} around the converted model"
        raise ValueError(f"Expected a model made by pack_model (got a {type(model).__name__}); {remedy}")
    return specs


def own_state(packed: nn.Module) -> dict[str, Any]:
    """The state dict of a packed model, the very tensors, without configurations: its description has these."""
    state = dict(packed.state_dict(keep_vars=True))
    for name, module in packed.named_modules(remove_duplicate=False):
        if isinstance(module, (QLRQuantizer, QuantizedLayer)):
            key = EXTRA_STATE if isinstance(module, QLRQuantizer) else CONFIG_KEY
            state.pop(f"{name}.{key}" if name else key, None)
    return state


def packed_bytes(packed: nn.Module) -> PackedBytes:
    """Bytes of the float state dict and of the packed one, and their ``ratio``.

    Raises:
        ValueError: If ``packed`` is not a packed model.
    """
    specs_of(packed)
    layers = packed_layers(packed)
    state = {key: value for key, value in own_state(packed).items() if isinstance(value, Tensor)}
    unique = {t.data_ptr() if t.numel() else key: t for key, t in state.items()}
    size = sum(t.numel() * t.element_size() for t in unique.values())
    before = sum(layer._packed.float_bytes for layer in layers.values())
    for module in packed.modules():
        if not isinstance(module, PackedLayer):
            before += sum(t.numel() * t.element_size() for t in _float_state(module))
    return PackedBytes(before, size)


def _float_state(module: nn.Module) -> list[Tensor]:
    """What a module holds in the float model: a quantizer and a multiplier are not there."""
    if isinstance(module, (QLRQuantizer, PackedRange, PackedWeight)):
        return []
    dropped = {*constraint_names(module), *module._non_persistent_buffers_set}
    persistent = [b for k, b in module.named_buffers(recurse=False) if k not in dropped]
    return [*module.parameters(recurse=False), *persistent]
