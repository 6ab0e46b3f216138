"""Configuration of a conversion: bit widths per site, granularity, truncation and smoothness."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from .checks import check_levels, check_one_of, did_you_mean, known_fields
from .smp import SMPConfig
from .widths import BITS, MULTILEVEL_BITS, OFF, shown_widths

__all__ = ["GRANULARITIES", "LEVELS", "Granularity", "Levels", "QuantConfig", "Site", "Truncation"]

Granularity = Literal["tensor", "channel", "node", "row"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
Levels = Literal["affine", "unsigned", "symmetric", "half"]
LEVELS: tuple[Levels, ...] = get_args(Levels)
Truncation = Literal["bt", "sbt"]
Site = Literal["input", "weight", "activation", "message", "attention", "output"]

CONFIG_VERSION = 1
_BIT_FIELDS = (
    "bits", "input_bits", "weight_bits", "activation_bits", "message_bits", "attention_bits", "output_bits",
)  # fmt: skip
# The sites that a field is of: which of a layer's own have it as they are made.
_SITES_OF: dict[str, tuple[Site, ...]] = {
    "input_bits": ("input", "activation"),  # features, wherever the model takes them
    "weight_bits": ("weight",),
    "weight_granularity": ("weight",),
    "weight_levels": ("weight",),
    "activation_bits": ("input", "activation"),
    "message_bits": ("message",),
    "message_levels": ("message",),
}


@dataclass(frozen=True)
class QuantConfig:
    r"""What to quantize, to how many bits, and how the ranges are laid out.

    Args:
        bits: Width of every site that has no width of its own: 1, 2, 4, 8, or 32 for "not quantized".  One bit is two
            levels with a learned range, as in binary networks.
        input_bits: Features that enter the model (its first converted layer).
        weight_bits: Weights of linear maps.
        activation_bits: Inputs of every further layer.
        message_bits: What neighbours send: transformed, normalized node features.
        attention_bits: Unnormalized attention coefficients; default ``bits``, and at least 2: of two levels, all
            neighbours but those of the largest coefficients would be lost.
        output_bits: The model's outputs (off unless given).
        granularity: Of activations and messages, one range per ``"tensor"``, per feature ``"channel"``, per ``"node"``
            (a float factor for each) or per ``"row"``: a multiple of one range by an integer of 1 to 15 for each node.
            Messages of hubs and of leaves differ by orders of magnitude, which one range of four levels cannot hold;
            multiples hold them about as well as floats do, and keep sums over neighbours in integers.  Sites without
            such rows (largest values, the model's outputs) have one range per tensor instead.
        weight_granularity: ``"tensor"``, or ``"channel"``: a range per output channel.
        message_levels: Level placement of messages: ``"affine"`` (learned offset), ``"unsigned"``, ``"symmetric"``
            (zero is a level) or ``"half"`` (half-integer levels such as -1.5, -0.5, 0.5, 1.5).
        weight_levels: Level placement of weights.
        truncation: :obj:`None`, ``"bt"`` (8-bit codes truncated to fewer levels) or ``"sbt"`` (BT*, corrected for
            skewness).
        learn_ranges: Whether ranges receive gradients; otherwise they stay where calibration put them.
        learn_input_ranges: The same for the features that enter the model.  They are data: least mean-squared error
            already fits them, and a gradient for every stored value is the dearest part of a step on sparse features.
        smp: Smoothness constraint of every message-passing layer, or :obj:`None`.
        overrides: Layer-name pattern (as in :mod:`fnmatch`) to a mapping of the fields above for matching layers;
            later patterns win.  Weights of a convolution are mostly those of a layer inside it: ``"convs.1*"`` is both.
    """

    bits: int = 4
    input_bits: int | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    message_bits: int | None = None
    attention_bits: int | None = None
    output_bits: int | None = OFF
    granularity: Granularity = "row"
    weight_granularity: Literal["tensor", "channel"] = "channel"
    message_levels: Levels = "affine"
    weight_levels: Levels = "half"
    truncation: Truncation | None = None
    learn_ranges: bool = True
    learn_input_ranges: bool = False
    smp: SMPConfig | None = field(default_factory=SMPConfig)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if self.version != CONFIG_VERSION:
            raise ValueError(f"Expected a configuration of version {CONFIG_VERSION} (got {self.version})")
        for name in _BIT_FIELDS:
            value = getattr(self, name)
            if value is None and name != "bits":
                continue
            widths = MULTILEVEL_BITS if name == "attention_bits" else BITS
            if type(value) is not int or value not in widths:
                raise ValueError(f"Expected '{name}' to be one of {shown_widths(widths)} (got {value!r})")
        check_one_of("granularity", self.granularity, GRANULARITIES)
        check_one_of("weight_granularity", self.weight_granularity, ("tensor", "channel"))
        for name in ("message_levels", "weight_levels"):
            check_one_of(name, getattr(self, name), LEVELS)
        check_levels("message_levels", self.message_levels, self.bits_for("message"))
        check_levels("weight_levels", self.weight_levels, self.bits_for("weight"))
        check_one_of("truncation", self.truncation, (None, "bt", "sbt"))
        for name in ("learn_ranges", "learn_input_ranges"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"Expected {name!r} to be True or False (got {getattr(self, name)!r})")
        if self.smp is not None and not isinstance(self.smp, SMPConfig):
            raise TypeError(f"Expected 'smp' to be an SMPConfig or None (got {type(self.smp).__name__})")
        known = [f.name for f in fields(self) if f.name not in ("overrides", "version")]
        # A copy: a frozen configuration does not follow its caller's dictionary.
        overrides = {k: _mapping(k, v) for k, v in _mapping("overrides", self.overrides).items()}
        object.__setattr__(self, "overrides", overrides)
        for pattern, changes in self.overrides.items():
            if not isinstance(pattern, str):
                raise TypeError(
                    f"Expected names of layers, or patterns of them, in 'overrides' (got {pattern!r}); of a type: "
                    f"{{name: changes for name, layer in model.named_modules() if isinstance(layer, ...)}}"
                )
            for name in changes:
                if name not in known:
                    raise ValueError(
                        f"Unknown field {name!r} in the override for {pattern!r}{did_you_mean(name, known)}"
                    )
            replace(self, overrides={}, **changes)

    @classmethod
    def accurate(cls, bits: int = 4, **changes: Any) -> QuantConfig:
        """A float scale per node in place of an integer multiple of one range, and half-integer message levels.

        About as accurate as the default, whose sums over neighbours run in integers and are several times faster once
        packed.
        """
        chosen = {"bits": bits, "granularity": "node", "message_levels": "half", "learn_input_ranges": False}
        return cls(**{**chosen, **changes})

    def bits_for(self, site: Site) -> int:
        """The width of a site; falls back to ``bits``, that of attention to 2 at least."""
        value = getattr(self, f"{site}_bits")
        if value is None:
            return max(self.bits, MULTILEVEL_BITS[0]) if site == "attention" else self.bits
        return value

    def for_layer(self, name: str) -> QuantConfig:
        """The configuration of one layer: every override whose pattern matches its qualified name, in order."""
        config = replace(self, overrides={})
        for pattern, changes in self.overrides.items():
            if fnmatchcase(name, pattern):
                config = replace(config, **changes)
        return config

    def check_overrides(self, layer_names: list[str]) -> None:
        """Raise if a pattern of ``overrides`` matches none of ``layer_names``."""
        for pattern in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in layer_names):
                hint = did_you_mean(pattern, layer_names) or "."
                layers = ", ".join(layer_names) or "none"
                raise ValueError(f"The override pattern {pattern!r} matches no layer{hint} Layers: {layers}")

    def idle_overrides(self, sites: Collection[tuple[str, Site]]) -> Iterator[tuple[str, str, list[str]]]:
        """Overrides for sites that none of the layers they match has, and others have.

        Args:
            sites: What there is: names of layers, and the kind of a site.

        Yields:
            The pattern, the field, and the layers that have such sites.
        """
        for pattern, changes in self.overrides.items():
            for name in changes:
                able = sorted({layer for layer, site in sites if site in _SITES_OF.get(name, ())})
                if able and not any(fnmatchcase(layer, pattern) for layer in able):
                    yield pattern, name, able

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-serializable description; :meth:`from_dict` is its inverse."""
        plain = {p: {k: _plain(v) for k, v in changes.items()} for p, changes in self.overrides.items()}
        return {**asdict(replace(self, overrides={})), "overrides": plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: If ``data`` is no mapping, or ``overrides`` none of mappings.
            ValueError: If a field is unknown or out of range.
        """
        values = known_fields(cls, data)
        overrides = _mapping("overrides", values.get("overrides", {}))
        values["overrides"] = {p: _with_smp(_mapping(p, changes)) for p, changes in overrides.items()}
        return cls(**_with_smp(values))


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected a mapping for {name!r} in 'overrides' (got {type(value).__name__})")
    return dict(value)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, SMPConfig) else value


def _with_smp(values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("smp"), Mapping):
        values["smp"] = SMPConfig.from_dict(values["smp"])
    return values
