"""How far quantization carries a deep stack away: the errors of its layers together (docs/error_bound.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import sites_of
from .injection import bypassed
from .measured_error import MeasuredError, Rerun

__all__ = ["stack_errors"]


def _itself(x: Tensor) -> Tensor:
    return x


# What may stand between two layers of a stack: no entry moves further than it was moved.
BETWEEN: tuple[Callable[[Tensor], Tensor], ...] = (torch.relu, _itself, F.elu, F.leaky_relu, torch.tanh)


def stack_errors(layers: Mapping[str, tuple[Rerun, MeasuredError]]) -> dict[str, tuple[float, float]]:
    """The error of every layer's result, counted from the stack's input on, and its bound.

    Args:
        layers: The layers of one stack in order, by name: how they ran, and what is known of each by itself.

    Returns:
        Those up to the first layer without a bound, or after which the model does something else than applying one
        of :data:`BETWEEN`.
    """
    runs = [run for run, _ in layers.values()]
    sites = [quantizer for run in runs for quantizer in sites_of(run.layer).values()]
    errors: dict[str, tuple[float, float]] = {}
    state, bound = runs[0].call.features, 0.0
    with bypassed(*sites):
        for depth, (name, (run, finding)) in enumerate(layers.items(), 1):
            if isinstance(finding.bound, str) or finding.growth is None:
                break
            out = run.result(state)
            bound = finding.growth * bound + finding.bound
            errors[name] = float((run.call.out - out).norm()), bound
            between = _between(run, runs[depth]) if depth < len(runs) else None
            if between is None:
                break
            state = between(out)
    return errors


def _between(run: Rerun, following: Rerun) -> Callable[[Tensor], Tensor] | None:
    """Which of :data:`BETWEEN` made the following layer's input of a layer's result."""
    out, features = run.call.out, following.call.features
    return next((f for f in BETWEEN if torch.equal(f(out), features)), None)
