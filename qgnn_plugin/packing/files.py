"""``save_packed`` and ``load_packed``: packed models as files, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor, nn

from ..config import QuantConfig, SMPConfig
from ..conversion import is_quantized
from ..layers.base import QuantizedLayer, SiteFactory, restore_class
from ..layers.message_passing import QuantizedMessagePassing
from ..layers.registry import convert_layer
from ..quantizers import QLRQuantizer
from ..smp.deep import StackPlace, connect_stacks
from . import container
from .base import LayerSpec
from .model import assemble, is_packed, layer_mixin, specs_of, stack_places
from .ranges import SiteSpec

__all__ = ["load_packed", "save_packed"]

KIND = "model"
_PLAIN = {"reason": None, "smooth": False, "output": False, "attention_bits": 32, "check": False}


def save_packed(packed: nn.Module, path: container.PathLike) -> None:
    """Write a packed model: its tensors, and its configuration per layer in the header.

    Raises:
        ValueError: If ``packed`` was not made by :func:`~qgnn_plugin.pack_model`.
    """
    specs = specs_of(packed)
    state = packed.state_dict(keep_vars=True)
    tensors = {names[0]: state[names[0]] for names in _aliases(state)}
    # A model that is one layer has the name of its float class there.
    model = next((spec.type for spec in specs if spec.name == ""), type(packed).__name__)
    container.write(path, KIND, tensors, {"model": model, **_describe(specs)})


def load_packed(path: container.PathLike, model: nn.Module, *, verify: bool = True, mmap: bool = False) -> nn.Module:
    """Read a packed model.

    Args:
        path: A file written by :func:`save_packed`; nothing in it is executed.
        model: The float architecture, any instance; its weights are not used and it is not changed.
        verify: Compare every tensor with its checksum.
        mmap: Map the file into memory instead of reading it: pages come when a layer first uses them (or when
            ``verify`` does), and several processes share them.  Replacing the file, as :func:`save_packed` does, is
            fine; whoever overwrites or cuts it in place changes results or ends the process.

    Returns:
        The packed model, bitwise the one saved, in eval mode on the device of ``model``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, truncated or foreign, or does not fit ``model`` (names the
            first difference).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected the float model, a torch.nn.Module (got {type(model).__name__})")
    if is_packed(model) or is_quantized(model):
        raise ValueError("Expected the float architecture as 'model' (got a converted model)")
    tensors, description = container.read(path, KIND, verify=verify, mmap=mmap)
    specs = _specs(description)
    if description.get("model") != type(model).__name__:
        _differ(path, "the model", str(description.get("model")), type(model).__name__)
    layers = dict(model.named_modules())
    for spec in specs:
        found = type(layers[spec.name]).__name__ if spec.name in layers else "no such layer"
        if found != spec.type:
            _differ(path, f"layer '{spec.name}'", spec.type, found)
    packed = assemble(model, layers, specs)
    _convert_rest(packed, specs, set(tensors))
    _load(packed, tensors, path)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    return packed if device is None else packed.to(device)


def _describe(specs: list[LayerSpec]) -> dict[str, Any]:
    """Every layer; configurations that layers share are written once."""
    configs: list[dict[str, Any]] = []
    layers = []
    for spec in specs:
        config = _told(spec.config.to_dict(), QuantConfig)
        if isinstance(config["smp"], dict):
            config["smp"] = _told(config["smp"], SMPConfig)
        if config not in configs:
            configs.append(config)
        entry: dict[str, Any] = {"name": spec.name, "type": spec.type, "config": configs.index(config)}
        entry["sites"] = {site: s.to_dict() for site, s in spec.sites.items()}
        entry |= {k: getattr(spec, k) for k, v in _PLAIN.items() if getattr(spec, k) != v}
        if spec.deep_place is not None:
            entry["deep_place"] = asdict(spec.deep_place)
        layers.append(entry)
    return {"configs": configs, "layers": layers}


def _told(values: Mapping[str, Any], cls: type[QuantConfig | SMPConfig]) -> dict[str, Any]:
    """``values`` without the fields that are :obj:`None` because nothing was chosen: their default is :obj:`None`."""
    unset = {field.name for field in fields(cls) if field.default is None}
    return {name: value for name, value in values.items() if value is not None or name not in unset}


