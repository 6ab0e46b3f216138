"""The description in the header of a packed model, checked field by field before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from ...config import BITS, GRANULARITIES, MULTILEVEL_BITS, OFF, QuantConfig
from ...quantizers import QLRQuantizer, RangeKind
from ...smp.deep import StackPlace
from ..layers.base import LayerSpec
from ..layers.ranges import SiteSpec
from ..layers.site_spec import UNSET, ZERO_ONE, ZERO_ONE_ROWS
from . import container
from .settings import ModuleSettings

__all__ = ["Description", "fits", "read_description"]

Refuse = Callable[[str, str, Any], NoReturn]  # field, what it must be, what it is

MOST_LAYERS = 100_000
LONGEST_REASON = 1000
HIGHEST_CODE = 255


class Description:
    """A checked description.

    Args:
        model: Name of the model's class.
        specs: Every converted layer, in order.
        settings: Its modules and their settings, :obj:`None` in files that know none.
        origin: What the writer noted of how it is built.
    """

    def __init__(
        self,
        model: str,
        specs: list[LayerSpec],
        settings: dict[str, ModuleSettings] | None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.specs, self.settings, self.origin = model, specs, settings, origin


def read_description(path: container.PathLike, value: Any) -> Description:
    """Check the description that ``path`` holds.

    Raises:
        ValueError: If something is missing, unknown, of another type or out of range (names the file and the field).
    """
    refuse: Refuse = partial(container.refuse, path)
    _mapping(refuse, "description", value, {"model", "configs", "layers"}, {"settings", "origin"})
    _text(refuse, "model", value["model"])
    configs, layers = value["configs"], value["layers"]
    _list(refuse, "layers", layers, MOST_LAYERS)
    _list(refuse, "configs", configs, len(layers))
    read = [_config(refuse, f"configs[{i}]", config) for i, config in enumerate(configs)]
    specs = [_layer(refuse, f"layers[{i}]", layer, read) for i, layer in enumerate(layers)]
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names) or not names:
        refuse("layers", "at least one layer and no name twice", names)
    _check_stacks(refuse, specs)
    settings = value.get("settings")
    origin = value.get("origin")
    if origin is not None and not isinstance(origin, dict):
        refuse("origin", "a mapping", origin)
    return Description(value["model"], specs, None if settings is None else _settings(refuse, settings), origin)


# Kinds of values ######################################################################################################


def _mapping(refuse: Refuse, field: str, value: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, dict) or not required <= value.keys() <= required | optional:
        names = ", ".join(sorted(required)) + (f" (and perhaps {', '.join(sorted(optional))})" if optional else "")
        refuse(field, f"a mapping of {names}", value)


def _list(refuse: Refuse, field: str, value: Any, most: int) -> None:
    if not isinstance(value, list) or len(value) > most:
        refuse(field, f"a list of at most {most} entries", value)


def _text(refuse: Refuse, field: str, value: Any, most: int = 10_000) -> None:
    if not isinstance(value, str) or len(value) > most:
        refuse(field, f"a text of at most {most} characters", value)


def _integer(refuse: Refuse, field: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        refuse(field, f"an integer of {low} to {high}", value)


def _one_of(refuse: Refuse, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(item) and value == item for item in allowed):
        refuse(field, f"one of {', '.join(map(repr, allowed))}", value)


# Layers ###############################################################################################################


def _config(refuse: Refuse, field: str, value: Any) -> QuantConfig:
    if not isinstance(value, dict) or value.get("overrides", {}) != {}:
        refuse(field, "the configuration of a layer", value)
    try:
        return QuantConfig.from_dict(value)
    except (TypeError, ValueError, OverflowError) as error:
        refuse(field, f"a valid configuration ({str(error)[:200]})", value)


def _layer(refuse: Refuse, field: str, value: Any, configs: list[QuantConfig]) -> LayerSpec:
    optional = {"reason", "smooth", "output", "attention_bits", "check", "deep_place"}
    _mapping(refuse, field, value, {"name", "type", "config", "sites"}, optional)
    values = dict(value)
    for name in ("name", "type"):
        _text(refuse, f"{field}.{name}", values[name])
    _integer(refuse, f"{field}.config", values["config"], 0, len(configs) - 1)
    values["config"] = configs[values["config"]]
    if values.get("reason") is not None:
        _text(refuse, f"{field}.reason", values["reason"], LONGEST_REASON)
    for name in ("smooth", "output", "check"):
        _one_of(refuse, f"{field}.{name}", values.get(name, False), (False, True))
    _one_of(refuse, f"{field}.attention_bits", values.get("attention_bits", OFF), MULTILEVEL_BITS)
    if not isinstance(values["sites"], dict):
        refuse(f"{field}.sites", "a mapping of sites", values["sites"])
    values["sites"] = {k: _site(refuse, f"{field}.sites.{k}", site) for k, site in values["sites"].items()}
    if "deep_place" in values:
        values["deep_place"] = _place(refuse, f"{field}.deep_place", values["deep_place"])
    return LayerSpec(**values)


def _site(refuse: Refuse, field: str, value: Any) -> SiteSpec:
    _mapping(refuse, field, value, {"bits"}, {"granularity", "zero_code", "truncated", "channels", "two_levels"})
    _one_of(refuse, f"{field}.bits", value["bits"], (UNSET, *BITS))
    _one_of(refuse, f"{field}.granularity", value.get("granularity", "tensor"), GRANULARITIES)
    _one_of(refuse, f"{field}.truncated", value.get("truncated", False), (False, True))
    _one_of(refuse, f"{field}.two_levels", value.get("two_levels", False), (False, value["bits"] == 1))
    _integer(refuse, f"{field}.channels", value.get("channels", 0), 0, 2**31 - 1)
    zero = value.get("zero_code", 0.0)
    if zero is not None and (type(zero) not in (int, float) or not 0 <= zero <= HIGHEST_CODE):
        refuse(f"{field}.zero_code", f"null or a number of 0 to {HIGHEST_CODE}", zero)
    return SiteSpec(**value)


def _place(refuse: Refuse, field: str, value: Any) -> StackPlace:
    _mapping(refuse, field, value, {"stack", "depth", "length"}, set())
    _text(refuse, f"{field}.stack", value["stack"])
    _integer(refuse, f"{field}.length", value["length"], 1, MOST_LAYERS)
    _integer(refuse, f"{field}.depth", value["depth"], 1, value["length"])
    return StackPlace(**value)


def _check_stacks(refuse: Refuse, specs: list[LayerSpec]) -> None:
    """The layers of a stack are all there, in order."""
    stacks: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        if spec.deep_place is not None:
            stacks.setdefault(spec.deep_place.stack, []).append(spec)
    for first, layers in stacks.items():
        places = [spec.deep_place for spec in layers]
        if places != [StackPlace(layers[0].name, depth, len(layers)) for depth in range(1, len(layers) + 1)]:
            refuse("layers", f"the layers of the stack '{first}' in order", [str(place) for place in places])


# Settings #############################################################################################################


def _settings(refuse: Refuse, value: Any) -> dict[str, ModuleSettings]:
    """Every module: the name of its class, and which of the sets of values is its own."""
    _mapping(refuse, "settings", value, {"sets", "modules"}, set())
    sets, modules = value["sets"], value["modules"]
    _list(refuse, "settings.sets", sets, MOST_LAYERS)
    for i, values in enumerate(sets):
        if not isinstance(values, dict):
            refuse(f"settings.sets[{i}]", "a mapping of settings", values)
    if not isinstance(modules, dict):
        refuse("settings.modules", "a mapping of modules", modules)
    found = {}
    for name, entry in modules.items():
        field = f"settings.modules.{name}"
        _list(refuse, field, entry, 2)
        if len(entry) != 2:
            refuse(field, "a class and a number", entry)
        _text(refuse, f"{field}[0]", entry[0])
        _integer(refuse, f"{field}[1]", entry[1], 0, len(sets) - 1)
        found[name] = ModuleSettings(entry[0], sets[entry[1]])
    return found


def written(settings: Mapping[str, ModuleSettings]) -> dict[str, Any]:
    """What :func:`read_description` reads as ``settings``: values that modules share are written once."""
    sets: list[Mapping[str, Any]] = []
    modules: dict[str, Any] = {}
    for name, module in settings.items():
        if module.values not in sets:
            sets.append(module.values)
        modules[name] = [module.type, sets.index(module.values)]
    return {"sets": sets, "modules": modules}


# Sites and the quantizers that they stand for #########################################################################


def fits(site: SiteSpec, quantizer: QLRQuantizer, *, packed: bool) -> bool:
    """Whether ``site`` can be the description of ``quantizer``, whose range is not known here.

    Args:
        site: From a file.
        quantizer: As conversion makes it with the configuration in that file.
        packed: Whether the layer is packed.
    """
    outline = SiteSpec.outline(quantizer)
    if not packed or outline.bits == OFF:
        return site == outline
    if site.bits == UNSET:
        return site == SiteSpec(UNSET)
    if site.is_zero_one:
        return site in (ZERO_ONE, ZERO_ONE_ROWS)
    channels = quantizer.log_scale.numel() if quantizer.granularity == "channel" else 0
    codes = [quantizer._zero_code(kind) for kind in (RangeKind.FREE, RangeKind.NONNEGATIVE, RangeKind.ZEROS)]
    known = (replace(outline, zero_code=code, channels=channels) for code in codes)
    return site in known
