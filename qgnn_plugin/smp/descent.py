"""The steps of a propagation under a constraint: their factors, what is measured of them, and the multiplier.

The equations are those of :mod:`.propagation`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import SMPConfig
from ..graph.adjacency import NormalizedGraph
from ..kernels.smp_step import step_factors
from .constraint import BUFFERS, ConstraintState, Operator, SmoothLayer, constraint_ratio, corrected
from .multiplier import ascend

__all__ = ["Meter", "PropagationLayer", "Step", "StepFactors", "Visit"]

StepOperator = Callable[[int, Tensor], Tensor]


class StepFactors(NamedTuple):
    """The factors of one step, ``U = keep H + average A~ H + fidelity X0``."""

    keep: float
    average: float
    fidelity: float

    @classmethod
    def of(cls, config: SMPConfig) -> StepFactors:
        """Those of step size ``eta`` and smoothness weight ``mu``."""
        keep, average, _ = step_factors(config.eta, config.mu, 0.0)
        return cls(keep, average, config.eta)

    @property
    def contraction(self) -> float:
        r"""Factor by which one step shrinks a difference at most, where ``||A~|| <= 1``."""
        return abs(self.keep) + abs(self.average)

    def __call__(self, h: Tensor, averaged: Tensor, source: Tensor | None) -> Tensor:
        """``U`` from ``H``, ``A~ H`` and ``fidelity X0``, in the order of the ``smp_step`` kernel."""
        moved = averaged if self.average == 1 else averaged * self.average
        moved = moved if self.keep == 0 else h * self.keep + moved
        return moved if source is None else moved + source

    def source(self, x0: Tensor) -> Tensor | None:
        """``fidelity X0``, :obj:`None` without a fidelity term."""
        return None if self.fidelity == 0 else x0 * self.fidelity


class Step(NamedTuple):
    """What one step of a propagation did, all ``[N, F]``.

    Args:
        found: ``H``, the state as the step found it.
        proposed: ``U``.
        force: The multiplier that acted on the change, :obj:`None` where nothing was corrected.
        state: The state that it left.
    """

    found: Tensor
    proposed: Tensor
    force: Tensor | None
    state: Tensor


Visit = Callable[[Step], None]


class Meter:
    r"""Measures the constraint of every step from its states.

    One product per state is enough, :math:`\tilde A D_k = \tilde A H_{k+1} - \tilde A H_k`.
    """

    def __init__(self, config: SMPConfig, operator: Operator, num_edges: int) -> None:
        self.config, self.operator, self.num_edges = config, operator, num_edges
        self.last: tuple[Tensor, Tensor] | None = None
        self.energies: list[Tensor] = []
        self.bounds: list[Tensor] = []

    def observe(self, h: Tensor, averaged: Tensor | None = None) -> None:
        """Take the next state, and ``A~ H`` where it is known."""
        with torch.no_grad():  # not as a decorator, which cannot be compiled here
            self._observe(h.detach(), None if averaged is None else averaged.detach())

    def _observe(self, h: Tensor, averaged: Tensor | None) -> None:
        averaged = self.operator(h) if averaged is None else averaged
        if self.last is not None:
            before, averaged_before = self.last
            change = h - before
            self.energies.append((change * (change - (averaged - averaged_before))).sum().clamp_min(0))
            if self.config.bound == "relative":
                self.bounds.append((before * (before - averaged_before)).sum().clamp_min(0) * self.config.alpha)
            else:
                self.bounds.append(torch.full_like(self.energies[-1], self.config.alpha * self.num_edges))
        self.last = (h, averaged)

    @property
    def ratio(self) -> Tensor:
        """``g`` over its bound of the last step."""
        return constraint_ratio(self.energies[-1], self.bounds[-1])

    def state(self) -> ConstraintState | None:
        """The constraint of every step so far."""
        return ConstraintState(torch.stack(self.energies), torch.stack(self.bounds)) if self.energies else None


class PropagationLayer(SmoothLayer):
    """What every K-step propagation shares: the loop over its steps, one constraint for each, one multiplier for all.

    The multiplier follows the step that exceeds its bound the most.
    """

    K: int

    @property
    def _num_constraints(self) -> int:
        return self.K

    @property
    def _moves_itself(self) -> bool:
        return self._smp is not None and self._smp.schedule == "inner"

    @property
    def step_factors(self) -> StepFactors:
        """The factors of a step."""
        assert self._smp is not None
        return StepFactors.of(self._smp)

    @property
    def _step_size(self) -> float:
        """``eta`` of the explicit correction; a propagation without fidelity term takes that of its settings."""
        assert self._smp is not None
        return self.step_factors.fidelity or self._smp.eta

    @property
    def gap_messages(self) -> int:
        """How often a correction exchanges changes."""
        assert self._smp is not None
        return 1 if self._smp.correction == "explicit" else self._smp.terms

    def corrected(self, change: Tensor, operator: Operator, force: Tensor) -> Tensor:
        """``C D``: what remains of a change [N, F] under the multiplier ``force``."""
        config = self._smp
        assert config is not None
        if config.algorithm == "reference":
            return change + (2 * config.eta * force) * operator(change)
        return corrected(change, operator, config, force, self._step_size)

    def stored(self, k: int, h: Tensor) -> Tensor:
        """The state as step ``k`` finds it."""
        return h

    def proposed(self, h: Tensor, u: Tensor, graph: NormalizedGraph) -> None:
        """Take note of a change that is not corrected."""

    def propagate_steps(
        self,
        x0: Tensor,
        graph: NormalizedGraph,
        average: StepOperator,
        gap: StepOperator,
        *,
        exact: bool,
        visit: Visit | None = None,
    ) -> Tensor:
        r"""All steps from ``x0`` [N, F].

        Args:
            x0: ``X0``, where the propagation starts.
            graph: ``A~``.
            average: ``A~ H_k`` of step ``k``, quantized where messages are.
            gap: ``A~ D`` for the correction, quantized where gap messages are.
            exact: Whether ``average`` is ``A~`` itself, so that measuring may use its results.
            visit: Called with every step.
        """
        config = self._smp
        descent, source = self.step_factors, self.step_factors.source(x0)
        meter = None
        if config is not None and (self._measures or self._moves_itself):
            meter = Meter(config, graph.apply, graph.plan.num_edges)
        if config is not None and config.algorithm == "reference":
            return self._reference_steps(x0, average, gap, meter, visit)
        multiplier = _Multiplier(self) if config is not None and (self._moves_itself or self._is_smoothing) else None
        h = x0
        for k in range(self.K):
            h = self.stored(k, h)
            averaged = average(k, h)
            if meter is not None:
                meter.observe(h, averaged if exact else None)
                if k > 0 and multiplier is not None:
                    multiplier.follow(meter)
            found, force = h, None if multiplier is None else multiplier.force
            h = u = descent(found, averaged, source)
            if force is None:
                self.proposed(found, u, graph)
            else:
                h = found + self.corrected(u - found, partial(gap, k), force)
            if visit is not None:
                visit(Step(found, u, force, h))
        if self.training and meter is not None:
            meter.observe(h)
            if multiplier is not None and meter.energies:
                multiplier.follow(meter)
                multiplier.store(self)
            self._constraint_state = meter.state()
        return h

    def _reference_steps(
        self, x0: Tensor, average: StepOperator, gap: StepOperator, meter: Any, visit: Visit | None
    ) -> Tensor:
        """The authors' update (see :meth:`SMPConfig.reference`); gradients flow through the multiplier, as there."""
        config, descent, source = self._smp, self.step_factors, self.step_factors.source(x0)
        assert config is not None
        h, multiplier, slack = x0, x0.new_tensor(config.multiplier), x0.new_tensor(config.slack)
        for k in range(self.K):
            h = self.stored(k, h)
            if self.training:
                meter.observe(h)
            found, force = h, multiplier
            u = descent(found, average(k, found), source)
            change = u - found
            h = found + self.corrected(change, partial(gap, k), force)
            slack = slack + 2 * config.eta_slack * multiplier * slack
            energy = (change * (change - meter.operator(change))).sum()
            multiplier = multiplier + config.eta_lambda * (config.alpha * meter.num_edges - slack.square() - energy)
            if visit is not None:
                visit(Step(found, u, force, h))
        if self.training:
            meter.observe(h)
            self._constraint_state = meter.state()
            with torch.no_grad():
                self._constraint_buffer("multiplier").copy_(multiplier)
                self._constraint_buffer("slack").copy_(slack)
        return h


