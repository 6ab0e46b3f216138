"""``save_packed`` and ``load_packed``: packed models as files, without pickle."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...atomic import shown
from ...config import OFF, QuantConfig, SMPConfig
from ...conversion.convert import convert_as
from ...conversion.converted import is_quantized, quantized_layers
from ...conversion.copying import copying_memo, ordinary_tensors
from ...conversion.scripted import opened_copy
from ...layers.base import SiteFactory
from ...layers.message_passing import SITES, QuantizedMessagePassing
from ...quantizers import QLRQuantizer, RangeKind
from ..layers.base import LayerSpec, PackedLayer
from ..layers.ranges import PackedRange
from ..layers.weights import PackedWeight
from ..model import assemble, is_packed, own_state, specs_of
from . import container
from .schema import Description, fits, read_description, written
from .settings import first_difference, settings_of

__all__ = ["load_packed", "read_origin", "save_packed"]

KIND = "model"
RANGES = ("scale", "lower_end", "skew", "unit")  # buffers of a frozen range
OTHER_RANGES = ("weight_scale", "weight_lower_end", "multiplier")  # and of a packed layer
_PLAIN = {"reason": None, "smooth": False, "output": False, "attention_bits": OFF, "check": False}


def save_packed(packed: nn.Module, path: container.PathLike, *, origin: Mapping[str, Any] | None = None) -> None:
    """Write a packed model: its tensors, and in the header its configuration per layer and its settings.

    The file is complete or not there: whoever reads ``path`` sees the old file or the new one.  A symbolic link is
    replaced, not followed; permissions are those of the umask.

    Args:
        packed: The model.
        path: The file.
        origin: How the model is built, a note to whoever reads the file (:func:`read_origin`): plain values as JSON
            knows them.  Loading does not look at it.

    Raises:
        ValueError: If ``packed`` was not made by :func:`~qgnn_plugin.pack_model`, or holds state that is no tensor.
        OSError: If there is no folder for ``path``, or it cannot be written.
    """
    specs = specs_of(packed)
    state = _state(packed)
    tensors = {names[0]: state[names[0]] for names in _aliases(state)}
    # A model that is one layer has the name of its float class there.
    model = next((spec.type for spec in specs if spec.name == ""), type(packed).__name__)
    description = {"model": model, **_describe(specs), "settings": written(settings_of(packed))}
    if origin is not None:
        description["origin"] = dict(origin)
    container.write(path, KIND, tensors, description)


def read_origin(path: container.PathLike) -> dict[str, Any] | None:
    """What :func:`save_packed` was given as ``origin``, :obj:`None` where that was nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or foreign.
    """
    _, value = container.read(path, KIND, verify=False, mmap=True)
    return read_description(path, value).origin


def load_packed(
    path: container.PathLike,
    model: nn.Module,
    *,
    verify: bool = True,
    mmap: bool = False,
    ignore: str | Iterable[str] = (),
) -> nn.Module:
    """Read a packed model.

    Args:
        path: A file written by :func:`save_packed`; nothing in it is executed.
        model: The float architecture, any instance built with the same settings; its weights are not used and it is
            not changed.
        verify: Compare every tensor with its checksum.
        mmap: Map the file into memory instead of reading it: pages come when a layer first uses them (or when
            ``verify`` does), and several processes share them.  Replacing the file, as :func:`save_packed` does, is
            fine; whoever overwrites or cuts it in place changes results or ends the process.
        ignore: Attributes that do not change what the model computes and may differ from those of the saved one, as
            patterns of :mod:`fnmatch`: ``"name"``, or ``"convs.0.name"`` for that of one module.

    Returns:
        The packed model, bitwise the one saved, in eval mode on the device of ``model`` (of one on ``meta``, which is
        enough, on the host).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``model`` is lazy, or the file is damaged, truncated or foreign, or does not fit ``model``, in
            its layers or in their settings (names the first difference).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected the float model, a torch.nn.Module (got {type(model).__name__}); call load_packed(path, model)"
        )
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise ValueError(
            f"Expected a model whose sizes are known (got lazy layers: {', '.join(lazy[:5])}); run it once on a batch, "
            f"or build it with the channels in the place of -1"
        )
    if is_packed(model) or is_quantized(model):
        raise ValueError("Expected the float architecture as 'model' (got a converted model)")
    with ordinary_tensors():
        return _loaded(path, opened_copy(model), [ignore] if isinstance(ignore, str) else ignore, verify, mmap)


def _loaded(path: container.PathLike, model: nn.Module, ignore: Iterable[str], verify: bool, mmap: bool) -> nn.Module:
    tensors, value = container.read(path, KIND, verify=verify, mmap=mmap)
    description = read_description(path, value)
    _compare(path, description, model, ignore)
    converted = _outline(model)
    specs = description.specs
    try:
        convert_as(converted, {spec.name: spec.config for spec in specs})
    except ValueError as error:
        raise ValueError(f"Expected the architecture that '{shown(path)}' was saved from: {error}") from error
    layers = quantized_layers(converted)
    for spec in specs:
        _check_layer(path, spec, layers[spec.name])
    for module in converted.modules():
        module.training = False  # without a call of eval(): what that computes is in the file
    packed = assemble(converted, layers, specs).eval()
    _fill(packed, tensors, path)
    _check_values(packed, path)
    device = next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), None)
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


def _state(packed: nn.Module) -> dict[str, Tensor]:
    """The tensors of a packed model.

    Raises:
        ValueError: If a module of the user keeps something else than a tensor in its state.
    """
    state = own_state(packed)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Expected tensors in the state dict of a packed model (got a {type(value).__name__} at '{name}'); let "
                f"get_extra_state() of that module return a tensor"
            )
    return state


