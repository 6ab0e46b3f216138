"""Dropout from uniform numbers: on the CPU several times faster than torch's, which draws Bernoulli numbers one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dropout"]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each value with probability ``p`` and scale the others by ``1 / (1 - p)``, in training mode."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or p >= 1:
        return F.dropout(x, p, training)
    return x * (torch.rand_like(x, requires_grad=False) >= p).to(x.dtype).mul_(1 / (1 - p))
