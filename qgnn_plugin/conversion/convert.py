"""Converting a model and undoing it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..config import OFF, QuantConfig, Site
from ..layers.base import QuantizedLayer, restore_class
from ..layers.fast_paths import close_fast_paths, open_fast_paths
from ..layers.message_passing import QuantizedConv
from ..layers.normalized import still
from ..layers.registry import convert_layer, deep_mixin, mixin_for
from ..layers.sites import Entrance, SiteFactory
from ..saved import CONFIG_KEY, decode
from ..smp.deep import DeepLayer, StackPlace, close_scopes, connect_stacks, conv_widths, find_stacks
from .checkpoints import ConvertsOnLoad, close_checkpoints, open_checkpoints
from .converted import (
    check_unconverted,
    expect_converted,
    kind_of,
    quantized_layers,
)
from .copying import copy_model, ordinary_tensors
from .coverage import warn_of_float_parts, warn_of_unregistered
from .parameter_sums import warn_of_parameter_sums
from .passed_by import check_methods, warn_of_comparisons
from .scripted import close_scripted, open_scripted
from .selection import Selector, is_in_copy, output_layer, select, selectors

__all__ = ["convert_as", "quantize_like", "quantize_model", "restore_model", "unquantized"]

DEFAULT_BITS = 4


def quantize_model(
    model: nn.Module,
    bits: int | QuantConfig | None = None,
    *,
    config: QuantConfig | None = None,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Convert a model so that it trains and runs in low bit widths.

    Layers are swapped for subclasses that keep ``forward``, the ``Parameter`` objects, hooks and state-dict keys.  At
    32 bits the result computes exactly what the original does, unless ``config.smp`` rewrites deep stacks.

    So are recurrent layers, tables of embeddings, and modules whose code multiplies by their parameters.  What stays
    float is listed by :func:`qgnn_plugin.summary`.  A warning comes where less than half of the weights are quantized,
    unless ``include`` or ``exclude`` says what to convert.

    Args:
        model: Any module with ``Linear`` or ``MessagePassing`` layers; it is untouched unless ``inplace``.
        bits: 1, 2, 4, 8, or 32 = off, for every site; default 4.  A configuration is taken as ``config``.
        config: The full configuration, in place of ``bits``.
        include: Layer names, patterns or types to convert; default all.
        exclude: Layer names, patterns or types to leave alone, together with what is inside them.
        inplace: Convert ``model`` itself.

    Returns:
        The converted model, on the same device, in the same dtype and mode.

    Raises:
        ValueError: If both ``bits`` and ``config`` are given, nothing matches, a layer is lazy and not yet
            initialized, the model is already converted, an override names no layer, or deep stacks are asked for and
            there is none.
    """
    config = _configuration(bits, config)
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module (got {kind_of(model)})")
    check_unconverted(model)
    if inplace and isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"Expected a module that is not compiled with inplace=True (got a {type(model).__name__})")
    model = open_scripted(model if inplace else copy_model(model))
    try:
        chosen = select(model, selectors(include), selectors(exclude))
        config.check_overrides([name for name, _ in chosen])
        _check_materialized(chosen)
        _check_units(chosen)
        check_methods(model, dict(chosen))
        places = _stack_places(chosen, config.for_layer)
        with still(model):
            made = _convert_or_undo(model, [name for name, _ in chosen], config.for_layer, places)
    except Exception:
        close_scripted(model)
        raise
    _warn_of_idle_overrides(config, made, stacklevel=2)
    open_checkpoints(model)
    warn_of_comparisons(model, stacklevel=2)
    warn_of_parameter_sums(model, stacklevel=2)
    warn_of_unregistered(model, stacklevel=2)
    if include is None and exclude is None:
        with still(model):
            warn_of_float_parts(model, stacklevel=2)
    return model


def convert_as(model: nn.Module, configs: Mapping[str, QuantConfig]) -> None:
    """Convert the layers of a plain model that a converted one had, in place, each by its own configuration.

    Args:
        model: A plain model of the same architecture.
        configs: The configuration of every converted layer, by qualified name.

    Raises:
        ValueError: If a layer is missing or cannot be converted, or as :func:`quantize_model`.
    """
    check_unconverted(model)
    layers = dict(model.named_modules())
    for name in configs:
        if name not in layers or mixin_for(layers[name]) is None:
            found = f"a {type(layers[name]).__name__}" if name in layers else "no such layer"
            raise ValueError(f"Expected a layer that can be converted at '{name}' (got {found})")
    chosen = [(name, layer) for name, layer in layers.items() if name in configs]
    _check_materialized(chosen)
    _check_units(chosen)
    config_of = configs.__getitem__
    _convert_or_undo(model, [name for name, _ in chosen], config_of, _stack_places(chosen, config_of))