def _aliases(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in groups that share one tensor, as shared layers do."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _outline(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the host whose parameters and buffers hold nothing yet."""
    memo = copying_memo(model)
    for module in model.modules():
        hidden = module._non_persistent_buffers_set
        buffers = [buffer for name, buffer in module._buffers.items() if name not in hidden]
        for tensor in (*module._parameters.values(), *buffers):
            if tensor is None or type(tensor) not in (Tensor, nn.Parameter) or id(tensor) in memo:
                continue
            if tensor.layout == torch.strided:
                empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
                memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    outline = copy.deepcopy(model, memo)
    memo.complete()
    return outline


def _compare(path: container.PathLike, saved: Description, model: nn.Module, ignore: Iterable[str]) -> None:
    """Raise unless ``model`` is of the classes and settings that were saved."""
    if saved.model != type(model).__name__:
        _differ(path, "the model", saved.model, type(model).__name__)
    layers = dict(model.named_modules())
    for spec in saved.specs:
        found = type(layers[spec.name]).__name__ if spec.name in layers else "no such layer"
        if found != spec.type:
            _differ(path, f"layer '{spec.name}'", spec.type, found)
    if saved.settings is None:
        return
    difference = first_difference(saved.settings, settings_of(model), [spec.name for spec in saved.specs], ignore)
    if difference is not None:
        _differ(path, *difference)


def _check_layer(path: container.PathLike, spec: LayerSpec, layer: Any) -> None:
    """Raise unless the description of a layer follows from its configuration, as far as that goes."""
    if isinstance(layer, QuantizedMessagePassing):
        _adopt_sites(path, spec, layer)
    own = dict(layer.own_quantizers())
    if own.keys() != spec.sites.keys():
        _differ(path, f"the sites of layer '{spec.name}'", ", ".join(spec.sites), ", ".join(own))
    for name, site in spec.sites.items():
        if not fits(site, own[name], packed=spec.reason is None):
            _differ(path, f"site '{name}' of layer '{spec.name}'", str(site.to_dict()), str(own[name].extra_repr()))
    smooth = spec.smooth and getattr(layer, "_smp", None) is None
    expected = {
        "output": type(layer).quantizes_output,
        "attention_bits": getattr(layer, "attention_bits", OFF),
        "deep_place": getattr(layer, "_deep_place", None),
        "smooth": False if smooth else spec.smooth,
    }
    for field, value in expected.items():
        if getattr(spec, field) != value:
            _differ(path, f"'{field}' of layer '{spec.name}'", str(getattr(spec, field)), str(value))


def _adopt_sites(path: container.PathLike, spec: LayerSpec, layer: Any) -> None:
    """Give a generic layer quantizers for the arguments that had ranges: data have decided which these are."""
    sent = {name.removesuffix("_j") for name in layer._user_args if name.endswith("_j")}
    for name in spec.sites:
        if name.startswith(SITES) and name.removeprefix(SITES) not in sent:
            _differ(path, f"site '{name}' of layer '{spec.name}'", "an argument of its message", "none")
    dtypes = [t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    layer.adopt(spec.sites, SiteFactory(spec.name, spec.config, torch.device("cpu"), dtypes[0] if dtypes else None))


@torch.no_grad()
def _fill(packed: nn.Module, tensors: Mapping[str, Tensor], path: container.PathLike) -> None:
    """Hand the tensors over without copying; the first that does not fit is an error.

    Parameters and buffers stay the objects that they are: whatever else in the model refers to one goes on doing so.
    """
    state = _state(packed)
    groups = _aliases(state)
    for names in groups:
        name, expected = names[0], state[names[0]]
        if name not in tensors:
            _differ(path, f"tensor '{name}'", "nothing", _shape(expected))
        found = tensors[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            _differ(path, f"tensor '{name}'", _shape(found), _shape(expected))
    known = {names[0] for names in groups}
    for name in tensors:
        if name not in known:
            _differ(path, f"tensor '{name}'", _shape(tensors[name]), "nothing")
    for names in groups:
        state[names[0]].set_(tensors[names[0]])  # type: ignore[call-overload]
    # A module of the user may compute what it saves: then only its own loading knows the way back.
    if any(value.data_ptr() != state[name].data_ptr() for name, value in _state(packed).items()):
        packed.load_state_dict({name: tensors[names[0]] for names in groups for name in names}, strict=False)


def _check_values(packed: nn.Module, path: container.PathLike) -> None:
    """Raise where a range holds what no range can be."""
    kinds = [int(kind) for kind in RangeKind]
    for name, module in packed.named_modules():
        if isinstance(module, QLRQuantizer) and int(module.kind) not in kinds:
            container.refuse(path, f"{name}.kind", f"one of {kinds}", int(module.kind))
        sites = isinstance(module, (PackedRange, PackedWeight))
        ranges = RANGES if sites else OTHER_RANGES if isinstance(module, PackedLayer) else ()
        for key in ranges:
            value = getattr(module, key, None)
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                container.refuse(path, f"{name}.{key}", "finite numbers", value[~value.isfinite()].tolist())


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _differ(path: container.PathLike, what: str, saved: str, found: str) -> NoReturn:
    remedy = ""
    if what.startswith("setting"):
        remedy = "; build the model with the same settings, or pass ignore=... if this one does not change its results"
    raise ValueError(
        f"Expected the architecture that '{shown(path)}' was saved from; the first difference is {what}: "
        f"{saved} in the file, {found} in the model{remedy}"
    )
