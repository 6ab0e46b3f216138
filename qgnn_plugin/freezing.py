r"""Weights whose codes go to and fro, held where they were most of the time.

A weight that would be best between two levels is pulled towards the one that it does not have, and so changes its code
every few steps, however small the rate: where a layer has few weights, each change moves all outputs.
A code *oscillates* where it changes in the direction opposite to its last change.  Of that, and of the codes, running
means are kept (Nagel et al., "Overcoming oscillations in quantization-aware training", 2022, algorithm 1); a weight
whose mean passes a threshold, which falls along a half cosine, stays in the middle of the level of its mean code, and
the rest of the model learns around it.  Ranges go on learning, and frozen weights move with them.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .matching import WeightSite, weight_sites

__all__ = ["OscillationFreezing"]

MOMENTUM = 0.02  # of running means
FIRST, LAST = 0.04, 0.01  # share of steps in which a code turns back that it may reach


class OscillationFreezing:
    """Freezes weights whose codes oscillate (see the module); call :meth:`step` after the optimizer's.

    Args:
        qmodel: A converted model whose ranges are set.
        steps: How many steps the training has; the threshold falls over these.
    """

    def __init__(self, qmodel: nn.Module, steps: int) -> None:
        self._sites = [_Site(site) for site in weight_sites(qmodel) if _is_view(site)]
        self._steps, self._done = steps, 0

    @torch.no_grad()
    def step(self) -> None:
        """Count the changes of codes since the last call, and put frozen weights back in the middle of their levels."""
        self._done = min(self._done + 1, self._steps)
        threshold = LAST + (FIRST - LAST) * 0.5 * (1 + math.cos(math.pi * self._done / self._steps))
        for site in self._sites:
            site.step(threshold)

    def frozen(self) -> int:
        """How many weights are frozen."""
        return sum(int(site.held.sum()) for site in self._sites)


def _is_view(site: WeightSite) -> bool:
    """Whether what the layer quantizes is the weight itself, however arranged, and no copy of it."""
    return site.matrix().untyped_storage().data_ptr() == site.weight.untyped_storage().data_ptr()


class _Site:
    def __init__(self, site: WeightSite) -> None:
        self.site = site
        with torch.no_grad():
            self.codes = site.codes()
        self.mean = self.codes.clone()
        self.direction, self.turns = torch.zeros_like(self.codes), torch.zeros_like(self.codes)
        self.held = torch.zeros_like(self.codes, dtype=torch.bool)

    def step(self, threshold: float) -> None:
        codes = self.site.codes()
        change = (codes - self.codes).sign()
        self.turns.lerp_((change * self.direction < 0).to(codes.dtype), MOMENTUM)
        self.direction = torch.where(change != 0, change, self.direction)
        self.mean = torch.where(self.held, self.mean, self.mean.lerp(codes, MOMENTUM))
        self.held |= self.turns > threshold
        self.codes = torch.where(self.held, self.mean.round(), codes)
        self.site.hold(self.codes, self.held)
