r"""Range search: least mean-squared error over shrunken ranges ``[a min x, a max x]``, ``0 < a <= 1``.

Of two levels the least is known (see :mod:`.two_levels`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .two_levels import search_two_levels

__all__ = ["Sample", "search_range"]

GRID = 80
MAX_SAMPLES = 1 << 16
BLOCK = 1 << 17  # values quantized at once: many ranges of a small tensor, one of a large one
SMALLEST = 1e-30


def _mse(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    """Mean-squared error per row of ``x`` [R, M] for each of G ranges; ``scale`` and ``lower`` are [G, R, 1]."""
    codes = ((x - lower) / scale).add_(0.5).floor_().clamp_(0, qmax)
    return codes.mul_(scale).add_(lower).sub_(x).square_().mean(-1)


def subsample(x: Tensor) -> Tensor:
    """Evenly spaced columns of ``x`` [R, M], about ``MAX_SAMPLES`` values in all, the extremes of each row kept."""
    limit = max(256, MAX_SAMPLES // x.size(0))
    if x.size(1) <= limit:
        return x
    step = -(-x.size(1) // limit) | (x.size(0) == 1)  # odd: the features of a node are often many, and even
    return torch.cat([x[:, ::step], x.amin(1, keepdim=True), x.amax(1, keepdim=True)], 1)


class Sample:
    """A bounded, even sample of ``[R, *]`` values that come in batches, with the extremes of each row."""

    THINNING = 3  # a stride of its powers meets every column of features, whose number is often a power of two

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._stride = 1
        self._extremes: Tensor | None = None
        self.count = 0  # of values given

    def __len__(self) -> int:
        return len(self._parts)

    @staticmethod
    def ends(x: Tensor) -> Tensor:
        """The columns ``[R, *]`` that are kept in any case: least and largest value of each row."""
        return torch.stack([x.amin(1), x.amax(1)], 1)

    def add(self, x: Tensor) -> None:
        self.count += x.numel()
        ends = self.ends(x)
        if self._extremes is not None:
            ends = self.ends(torch.cat([self._extremes, ends], 1))
        self._extremes = ends
        # A copy: the model may change its activations in place.
        self._parts.append(x[:, :: self._stride].clone())
        limit = max(256, MAX_SAMPLES // x.size(0)) - ends.size(1)
        while sum(part.size(1) for part in self._parts) > max(limit, len(self._parts)):
            self._stride *= self.THINNING
            self._parts = [part[:, :: self.THINNING].clone() for part in self._parts]

    def rows(self) -> Tensor:
        """``[R, *]``: everything while it was little."""
        assert self._extremes is not None
        return torch.cat([*self._parts, self._extremes] if self._stride > 1 else self._parts, 1)


def search_range(x: Tensor, qmax: int, zero_code: float | None) -> tuple[Tensor, Tensor]:
    """Find scale and lower end per row of ``x``.

    Args:
        x: ``[R, M]`` finite values, one range per row, ``M >= 1``.
        qmax: Largest code.
        zero_code: The code that stands for zero: 0 for non-negative data, ``qmax / 2`` for half-integer levels;
            :obj:`None` leaves the lower end free.

    Returns:
        ``scale`` (positive) and ``lower``, ``[R]`` each.
    """
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    x = x if qmax == 1 and zero_code == 0.5 else subsample(x)
    unit = _unit(x)
    x = x / unit
    if qmax == 1:
        scale, lower, _ = search_two_levels(x, zero_code)
        constant = scale == 0
        scale = (torch.where(constant, lower.abs(), scale) * unit.squeeze(1)).clamp_min(SMALLEST)
        return scale, lower * unit.squeeze(1) if zero_code is None else -zero_code * scale
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    span = full_span(low, high, qmax, zero_code)
    best_error = torch.full_like(low, float("inf"))
    best_scale, best_lower = torch.ones_like(low), low.clone()
    steps = torch.arange(1, GRID + 1, dtype=torch.float64, device=x.device).view(-1, 1, 1)
    for shrink in (steps / GRID).split(max(1, BLOCK // x.numel())):
        scale = torch.where(span > 0, (shrink / qmax).to(x.dtype) * span, SMALLEST)
        lower = shrink.to(x.dtype) * low if zero_code is None else -zero_code * scale
        error, index = _mse(x, scale, lower, qmax).unsqueeze(-1).min(0, keepdim=True)
        error, scale, lower = error[0], scale.gather(0, index)[0], lower.gather(0, index)[0]
        better = error < best_error
        best_error = torch.minimum(error, best_error)
        best_scale, best_lower = torch.where(better, scale, best_scale), torch.where(better, lower, best_lower)
    if zero_code is None:
        # A constant row has no spread to derive a step from; its lower end alone represents it.
        constant = span == 0
        best_scale = torch.where(constant, low.abs(), best_scale)
        best_lower = torch.where(constant, low, best_lower)
    best_scale = (best_scale * unit).clamp_min(SMALLEST)
    best_lower = best_lower * unit if zero_code is None else -zero_code * best_scale
    return best_scale.squeeze(1), best_lower.squeeze(1)


def full_span(low: Tensor, high: Tensor, qmax: int, zero_code: float | None) -> Tensor:
    """Width of the range that holds values from ``low`` to ``high``, with zero at ``zero_code`` if there is one."""
    if zero_code is None:
        return high - low
    below = -low / zero_code if zero_code > 0 else torch.zeros_like(low)
    return torch.maximum(below, high / (qmax - zero_code)) * qmax


def _unit(x: Tensor) -> Tensor:
    """A power of two near the largest magnitude of each row: squares of ``x / unit`` neither overflow nor vanish."""
    peak = x.abs().amax(1, keepdim=True)
    unit = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 1)
    return torch.where(peak > 0, unit, torch.ones_like(peak))