def _specs(description: Mapping[str, Any]) -> list[LayerSpec]:
    configs = [QuantConfig.from_dict(config) for config in description["configs"]]
    specs = []
    for entry in description["layers"]:
        values = dict(entry)
        values["config"] = configs[values["config"]]
        values["sites"] = {k: SiteSpec.from_dict(v) for k, v in values["sites"].items()}
        if "deep_place" in values:
            values["deep_place"] = StackPlace(**values["deep_place"])
        specs.append(LayerSpec(**values))
    return specs


def _aliases(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in groups that share one tensor, as shared layers do."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _convert_rest(packed: nn.Module, specs: list[LayerSpec], keys: set[str]) -> None:
    """Convert the layers that are not packed, so that they run their quantized-float path."""
    configs = {spec.name: spec.config for spec in specs}
    for spec in specs:
        layer = packed.get_submodule(spec.name)
        if spec.reason is None or spec.stays_plain or isinstance(layer, QuantizedLayer):
            continue
        if not any(_converted(packed, layer, spec, keys, configs, first) for first in (False, True)):
            raise ValueError(f"Expected the sites of layer '{spec.name}' as saved (got others)")
    connect_stacks(packed, stack_places(specs))
    packed.eval()
    for parameter in packed.parameters():
        parameter.requires_grad_(False)


def _converted(
    packed: nn.Module,
    layer: nn.Module,
    spec: LayerSpec,
    keys: set[str],
    configs: Mapping[str, QuantConfig],
    first: bool,
) -> bool:
    """Convert ``layer`` as the first or a later one of its model; undo it where that is not what was saved."""
    mixin = layer_mixin(layer, spec)
    if mixin is None:
        raise ValueError(f"Expected a layer that can be converted at '{spec.name}' (got a {spec.type})")
    floats = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    device, dtype = (floats[0].device, floats[0].dtype) if floats else (None, None)
    factory = SiteFactory(
        spec.name, spec.config, device, dtype, [first], lambda name: configs.get(name, spec.config), spec.deep_place
    )
    convert_layer(layer, mixin, factory, output=spec.output)
    own: Any = layer
    if isinstance(own, QuantizedMessagePassing):
        own.adopt(spec.sites, factory)
    sites = {name: SiteSpec.outline(quantizer) for name, quantizer in own.own_quantizers()}
    if sites == spec.sites and _sites_state(packed, layer) <= keys:
        return True
    for module in list(layer.modules()):
        if isinstance(module, QuantizedLayer):
            restore_class(module)
    return False


def _sites_state(packed: nn.Module, layer: nn.Module) -> set[str]:
    """Names of what the sites of ``layer`` hold; a module that has two names is saved under the first."""
    names = {id(module): name for name, module in packed.named_modules()}
    sites = [module for module in layer.modules() if isinstance(module, QLRQuantizer)]
    return {f"{names[id(site)]}.{key}" for site in sites for key in site.state_dict()}


def _load(packed: nn.Module, tensors: dict[str, Tensor], path: container.PathLike) -> None:
    """Hand the tensors over without copying; the first that does not fit is an error."""
    state = packed.state_dict(keep_vars=True)
    loaded: dict[str, Tensor] = {}
    for names in _aliases(state):
        name, expected = names[0], state[names[0]]
        if name not in tensors:
            _differ(path, f"tensor '{name}'", "nothing", _shape(expected))
        found = tensors.pop(name)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            _differ(path, f"tensor '{name}'", _shape(found), _shape(expected))
        loaded |= dict.fromkeys(names, found)
    for name, found in tensors.items():
        _differ(path, f"tensor '{name}'", _shape(found), "nothing")
    packed.load_state_dict(loaded, assign=True)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _differ(path: container.PathLike, what: str, saved: str, found: str) -> None:
    raise ValueError(
        f"Expected the architecture that '{path}' was saved from; the first difference is {what}: "
        f"{saved} in the file, {found} in the model"
    )
