"""Dropout from raw random bits: on the CPU several times faster than torch's, which draws one Bernoulli at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dropout"]

LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each value with probability ``p`` (to 16 bits) and scale the others by ``1 / (1 - p)``, in training mode."""
    if not training or p == 0:
        return x
    threshold = round(p * LEVELS)
    if x.device.type != "cpu" or not 0 < threshold < LEVELS:
        return F.dropout(x, p, training)
    lanes = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = lanes[: x.numel()].view(x.shape) >= threshold - LEVELS // 2
    return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - threshold))
