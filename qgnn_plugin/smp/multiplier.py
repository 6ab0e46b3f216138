"""The differential multiplier method: gradient ascent of the multipliers (Platt and Barr, 1987)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .constraint import SmoothLayer

__all__ = ["MultiplierState", "differential_multiplier_step", "smp_layers"]


@dataclass(frozen=True)
class MultiplierState:
    """A layer's constraint after an update, as plain numbers.

    Args:
        multiplier: ``lambda``.
        slack: ``s``.
        constraint: ``g`` over its bound.
        violation: ``constraint - 1``.
        saturated: Whether the multiplier is at its upper end: the bound cannot be met.
    """

    multiplier: float
    slack: float
    constraint: float
    violation: float
    saturated: bool


def smp_layers(model: nn.Module) -> dict[str, SmoothLayer]:
    """Every layer of ``model`` that has a smoothness constraint, by qualified name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SmoothLayer) and module.smp is not None
    }


@torch.no_grad()
def differential_multiplier_step(
    model: nn.Module, *, reduce: Callable[[Tensor], Tensor] | None = None
) -> dict[str, MultiplierState]:
    r"""Update every multiplier and slack once, from the last training forward.

    With the violation :math:`h = g/b - 1 + s^2`, :math:`s \leftarrow s - 2 \eta_s \lambda s` and
    :math:`\lambda \leftarrow \mathrm{clip}(\lambda + \eta_\lambda (1 + c) h, 0, \lambda_{max})`, ``c`` the damping.

    Args:
        model: A converted model.
        reduce: Averages a measured tensor over processes, for distributed training.

    Returns:
        The new state of each layer that has measured its constraint.
    """
    states = {}
    for name, layer in smp_layers(model).items():
        measured = layer.constraint_state
        if measured is None:
            continue
        config = layer.smp
        assert config is not None
        pair = torch.stack([measured.energy, measured.bound]).double()
        if reduce is not None:
            pair = reduce(pair)
        constraint = float(pair[0] / pair[1].clamp_min(1e-300)) if float(pair[0]) > 0 else 0.0
        multiplier, slack = float(layer.multiplier), float(layer.slack)
        slack_new = slack - 2 * config.eta_slack * multiplier * slack
        violation = constraint - 1.0
        step = config.eta_lambda * (1 + config.damping) * (violation + slack**2)
        new = min(max(0.0, multiplier + step), config.max_multiplier)
        layer.multiplier.fill_(new)
        layer.slack.fill_(slack_new)
        states[name] = MultiplierState(new, slack_new, constraint, violation, new >= config.max_multiplier)
    return states