def quantize_like(model: nn.Module, state_dict: Mapping[str, Any], *, inplace: bool = False) -> nn.Module:
    """Convert a float model as the one was whose state dict this is; its numbers are still to be loaded.

    ::

        state = torch.load("gcn-int4.pt")
        qmodel = qgnn_plugin.quantize_like(GCN(...), state)
        qmodel.load_state_dict(state)

    Args:
        model: The float architecture.
        state_dict: Of a converted model, with the names that ``model`` has.
        inplace: Convert ``model`` itself.

    Returns:
        The converted model.

    Raises:
        ValueError: If ``state_dict`` does not say how its model was converted (that of a float model, or of version
            1), or does not fit ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module (got {kind_of(model)})")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected a state dict (got {type(state_dict).__name__})")
    configs = _saved_configs(model, state_dict)
    if not configs:
        raise ValueError(
            f"Expected the state dict of a converted model (got one {_kind_of_state(state_dict)})"
        )
    if not inplace:
        check_unconverted(model)
        model = copy_model(model)
    convert_as(model, configs)
    open_checkpoints(model)
    return model


ConvertsOnLoad._quantize_like = staticmethod(quantize_like)


def _saved_configs(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, QuantConfig]:
    """The configuration of every converted layer in a state dict, by qualified name."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    configs = {}
    for key, value in state_dict.items():
        if key != CONFIG_KEY and not key.endswith(f".{CONFIG_KEY}"):
            continue
        name = key.removesuffix(CONFIG_KEY).removesuffix(".")
        try:
            layer = model.get_submodule(name)
            configs[names[id(layer)]] = QuantConfig.from_dict(decode(value)["config"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the state dict of such a model (got another at '{name}'): {error}") from error
    return configs


def _configuration(bits: int | QuantConfig | None, config: QuantConfig | None) -> QuantConfig:
    """The one that is given."""
    if bits is not None and config is not None:
        raise ValueError(
            f"Expected 'bits' or 'config', not both (got bits={bits!r} and a configuration of "
            f"{getattr(config, 'bits', '?')} bits); set the width in the configuration: QuantConfig(bits={bits!r}, ...)"
        )
    if isinstance(bits, QuantConfig):
        return bits
    if config is None:
        return QuantConfig(bits=DEFAULT_BITS if bits is None else bits)
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"Expected a QuantConfig as 'config' (got {type(config).__name__}); from a dictionary: "
            f"QuantConfig.from_dict(...)"
        )
    return config


ConfigOf = Callable[[str], QuantConfig]
Sites = set[tuple[str, Site]]


def _convert_or_undo(model: nn.Module, names: list[str], config_of: ConfigOf, places: dict[str, StackPlace]) -> Sites:
    try:
        with ordinary_tensors():
            made = _convert(model, names, config_of, places)
        connect_stacks(model, places)
        close_fast_paths(model)
    except Exception:
        open_fast_paths(model)
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                restore_class(layer)
        raise
    return made


def _warn_of_idle_overrides(config: QuantConfig, made: Sites, stacklevel: int) -> None:
    for pattern, name, able in config.idle_overrides(made):
        inside = [layer for layer in able if fnmatchcase(layer, f"{pattern}.*")]
        others = inside or able
        listed = ", ".join(f"'{layer}'" for layer in others[:5]) + (", ..." if len(others) > 5 else "")
        warnings.warn(
            f"{name!r} in the override for '{pattern}' changes nothing: no layer of that name has such a site; "
            f"{listed} {'inside have: ' + repr(pattern + '.*') if inside else 'have'}",
            stacklevel=stacklevel + 1,
        )


def _stack_places(chosen: list[tuple[str, nn.Module]], config_of: ConfigOf) -> dict[str, StackPlace]:
    """The deep stacks among the layers to be converted."""
    convs = {name: layer for name, layer in chosen if issubclass(mixin_for(layer) or object, QuantizedConv)}
    deep = {name for name in convs if (smp := config_of(name).smp) is not None and smp.deep}
    if not deep:
        return {}
    widths = {name: conv_widths(conv) for name, conv in convs.items()}
    places = find_stacks(
        {name: width if _can_stack(convs[name], name in deep) else None for name, width in widths.items()}
    )
    if not places:
        listed = ", ".join(f"{name} ({' to '.join(map(str, w)) if w else '?'})" for name, w in widths.items())
        raise ValueError(
            f"Expected a deep stack for 'initial_residual' and 'identity_map': two or more consecutive convolutions of "
            f"equal width, in a list or numbered (got {listed})"
        )
    return places


def _can_stack(conv: nn.Module, deep: bool) -> bool:
    return deep and deep_mixin(mixin_for(conv)) is not None


def _convert(model: nn.Module, names: list[str], config_of: ConfigOf, places: dict[str, StackPlace]) -> Sites:
    layers = dict(model.named_modules())
    entrance, at_input, made = Entrance(), "", set[tuple[str, Site]]()
    last = output_layer(names, {name: mixin_for(layers[name]) or QuantizedLayer for name in names})
    for name in names:
        layer = layers[name]
        if isinstance(layer, QuantizedLayer):
            continue  # converted together with the layer around it
        place = places.get(name)
        mixin = mixin_for(layer) if place is None else deep_mixin(mixin_for(layer))
        assert mixin is not None
        device, dtype = _placement(layer, model)
        settings = config_of(name)
        output = name == last and settings.bits_for("output") != OFF
        enters = entrance.is_open = entrance.is_open or is_in_copy(model, name, at_input)
        sites = SiteFactory(name, settings, device, dtype, entrance, config_of, place, made)
        convert_layer(layer, mixin, sites, output=output)
        if enters and not entrance.is_open:
            at_input = at_input or name
    return made


def _kind_of_state(state: Mapping[str, Any]) -> str:
    if any(str(key).rpartition(".")[2] in ("words", "weight_scale") for key in state):
        return "of a packed model; save and load that by qgnn_plugin.save_packed and load_packed"
    return (
        "that does not say how it was converted); convert with the configuration it was saved with: "
        "qgnn_plugin.quantize_model(model, config=..."
    )


def _check_materialized(layers: list[tuple[str, nn.Module]]) -> None:
    lazy = [
        name for name, m in layers if any(isinstance(p, UninitializedParameter) for p in m.parameters(recurse=False))
    ]
    if lazy:
        raise ValueError(
            f"Expected initialized layers (got lazy ones: {', '.join(lazy)}); run the model once on a batch before "
            f"converting it, so that its channels of -1 are known"
        )


def _check_units(layers: list[tuple[str, nn.Module]]) -> None:
    """A layer that quantizes its inner ones itself is converted with them or not at all."""
    names = {name for name, _ in layers}
    for name, layer in layers:
        for child in getattr(mixin_for(layer), "units", ()):
            inner = f"{name}.{child}" if name else child
            if hasattr(layer, child) and inner not in names:
                raise ValueError(
                    f"Expected '{inner}' to be converted with '{name or type(layer).__name__}', which feeds it codes; "
                    f"exclude both, or keep the weights in full precision: "
                    f"overrides={{'{inner}': {{'weight_bits': 32}}}}"
                )


def _placement(layer: nn.Module, model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    for owner in (layer, model):
        for tensor in (*owner.parameters(), *owner.buffers()):
            if tensor.is_floating_point() and not isinstance(tensor, UninitializedParameter):
                return tensor.device, tensor.dtype
    return None, None


def restore_model(qmodel: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo :func:`quantize_model`: the plain model, with bitwise the float weights that ``qmodel`` holds now.

    Raises:
        ValueError: If ``qmodel`` holds no converted layer.
    """
    expect_converted(qmodel)
    model = qmodel if inplace else copy_model(qmodel)
    for layer in list(model.modules()):
        if isinstance(layer, QuantizedLayer):
            restore_class(layer)
    close_checkpoints(model)
    open_fast_paths(model)
    close_scopes(model)
    return close_scripted(model)


def unquantized(qmodel: nn.Module) -> nn.Module:
    """The float model that ``qmodel`` stands for: plain, or at 32 bits where its deep stacks are rewritten."""
    plain = restore_model(qmodel)
    deep = {n: layer for n, layer in quantized_layers(qmodel).items() if isinstance(layer, DeepLayer)}
    if not deep:
        return plain
    overrides = {name: {"smp": layer._deep_config} for name, layer in deep.items()}
    return quantize_model(plain, config=QuantConfig(bits=OFF, smp=None, overrides=overrides))
