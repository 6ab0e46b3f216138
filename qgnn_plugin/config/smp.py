"""Configuration of the smoothness constraint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .checks import check_number, check_one_of, known_fields
from .widths import MULTILEVEL_BITS, OFF

__all__ = ["SMPConfig"]

MOST_TERMS = 1000  # sweeps of the proximal correction


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
        check_one_of("bound", self.bound, ("relative", "absolute"))
        check_one_of("correction", self.correction, ("proximal", "explicit"))
        check_one_of("schedule", self.schedule, ("step", "inner"))
        check_one_of("algorithm", self.algorithm, ("smp", "reference"))
        for name, widths in (("state_bits", MULTILEVEL_BITS), ("gap_bits", (None, *MULTILEVEL_BITS))):
            check_one_of(name, getattr(self, name), widths)
            if type(getattr(self, name)) not in (int, type(None)):
                raise ValueError(f"Expected {name!r} to be an integer (got {getattr(self, name)!r})")
        if type(self.terms) is not int or not 1 <= self.terms <= MOST_TERMS:
            raise ValueError(f"Expected 'terms' to be an integer between 1 and {MOST_TERMS} (got {self.terms!r})")
        for name in ("alpha", "eta", "eta_lambda", "max_multiplier"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("mu", "eta_slack", "multiplier", "damping"):
            check_number(name, getattr(self, name), positive=False)
        check_number("slack", self.slack, positive=None)
        if type(self.carry) is not bool:
            raise ValueError(f"Expected 'carry' to be True or False (got {self.carry!r})")
        for name in ("initial_residual", "identity_map"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), positive=False)
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
        """A plain, JSON-serializable description; :meth:`from_dict` is its inverse."""
        return asdict(self)

    def acting(self) -> dict[str, Any]:
        """The settings that decide what a layer computes, its multiplier given; the others steer training."""
        steering = {"alpha", "bound", "eta_lambda", "eta_slack", "multiplier", "slack", "damping", "carry"}
        left_out = set() if self.schedule == "inner" else {*steering, "max_multiplier"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SMPConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: If ``data`` is no mapping.
            ValueError: If a field is unknown or out of range.
        """
        return cls(**known_fields(cls, data))