class _Multiplier:
    """The multiplier of one forward pass: constant, or moving with its steps (``schedule="inner"``)."""

    def __init__(self, layer: PropagationLayer) -> None:
        assert layer._smp is not None
        self.config, self.moves, self.force = layer._smp, layer._moves_itself, layer._smoothing_force.detach()
        self.highest = layer._highest_multiplier
        if self.moves:
            start = self.config
            multiplier, slack = layer._constraint_buffer("multiplier"), layer._constraint_buffer("slack")
            self.multiplier = multiplier if start.carry else torch.full_like(multiplier, start.multiplier)
            self.slack = slack if start.carry else torch.full_like(slack, start.slack)
            self.penalty = layer._constraint_buffer("penalty") if start.carry else None
            self._act()

    def _act(self) -> None:
        self.force = self.multiplier if self.penalty is None else (self.multiplier + self.penalty).clamp_min(0)

    def follow(self, meter: Meter) -> None:
        """Move with the violation of the last step."""
        if self.moves:
            ratio = meter.ratio.to(self.multiplier.dtype)
            self.multiplier, self.slack, self.penalty = ascend(
                self.config, self.multiplier, self.slack, ratio, self.highest
            )
            self._act()

    def store(self, layer: PropagationLayer) -> None:
        """Leave the last values in the layer's buffers: to be carried on, or only to be read."""
        if self.moves:
            for name in BUFFERS:
                if (buffer := layer._constraint_buffer(name)) is not None:
                    buffer.copy_(getattr(self, name))
