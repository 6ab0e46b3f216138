"""Codes of unnormalized attention (see :mod:`qgnn_plugin.convs.attention`)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ..kernels.layout import top_code

__all__ = ["attention_codes", "attention_thresholds"]


@cache
def attention_thresholds(bits: int) -> tuple[float, ...]:
    """Ascending logit thresholds of the codes 1 .. Q."""
    qmax = top_code(bits)
    return tuple(math.log((q - 0.5) / qmax) for q in range(1, qmax + 1))


def attention_codes(shifted: Tensor, bits: int) -> Tensor:
    """Codes of ``exp(shifted)``, ``shifted <= 0``; without gradient."""
    table = torch.tensor(attention_thresholds(bits), dtype=shifted.dtype, device=shifted.device)
    return torch.bucketize(shifted.detach(), table, right=True).to(shifted.dtype)
