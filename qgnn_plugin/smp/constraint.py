r"""The smoothness constraint of one layer (arXiv 2308.14949, section 4.3; DESIGN section 4).

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

from ..config import SMPConfig

__all__ = ["ConstraintState", "SmoothLayer", "attach_constraint", "dirichlet_energy"]

Operator = Callable[[Tensor], Tensor]


def dirichlet_energy(x: Tensor, operator: Operator) -> Tensor:
    r"""``tr(x' (I - P) x)`` of ``x`` [N, ...], without a dense or incidence matrix: ``<x, x - P x>``."""
    return (x * (x - operator(x))).sum()


@dataclass
class ConstraintState:
    """What the last training forward measured, plain tensors detached from the graph."""

    energy: Tensor  # g, of the realised change
    bound: Tensor  # what g may be at most


class SmoothLayer:
    """Mixin of layers with a smoothness constraint: buffers ``multiplier`` (>= 0) and ``slack``."""

    multiplier: Tensor
    slack: Tensor
    smp: SMPConfig | None
    training: bool
    constraint_state: ConstraintState | None

    @property
    def constraint(self) -> float | None:
        """``g`` over its bound, from the last training forward: at most 1 when met; :obj:`None` before any."""
        state = self.constraint_state
        if state is None:
            return None
        return float(state.energy / state.bound.clamp_min(torch.finfo(state.bound.dtype).tiny))

    @property
    def violation(self) -> float | None:
        """``constraint - 1``: positive where the bound is exceeded."""
        constraint = self.constraint
        return None if constraint is None else constraint - 1.0

    def smooth(
        self, z: Tensor, a: Tensor, operator: Operator, num_edges: int, *, averaged: bool = False
    ) -> Tensor:
        """Correct the change from ``z`` to ``a`` (both ``[N, ...]``) and, in training, measure its constraint.

        Args:
            z: What the layer starts from.
            a: What it makes of it.
            operator: ``P``, of the graph's Laplacian ``I - P``.
            num_edges: ``|E|`` of an absolute bound.
            averaged: Whether ``a`` is ``P z``, which then need not be computed again.
        """
        config = self.smp
        if config is None or z.shape != a.shape:
            return a
        propagated = a
        if self.multiplier_value > 0:
            a = z + _corrected(a - z, operator, config, self.multiplier)
        if self.training and not torch.compiler.is_compiling():
            with torch.no_grad():
                energy = dirichlet_energy((a - z).detach(), operator).clamp_min(0)
                if config.bound == "relative":
                    bound = config.alpha * dirichlet_energy(z, lambda v: propagated if averaged else operator(v))
                    bound = bound.clamp_min(0)
                else:
                    bound = torch.full_like(energy, config.alpha * num_edges)
                self.constraint_state = ConstraintState(energy, bound)
        return a

    @property
    def multiplier_value(self) -> float:
        """The multiplier as a number."""
        return float(self.multiplier)


def _corrected(change: Tensor, operator: Operator, config: SMPConfig, multiplier: Tensor) -> Tensor:
    if config.correction == "explicit":
        return change - (2 * config.eta * multiplier) * (change - operator(change))
    # Sweeps of I + 4 lambda (I - W) on the lazy walk W = (I + P) / 2: the same solution, but since W has no negative
    # eigenvalue, any number of sweeps leaves less energy the larger the multiplier.  On P itself a graph with few odd
    # cycles keeps its alternating part, and the multiplier would climb without end.
    weight = 4 * multiplier
    corrected = change
    for _ in range(config.terms):
        corrected = (change + weight * (0.5 * (corrected + operator(corrected)))) / (1 + weight)
    return corrected


def attach_constraint(layer: Any, config: SMPConfig | None, device: torch.device | None) -> None:
    """Give a layer its multiplier and slack."""
    layer.constraint_state = None
    if config is None:
        return
    layer.register_buffer("multiplier", torch.tensor(config.multiplier, device=device))
    layer.register_buffer("slack", torch.tensor(config.slack, device=device))
