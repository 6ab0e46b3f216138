"""Configuration of a conversion: bit widths per site, granularity, truncation and smoothness."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from .kernels.layout import PACKED_BITS

__all__ = ["BITS", "MULTILEVEL_BITS", "OFF", "QuantConfig", "SMPConfig", "Site", "check_levels", "shown_widths"]

OFF = 32
BITS = (*PACKED_BITS, OFF)
MULTILEVEL_BITS = BITS[1:]  # of what two levels cannot hold: attention numerators, gap messages, states
Granularity = Literal["tensor", "channel", "node", "row"]
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "node", "row")
Levels = Literal["affine", "unsigned", "symmetric", "half"]
Truncation = Literal["bt", "sbt"]
Site = Literal["input", "weight", "activation", "message", "attention", "output"]

CONFIG_VERSION = 1
MOST_TERMS = 1000  # sweeps of the proximal correction


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        hint = _did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"Expected '{name}' to be one of {', '.join(map(repr, allowed))} (got {value!r}){hint}")


def _number(name: str, value: Any, *, positive: bool | None) -> None:
    """Raise unless ``value`` is a finite number: above zero, at least zero, or, with :obj:`None`, any."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive is not None and value < 0) or (positive and value == 0):
        bound = "" if positive is None else " > 0" if positive else " >= 0"
        raise ValueError(f"Expected {name!r}{bound}, a finite number (got {value!r})")


def shown_widths(widths: tuple[int, ...] = BITS) -> str:
    """Widths as errors name them."""
    return f"{', '.join(map(str, widths[:-1]))} or {OFF} = off"


def check_levels(name: str, levels: str, bits: int) -> None:
    """Raise where ``levels`` are symmetric around zero as a level, and there are but two of them."""
    if bits == 1 and levels == "symmetric":
        raise ValueError(
            f"Expected '{name}' other than 'symmetric' at 1 bit, whose two levels cannot lie around zero and hold it "
            f"(got 'symmetric'); use 'half' for -1/2 and 1/2 steps, or 'affine'"
        )


