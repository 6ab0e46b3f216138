"""Propagation and its correction by dense float64 matrices."""

from __future__ import annotations

import torch
from core.support import NODES
from torch import Tensor

from qgnn_plugin import SMPConfig


def walk(edge_index: Tensor) -> Tensor:
    """The normalized adjacency with self-loops, dense in float64."""
    dense = torch.zeros(NODES, NODES, dtype=torch.float64)
    dense[edge_index[1], edge_index[0]] = 1
    dense.fill_diagonal_(1)
    factor = dense.sum(1).rsqrt()
    return factor.unsqueeze(1) * dense * factor


def energy(x: Tensor, operator: Tensor) -> float:
    return float((x * (x - operator @ x)).sum())


def remaining(change: Tensor, operator: Tensor, config: SMPConfig, multiplier: float) -> Tensor:
    """The corrected change, by dense matrices."""
    identity = torch.eye(NODES, dtype=torch.float64)
    if config.correction == "explicit":
        return (identity - 2 * config.eta * multiplier * (identity - operator)) @ change
    lazy, weight = (identity + operator) / 2, 4 * multiplier
    result = change
    for _ in range(config.terms):
        result = (change + weight * lazy @ result) / (1 + weight)
    return result


def dense_steps(x0: Tensor, operator: Tensor, config: SMPConfig, steps: int, multiplier: float) -> list[Tensor]:
    """Every state of the propagation at a constant multiplier."""
    states = [x0]
    for _ in range(steps):
        h = states[-1]
        gradient = (h - x0) + config.mu * (h - operator @ h)
        states.append(h + remaining(-config.eta * gradient, operator, config, multiplier))
    return states
