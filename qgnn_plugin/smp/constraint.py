r"""The smoothness constraint of one layer (arXiv 2308.14949, section 4.3; docs/smoothness.md).

A layer that turns ``z`` into ``a = P z`` changes its input by ``D = a - z``.  With ``L = I - P``, the change must
satisfy ``g = tr(D' L D) <= bound``; while the multiplier ``lambda`` is positive the change is corrected to
``D <- (I + 2 lambda L)^-1 D``, and ``lambda`` rises with the violation measured on the *realised* change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..aliases import Alias
from ..config import SMPConfig

__all__ = [
    "ConstraintState",
    "SmoothLayer",
    "attach_constraint",
    "constraint_names",
    "corrected",
    "dirichlet_energy",
    "reset_constraint",
]

Operator = Callable[[Tensor], Tensor]
BUFFERS = ("multiplier", "slack", "penalty")
OTHER_PREFIX = "qgnn_"
CONSTRAINT_ATTRIBUTES = (  # beside them
    "_constraint_state", "_smp", "_smoothing", "_written", "_buffer_prefix", "_rests", "_updates", "_settled",
)  # fmt: skip
EXPLICIT_LIMIT = 0.25  # of eta lambda: past it the explicit correction turns changes of frequency 2 round
MEASURED_EVERY = 16  # updates, where the bound is far from being reached
FAR_BELOW = 0.5  # of the bound


def dirichlet_energy(x: Tensor, operator: Operator) -> Tensor:
    r"""``tr(x' (I - P) x)`` of ``x`` [N, ...], without a dense or incidence matrix: ``<x, x - P x>``."""
    return (x * (x - operator(x))).sum()


@dataclass
class ConstraintState:
    """What training measured last, plain tensors detached from the graph: one value, or one per step.

    Args:
        energy: ``g`` of the realised change.
        bound: What ``g`` may be at most.
    """

    energy: Tensor
    bound: Tensor

    @property
    def ratio(self) -> Tensor:
        """``g`` over its bound, of several steps the largest: at most 1 where every step meets its bound."""
        return constraint_ratio(self.energy, self.bound).max()


def constraint_ratio(energy: Tensor, bound: Tensor) -> Tensor:
    """``g`` over its bound; no change at all meets any bound."""
    ratio = energy / bound.clamp_min(torch.finfo(bound.dtype).tiny)
    return torch.where(energy > 0, ratio, torch.zeros_like(ratio))


class SmoothLayer:
    """Mixin of layers with a smoothness constraint: buffers ``multiplier`` and ``slack``, and with damping ``penalty``.

    ``penalty`` is ``c h`` of the last update, so that a saved model goes on as it was.
    """

    smp = Alias("_smp")
    constraint_state = Alias("_constraint_state")
    num_constraints = Alias("_num_constraints")
    moves_itself = Alias("_moves_itself")
    constraint = Alias("_constraint")
    violation = Alias("_violation")
    constraint_buffers = Alias("_constraint_buffers")
    force = Alias("_smoothing_force")
    step_size = Alias("_step_size")
    highest_multiplier = Alias("_highest_multiplier")
    multiplier_value = Alias("_multiplier_value")
    is_smoothing = Alias("_is_smoothing")
    refresh = Alias("_refresh")
    smooth = Alias("_smooth")

    training: bool
    _smp: SMPConfig | None
    _constraint_state: ConstraintState | None
    _buffers: dict[str, Any]
    _buffer_prefix: str = ""  # of the buffers' names, where the layer has attributes of these names itself
    _smoothing: bool = False  # what the buffers said
    _written: tuple[Any, ...] | None = None  # in these versions
    _rests: bool = False  # whether measuring can wait while the multiplier is zero
    _updates: int = 0  # of the multiplier
    _settled: tuple[Any, ...] | None = None  # what an update that changes nothing returns, and what that follows from

    @property
    def _num_constraints(self) -> int:
        """How many changes are bounded: one, or one per step of a propagation."""
        return 1

    @property
    def _moves_itself(self) -> bool:
        """Whether the multiplier moves within the forward pass."""
        return False

    @property
    def _constraint(self) -> float | None:
        """``g`` over its bound, as last measured in training: at most 1 when met; :obj:`None` before any."""
        state = self._constraint_state
        return None if state is None else float(state.ratio)

    @property
    def _violation(self) -> float | None:
        """``constraint - 1``: positive where the bound is exceeded."""
        constraint = self._constraint
        return None if constraint is None else constraint - 1.0

    @property
    def _constraint_buffers(self) -> list[Tensor]:
        """Multiplier, slack and, with damping, penalty."""
        return [self._buffers[name] for name in constraint_names(self)]

    def _constraint_buffer(self, name: str) -> Any:
        """The buffer ``name`` of the constraint; :obj:`None` where the layer has none."""
        return self._buffers.get(self._buffer_prefix + name)

    @property
    def _smoothing_force(self) -> Tensor:
        """The multiplier that acts: ``max(0, lambda + c h)``, which without damping is ``lambda`` itself."""
        multiplier, penalty = self._constraint_buffer("multiplier"), self._constraint_buffer("penalty")
        return multiplier if penalty is None else (multiplier + penalty).clamp_min(0)

    @property
    def _step_size(self) -> float:
        """``eta`` of the explicit correction."""
        if self._smp is None:
            raise AttributeError(f"Expected a smoothness constraint on {type(self).__name__} (got none)")
        return self._smp.eta

    @property
    def _highest_multiplier(self) -> float:
        """Upper end of the multiplier: that of the settings, or where the explicit correction stops being stable."""
        if self._smp is None:
            raise AttributeError(f"Expected a smoothness constraint on {type(self).__name__} (got none)")
        if self._smp.correction == "proximal" or self._smp.algorithm == "reference":
            return self._smp.max_multiplier
        return min(self._smp.max_multiplier, EXPLICIT_LIMIT / self._step_size)

    @property
    def _multiplier_value(self) -> float:
        """The multiplier that acts, as a number."""
        if self._constraint_buffer("multiplier") is None:
            raise AttributeError(f"Expected a smoothness constraint on {type(self).__name__} (got none)")
        return float(self._smoothing_force)

    @property
    def _is_smoothing(self) -> bool:
        """Whether the correction acts.

        A mirror on the host of the buffers, read anew whenever they were written: a forward pass need not wait for
        the device, and compiled code branches on a constant, which changes with the answer and not with every update.
        Code compiled before a multiplier rose from zero follows at the next :meth:`refresh`, such as that of
        :func:`qgnn_plugin.differential_multiplier_step`.
        """
        if not torch.compiler.is_compiling():
            self._refresh()
        return self._smoothing

    @property
    def _is_resting(self) -> bool:
        """Whether forward passes in training need not measure the constraint until the next update."""
        return self._rests and not self._is_smoothing

    @property
    def _measures(self) -> bool:
        """Whether a forward pass measures the constraint."""
        return self.training and self._smp is not None and not self._is_resting

    @property
    def _minds_change(self) -> bool:
        """Whether a forward pass corrects the change or measures its constraint."""
        return self._smp is not None and (self._is_smoothing or self._measures)

    def _note_update(self, ratio: float | None) -> None:
        """Take note of an update at ``g / b``, and whether measuring can wait until the next.

        An update changes nothing while the multiplier is zero and the bound met.  Where ``g + s^2 b`` is below
        ``FAR_BELOW`` of the bound, only one forward pass of ``MEASURED_EVERY`` updates measures; a multiplier that
        has to rise does so that many updates later at most.  The updates are counted, so that all layers measure in
        the same forward pass, as do all processes, and code that is compiled knows two states and not sixteen.
        """
        self._updates += 1
        self._settled = None
        far = ratio is not None and ratio + float(self._constraint_buffer("slack")) ** 2 <= FAR_BELOW
        idle = not self._moves_itself and self._multiplier_value == 0
        self._rests = far and idle and self._updates % MEASURED_EVERY != 0

    def _settle(self, state: Any) -> None:
        """Remember ``state``, that of every update until the layer measures again or its buffers are written."""
        self._settled = (state, self._constraint_state, self._buffer_versions()) if self._rests else None

    def _unchanged(self) -> Any:
        """What an update would return that changes nothing; :obj:`None` where it may change something."""
        if self._settled is None or not self._is_resting:
            return None
        state, measured, versions = self._settled
        return state if measured is self._constraint_state and versions == self._buffer_versions() else None

    def _pass_update(self) -> None:
        """Count an update that changed nothing."""
        self._updates += 1
        self._rests = self._updates % MEASURED_EVERY != 0

    def _buffer_versions(self) -> list[Any]:
        return [_version(buffer) for buffer in self._constraint_buffers]

    def _refresh(self) -> None:
        """Read anew whether the correction acts, where the buffers were written since it was last asked."""
        multiplier = self._constraint_buffer("multiplier")
        if self._smp is None or multiplier.is_meta:
            return
        written = (_version(multiplier), _version(self._constraint_buffer("penalty")))
        if written != self._written:
            self._smoothing, self._written = self._multiplier_value > 0, written

    def _smooth(self, z: Tensor, a: Tensor, operator: Operator, num_edges: int, *, averaged: bool = False) -> Tensor:
        """Correct the change from ``z`` to ``a`` (both ``[N, ...]``) and, in training, measure its constraint.

        Args:
            z: What the layer starts from.
            a: What it makes of it.
            operator: ``P``, of the graph's Laplacian ``I - P``.
            num_edges: ``|E|`` of an absolute bound.
            averaged: Whether ``a`` is ``P z``, which then need not be computed again.
        """
        config = self._smp
        if config is None or z.shape != a.shape:
            return a
        propagated = a
        if self._is_smoothing:
            a = z + corrected(a - z, operator, config, self._smoothing_force)
        if self._measures:
            with torch.no_grad():
                energy = dirichlet_energy((a - z).detach(), operator).clamp_min(0)
                if config.bound == "relative":
                    bound = config.alpha * dirichlet_energy(z, lambda v: propagated if averaged else operator(v))
                    bound = bound.clamp_min(0)
                else:
                    bound = torch.full_like(energy, config.alpha * num_edges)
                self._constraint_state = ConstraintState(energy, bound)
        return a


def _version(buffer: Tensor | None) -> tuple[int, float] | None:
    if buffer is None:
        return None
    # Inference tensors count no versions; NaN differs from everything, itself included.
    return id(buffer), float("nan") if buffer.is_inference() else buffer._version


def corrected(
    change: Tensor, operator: Operator, config: SMPConfig, multiplier: Tensor, eta: float | None = None
) -> Tensor:
    """The change that remains under ``multiplier``.

    Args:
        change: ``D`` [N, ...], proposed.
        operator: ``P``; with quantized gap messages, ``P Q(.)``.
        config: Which correction.
        multiplier: ``lambda``, a scalar.
        eta: Step size of the explicit correction, default that of ``config``.
    """
    if config.correction == "explicit":
        return change - (2 * (config.eta if eta is None else eta) * multiplier) * (change - operator(change))
    # Sweeps of I + 4 lambda (I - W) on the lazy walk W = (I + P) / 2: the same solution, but since W has no negative
    # eigenvalue, any number of sweeps leaves less energy the larger the multiplier.  On P itself a graph with few odd
    # cycles keeps its alternating part, and the multiplier would climb without end.
    weight = 4 * multiplier
    result = change
    for _ in range(config.terms):
        result = (change + weight * (0.5 * (result + operator(result)))) / (1 + weight)
    return result


def attach_constraint(layer: Any, config: SMPConfig | None, device: torch.device | None) -> None:
    """Give a layer its multiplier and slack.

    Raises:
        ValueError: If ``config`` is the authors' algorithm and the layer is no propagation.
    """
    layer._constraint_state = None
    layer._rests, layer._updates, layer._settled = False, 0, None
    if config is None:
        return
    constrained = isinstance(layer, SmoothLayer)  # by itself
    if not constrained and any(hasattr(layer, name) for name in BUFFERS):
        layer._buffer_prefix = OTHER_PREFIX
    if config.algorithm == "reference" and not hasattr(layer, "K"):
        raise ValueError(
            f"Expected a propagation layer (SMPropagation, APPNP) for the reference algorithm (got a "
            f"{type(layer).__name__}); give other layers an SMPConfig of their own, or None, by 'overrides'"
        )
    for name, value in zip(BUFFERS, (config.multiplier, config.slack, 0.0), strict=True):
        if name != "penalty" or config.damping > 0:
            prefix = getattr(layer, "_buffer_prefix", "")
            layer.register_buffer(prefix + name, torch.tensor(value, dtype=torch.float32, device=device))


def reset_constraint(layer: SmoothLayer) -> None:
    """Back to the initial multiplier and slack, in place."""
    config = layer._smp
    if config is None:
        return
    for name, value in zip(BUFFERS, (config.multiplier, config.slack, 0.0), strict=True):
        if (buffer := layer._constraint_buffer(name)) is not None:
            buffer.fill_(value)
    layer._constraint_state = None
    layer._rests, layer._updates, layer._settled = False, 0, None


def constraint_names(layer: Any) -> list[str]:
    """Names of the buffers that hold the constraint of ``layer``, if it has one."""
    if not isinstance(layer, SmoothLayer):
        return []
    names = [layer._buffer_prefix + name for name in BUFFERS]
    return [name for name in names if name in layer._buffers]