def _did_you_mean(value: str, allowed: tuple[Any, ...] | list[str]) -> str:
    close = difflib.get_close_matches(value, [a for a in allowed if isinstance(a, str)], n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _from_dict(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise TypeError(f"Expected the fields of a {cls.__name__} as a mapping (got {type(data).__name__})")
    known = [f.name for f in fields(cls)]
    for name in data:
        if name not in known:
            raise ValueError(f"Unknown {cls.__name__} field {name!r}{_did_you_mean(name, known)}")
    return dict(data)


@dataclass(frozen=True)
class SMPConfig:
    r"""Smoothness-aware message propagation (arXiv 2308.14949, section 4.3), one constraint per layer.

    The equations are in docs/smoothness.md.

    Args:
        alpha: Bound on the change a layer may make to the similarity of neighbours.  With the default, relative and
            equal to the square of the largest eigenvalue that a normalized Laplacian can have, a plain averaging layer
            meets it by itself: only a layer that amplifies differences is corrected.
        bound: ``"relative"``: ``g <= alpha tr(H' L H)``; ``"absolute"``: ``g <= alpha |E|``.
        correction: ``"proximal"``: ``D <- (I + 2 lambda L)^-1 D`` by ``terms`` damped Jacobi sweeps, stable for
            every multiplier; ``"explicit"``: ``D <- D - 2 eta lambda L D``.
        terms: Sweeps of the proximal correction.
        eta: Step size of the propagation.
        mu: Weight of the smoothness term of the propagation.
        eta_lambda: Ascent rate of the multiplier.
        eta_slack: Descent rate of the slack; a slack of 0 stays 0 and leaves the plain inequality.
        multiplier: Initial multiplier, >= 0.  At 0 a layer is the original one.
        slack: Initial slack.
        damping: ``c`` of the modified method: the penalty ``c/2 h^2`` on the violation ``h`` adds ``c h`` to the
            multiplier that acts.  0 is the basic method (Platt and Barr, 1987).
        max_multiplier: Upper end of the projection of the multiplier; with the explicit correction it is
            ``1 / (4 eta)`` at most, past which that is not stable.
        schedule: ``"step"``: :func:`qgnn_plugin.differential_multiplier_step`, or the Lightning callback, moves the
            multiplier once per optimizer step; ``"inner"``: it moves with every step of a propagation layer, within
            the forward pass, in training and in inference.  Convolutions take one step and know ``"step"`` only.
        carry: Whether an inner schedule starts where the last training forward ended, instead of at ``multiplier``.
        algorithm: ``"smp"``, or ``"reference"``: the update of the authors' code, see :meth:`reference`.
        state_bits: Width of the state between two steps of a quantized propagation (its messages have their own).
        gap_bits: Width of the gap messages, the changes that neighbours exchange for the correction; default the
            width of messages, and at least 2: zero is a level of theirs.
        initial_residual: Of deep stacks, in [0, 1): consecutive convolutions of equal width take this share of the
            stack's input instead of their own aggregation (``alpha`` of GCNII, which uses 0.1).
        identity_map: Of deep stacks, in (0, e - 1]: layer ``l`` blends its weights into the identity with strength
            ``log(identity_map / l + 1)`` (``theta`` of GCNII, which uses 0.5).  With neither, stacks stay as they are;
            with either, the model is another one: train it anew.
    """

    alpha: float = 4.0
    bound: Literal["relative", "absolute"] = "relative"
    correction: Literal["proximal", "explicit"] = "proximal"
    terms: int = 4
    eta: float = 0.1
    mu: float = 9.0
    eta_lambda: float = 0.05
    eta_slack: float = 0.0
    multiplier: float = 0.0
    slack: float = 0.0
    damping: float = 0.0
    max_multiplier: float = 100.0
    schedule: Literal["step", "inner"] = "step"
    carry: bool = False
    algorithm: Literal["smp", "reference"] = "smp"
    state_bits: int = OFF
    gap_bits: int | None = None
    initial_residual: float | None = None
    identity_map: float | None = None

    def __post_init__(self) -> None:
        _one_of("bound", self.bound, ("relative", "absolute"))
        _one_of("correction", self.correction, ("proximal", "explicit"))
        _one_of("schedule", self.schedule, ("step", "inner"))
        _one_of("algorithm", self.algorithm, ("smp", "reference"))
        for name, widths in (("state_bits", MULTILEVEL_BITS), ("gap_bits", (None, *MULTILEVEL_BITS))):
            _one_of(name, getattr(self, name), widths)
            if type(getattr(self, name)) not in (int, type(None)):
                raise ValueError(f"Expected {name!r} to be an integer (got {getattr(self, name)!r})")
        if type(self.terms) is not int or not 1 <= self.terms <= MOST_TERMS:
            raise ValueError(f"Expected 'terms' to be an integer between 1 and {MOST_TERMS} (got {self.terms!r})")
        for name in ("alpha", "eta", "eta_lambda", "max_multiplier"):
            _number(name, getattr(self, name), positive=True)
        for name in ("mu", "eta_slack", "multiplier", "damping"):
            _number(name, getattr(self, name), positive=False)
        _number("slack", self.slack, positive=None)
        if type(self.carry) is not bool:
            raise ValueError(f"Expected 'carry' to be True or False (got {self.carry!r})")
        for name in ("initial_residual", "identity_map"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), positive=False)
        self._check_algorithm()
        if self.initial_residual is not None and not 0 <= self.initial_residual < 1:
            raise ValueError(f"Expected 'initial_residual' in [0, 1) (got {self.initial_residual})")
        if self.identity_map is not None and not 0 < self.identity_map <= math.e - 1:
            raise ValueError(
                f"Expected 'identity_map' in (0, e - 1], for strengths of at most 1 (got {self.identity_map})"
            )

    @property
    def deep(self) -> bool:
        """Whether stacks of equal-width convolutions are rewritten."""
        return self.initial_residual is not None or self.identity_map is not None

    def _check_algorithm(self) -> None:
        if self.algorithm == "smp":
            return
        fixed = {"bound": "absolute", "correction": "explicit", "schedule": "inner", "carry": False, "damping": 0.0}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"Expected {name!r} = {value!r} for the reference algorithm (got {getattr(self, name)!r}); "
                    f"start from SMPConfig.reference()"
                )

    @classmethod
    def for_steps(cls, steps: int, **changes: Any) -> SMPConfig:
        r"""A bound for ``K`` plain averaging steps that keeps them from averaging everything away.

        With ``g <= 2 / K^2 tr(H' L H)`` a step's change is at most :math:`\sqrt 2 / K` times as rough as what it finds
        (roughness being :math:`\sqrt{\mathrm{tr}(H' L H)}`), so that all of them together change about what is there.
        Under a multiplier :math:`\lambda` a step ``H <- A~ H`` changes a component of frequency ``l`` by
        :math:`l / (1 + 2 \lambda l)`, less than :math:`1 / (2 \lambda)` of it: training starts from the multiplier at
        which that is the bound.

        A corrected step takes ``1 + terms`` products with ``A~``.

        Args:
            steps: ``K``.
            **changes: Other settings.

        Raises:
            ValueError: If ``steps`` is less than 1.
        """
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"Expected the number of steps as an integer (got {steps!r})")
        if steps < 1:
            raise ValueError(f"Expected at least one step (got {steps})")
        alpha = 2 / steps**2
        return cls(**{"alpha": alpha, "multiplier": 0.5 / math.sqrt(alpha), "terms": 16, **changes})

    @classmethod
    def reference(cls, **changes: Any) -> SMPConfig:
        r"""The update of the authors' code, for comparison; of propagation layers only.

        With ``D = U - H`` before the correction, in every step of every forward pass anew from
        ``lambda = s = 1e-3``,

        .. math::
            H \leftarrow U + 2 \eta \lambda \tilde A D \qquad
            s \leftarrow s + 2 \eta_s \lambda s \qquad
            \lambda \leftarrow \lambda + \eta_\lambda (\alpha\, \mathrm{nnz}(\tilde A) - s^2 - g)

        ``lambda`` grows while the bound is met, and the correction does not smooth: no multiplier enforces the bound.
        """
        settings: dict[str, Any] = {
            "algorithm": "reference",
            "alpha": 0.1,
            "bound": "absolute",
            "correction": "explicit",
            "schedule": "inner",
            "eta_lambda": 1e-5,
            "eta_slack": 1e-5,
            "multiplier": 1e-3,
            "slack": 1e-3,
        }
        return cls(**{**settings, **changes})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def acting(self) -> dict[str, Any]:
        """The settings that decide what a layer computes, its multiplier given; the others steer training."""
        steering = {"alpha", "bound", "eta_lambda", "eta_slack", "multiplier", "slack", "damping", "carry"}
        left_out = set() if self.schedule == "inner" else {*steering, "max_multiplier"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SMPConfig:
        return cls(**_from_dict(cls, data))


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
            later patterns win.
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
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("weight_granularity", self.weight_granularity, ("tensor", "channel"))
        _one_of("message_levels", self.message_levels, ("affine", "unsigned", "symmetric", "half"))
        _one_of("weight_levels", self.weight_levels, ("affine", "unsigned", "symmetric", "half"))
        for site in ("message", "weight"):
            check_levels(f"{site}_levels", getattr(self, f"{site}_levels"), self.bits_for(site))
        _one_of("truncation", self.truncation, (None, "bt", "sbt"))
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
            for name in changes:
                if name not in known:
                    raise ValueError(
                        f"Unknown field {name!r} in the override for {pattern!r}{_did_you_mean(name, known)}"
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
                hint = _did_you_mean(pattern, layer_names) or "."
                layers = ", ".join(layer_names) or "none"
                raise ValueError(f"The override pattern {pattern!r} matches no layer{hint} Layers: {layers}")

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-serializable description; :meth:`from_dict` is its inverse."""
        plain = {p: {k: _plain(v) for k, v in changes.items()} for p, changes in self.overrides.items()}
        return {**asdict(replace(self, overrides={})), "overrides": plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: If a field is unknown or out of range.
        """
        values = _from_dict(cls, data)
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


_BIT_FIELDS = (
    "bits",
    "input_bits",
    "weight_bits",
    "activation_bits",
    "message_bits",
    "attention_bits",
    "output_bits",
)
