"""The differential multiplier method: gradient ascent of the multipliers (Platt and Barr, 1987)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import SMPConfig
from .constraint import ConstraintState, SmoothLayer, constraint_ratio

__all__ = ["MultiplierState", "Update", "ascend", "differential_multiplier_step", "smp_layers"]


@dataclass(frozen=True)
class MultiplierState:
    """A layer's constraint after an update, as plain numbers.

    Args:
        multiplier: ``lambda``.
        slack: ``s``.
        constraint: ``g`` over its bound; of a propagation, that of its worst step.
        violation: ``constraint - 1``.
        saturated: Whether the multiplier is at its upper end: the bound cannot be met.
        saturating: Whether it is past half of that and the bound is still not met.
        force: The multiplier that acts, ``max(0, lambda + c h)``.
    """

    multiplier: float
    slack: float
    constraint: float
    violation: float
    saturated: bool
    saturating: bool = False
    force: float = 0.0


class Update(NamedTuple):
    """Multiplier, slack and penalty ``c h`` after one update."""

    multiplier: Tensor
    slack: Tensor
    penalty: Tensor


def ascend(config: SMPConfig, multiplier: Tensor, slack: Tensor, ratio: Tensor, highest: float | None = None) -> Update:
    r"""One step of the modified differential multiplier method (Platt and Barr, 1987, eqs. 9 and 19).

    With the violation :math:`h = g/b - 1 + s^2` and the acting multiplier :math:`\hat\lambda = \lambda + c h`,

    .. math::
        s \leftarrow s - 2 \eta_s \hat\lambda s \qquad
        \lambda \leftarrow \mathrm{clip}(\lambda + \eta_\lambda h, 0, \lambda_{max})

    Args:
        config: Rates and damping.
        multiplier: :math:`\lambda`.
        slack: ``s``.
        ratio: ``g / b``.
        highest: :math:`\lambda_{max}`, also of the acting multiplier; default that of ``config``.
    """
    highest = config.max_multiplier if highest is None else highest
    h = ratio - 1 + slack.square()
    penalty = config.damping * h if config.damping else torch.zeros_like(h)
    force = (multiplier + penalty).clamp(0, highest)
    multiplier = (multiplier + config.eta_lambda * h).clamp(0, highest)
    slack = slack - 2 * config.eta_slack * force * slack
    return Update(multiplier, slack, torch.minimum(penalty, highest - multiplier))


def smp_layers(model: nn.Module) -> dict[str, SmoothLayer]:
    """Every layer of ``model`` that has a smoothness constraint, by qualified name.

    Raises:
        TypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module (got {type(model).__name__}); give the model itself")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SmoothLayer) and module._smp is not None
    }


@torch.no_grad()
def differential_multiplier_step(
    qmodel: nn.Module, *, reduce: Callable[[Tensor], Tensor] | None = None
) -> dict[str, MultiplierState]:
    r"""Update every multiplier and slack once, from the last training forward (see :func:`ascend`).

    A layer whose multiplier moves within its forward pass (``schedule="inner"``) is reported and left alone.  One whose
    multiplier is zero and whose constraint is below half of its bound measures in one forward pass of 16 updates only,
    and is reported with what it measured last: measuring costs next to nothing until a multiplier has to move, nor does
    the update where that holds of all layers and nothing is averaged over processes.

    Args:
        qmodel: A converted model, or one that holds :class:`qgnn_plugin.SMPropagation` layers.
        reduce: Averages a tensor over processes, for distributed training.  It is called once, with the measurements
            of all layers, ``[rows, 3]`` float64: energy, bound, and 1 where they were measured.

    Returns:
        The new state of each layer that has measured its constraint, in any process.
    """
    layers = smp_layers(qmodel)
    if not layers:
        return {}
    if reduce is None and (settled := _settled(layers)) is not None:
        return settled
    rows = [_measurements(layer) for layer in layers.values()]
    sizes = [len(part) for part in rows]
    table = torch.cat([part.to(rows[0].device) for part in rows])
    if reduce is not None:
        table = reduce(table)
    table = table.cpu()
    states = {}
    for (name, layer), part in zip(layers.items(), table.split(sizes), strict=True):
        ratio = constraint_ratio(part[:, 0], part[:, 1]).max() if bool((part[:, 2] > 0).any()) else None
        if ratio is not None:
            states[name] = _update(layer, ratio)
        layer._note_update(None if ratio is None else float(ratio))
        layer._settle(states.get(name))
    return states


def _settled(layers: dict[str, SmoothLayer]) -> dict[str, MultiplierState] | None:
    """What an update returns that changes no layer; :obj:`None` where it may change one.

    Processes that average would have to agree on this, but buffers are written in some of them only.
    """
    states = {name: layer._unchanged() for name, layer in layers.items()}
    if any(state is None for state in states.values()):
        return None
    for layer in layers.values():
        layer._pass_update()
    return states


def _measurements(layer: SmoothLayer) -> Tensor:
    """Energy, bound and a one for each step of ``layer``; zeros where it measured nothing."""
    state: ConstraintState | None = layer._constraint_state
    if state is None:
        return torch.zeros(
            layer._num_constraints, 3, dtype=torch.float64, device=layer._constraint_buffer("multiplier").device
        )
    pair = torch.stack([state.energy.reshape(-1), state.bound.reshape(-1)], 1).double()
    return torch.cat([pair, torch.ones_like(pair[:, :1])], 1)


def _update(layer: SmoothLayer, ratio: Tensor) -> MultiplierState:
    config = layer._smp
    assert config is not None
    if not layer._moves_itself:
        multiplier, slack = (layer._constraint_buffer(name).double().cpu() for name in ("multiplier", "slack"))
        new = ascend(config, multiplier, slack, ratio, layer._highest_multiplier)
        for name, value in new._asdict().items():
            if (buffer := layer._constraint_buffer(name)) is not None:
                buffer.copy_(value)
    layer._refresh()
    buffer = layer._constraint_buffer("multiplier")
    strength, constraint = float(buffer), float(ratio)
    high = float(torch.tensor(layer._highest_multiplier, dtype=buffer.dtype))  # as the buffer can hold it
    return MultiplierState(
        strength,
        float(layer._constraint_buffer("slack")),
        constraint,
        constraint - 1.0,
        saturated=strength >= high,
        saturating=strength >= high / 2 and constraint > 1,
        force=layer._multiplier_value,
    )
