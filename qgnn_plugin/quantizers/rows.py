r"""Integer row multipliers: every row takes a small integer multiple of one range.

.. math::
    \hat x_{if} = m_i (s c_{if} + l) \qquad
    m_i = \mathrm{clamp}(\lceil \max_f |x_{if}| \cdot (1 / p) \rceil, 1, 15)

Rows whose magnitudes differ by an order (hubs and leaves of a graph) each have a fitting step, as with a float per row
(the microscaling formats of OCP have a power of two there), and sums over rows stay sums of integers, exact in any
order: :math:`\sum_j \hat x_j = s \sum_j m_j c_j + l \sum_j m_j`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.arithmetic import LARGEST_MULTIPLIER
from .range_search import BLOCK, MAX_SAMPLES, SMALLEST, Sample, full_span
from .two_levels import search_two_levels

__all__ = ["SMALLEST_STEP", "RowRange", "RowSample", "multipliers", "search_rows"]

SMALLEST_STEP = SMALLEST / 64  # of a multiple: the range of a row is not smaller than others'
SAME = 1e-4  # relative difference of errors that are taken for equal
UNITS = 12  # candidates of p, a factor sqrt(2) apart
COARSE = 20  # shrunken ranges tried for each of them; then as many around the best of these


class RowRange(NamedTuple):
    """Multiples of one range.

    Args:
        multiplier: ``m``, integer-valued floats, one per row, broadcastable to the codes.
        scale: ``s``, one element.
        lower: ``l``, one element.
    """

    multiplier: Tensor
    scale: Tensor
    lower: Tensor

    def ends(self) -> tuple[Tensor, Tensor]:
        """Scale and lower end of every row."""
        return self.scale * self.multiplier, self.lower * self.multiplier

    def integers(self) -> Tensor:
        """``m`` as kernels have it: ``[N]`` uint8."""
        return self.multiplier.reshape(-1).to(torch.uint8)

    def detach(self) -> RowRange:
        return RowRange(*(part.detach() for part in self))

    def to(self, dtype: torch.dtype) -> RowRange:
        return RowRange(*(part.to(dtype) for part in self))


def multipliers(peaks: Tensor, unit: Tensor) -> Tensor:
    """``m`` of rows with these largest magnitudes, of their shape and in the dtype of ``unit``; no gradient."""
    return (peaks.detach().to(unit.dtype) * (1 / unit)).ceil_().clamp_(1, LARGEST_MULTIPLIER)


class RowSample(Sample):
    """A bounded, even sample of pairs ``[2, *]``: values, and the largest magnitudes of their rows."""

    def add(self, x: Tensor) -> None:
        super().add(x)
        self.count -= x.size(1)  # a pair is one value

    @staticmethod
    def ends(x: Tensor) -> Tensor:
        """The pair with the value of largest magnitude: it is the peak of its row."""
        return x[:, x[0].abs().argmax()].unsqueeze(1)


def search_rows(pairs: Tensor, qmax: int, zero_code: float | None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Find ``p``, scale and lower end of least mean-squared error together.

    Below a ``p`` of the largest peak over 15 leaves have finer multiples and hubs are cut off.

    Args:
        pairs: ``[2, M]`` finite values and the largest magnitudes of their rows.
        qmax: Largest code.
        zero_code: The code that stands for zero; :obj:`None` leaves the lower end free.

    Returns:
        ``p``, ``scale`` (both positive) and ``lower``, without dimensions.
    """
    pairs = pairs.detach() if pairs.dtype == torch.float64 else pairs.detach().float()
    if pairs.size(1) > MAX_SAMPLES:
        step = -(-pairs.size(1) // MAX_SAMPLES) | 1  # odd: a row's length is often even
        pairs = torch.cat([pairs[:, ::step], RowSample.ends(pairs)], 1)
    values, peaks = pairs
    top = peaks.amax()
    if top == 0:
        return torch.ones_like(top), torch.full_like(top, SMALLEST_STEP), torch.zeros_like(top)
    found = []
    for i in range(UNITS):
        # Not a round share of the largest peak: where data are, a rounding error must not decide on a multiplier.
        unit = (top * (1 + 1 / 1024) / (LARGEST_MULTIPLIER * 2 ** (i / 2))).clamp_min(SMALLEST_STEP)
        m = multipliers(peaks, unit)
        found.append((unit, *_fit(values / m, m, qmax, zero_code)))
    unit, scale, lower, _ = found[_first_best(torch.tensor([error for *_, error in found]))]
    return unit, scale.clamp_min(SMALLEST_STEP), lower


def _first_best(errors: Tensor) -> int:
    """The first of what is as good as the best: rounding errors of the data do not decide between equals."""
    return int((errors <= errors.min() * (1 + SAME)).to(torch.uint8).argmax())


def _fit(y: Tensor, m: Tensor, qmax: int, zero_code: float | None) -> tuple[Tensor, Tensor, float]:
    """Scale, lower end and error of ``y`` where an error counts ``m`` times: of the best shrunken range."""
    low, high = y.amin(), y.amax()
    span = full_span(low, high, qmax, zero_code)
    if span == 0:  # one value: its lower end alone represents it
        return low.abs(), low, 0.0
    # In units of the largest value, whose square neither overflows nor vanishes.
    unit = torch.maximum(low.abs(), high.abs())
    y, low, span = y / unit, low / unit, span / unit
    if qmax == 1:
        scale, lower, error = search_two_levels(y.unsqueeze(0), zero_code, m.square().unsqueeze(0))
        return scale[0] * unit, lower[0] * unit, float(error) * float(unit) ** 2
    shrunken = torch.arange(1, COARSE + 1, dtype=y.dtype, device=y.device) / COARSE
    best = shrunken[_first_best(_errors(y, m, shrunken, low, span, qmax, zero_code))]
    finer = best + (torch.arange(COARSE, dtype=y.dtype, device=y.device) - COARSE // 2) / COARSE**2
    finer = finer[(finer > 0) & (finer <= 1)]
    errors = _errors(y, m, finer, low, span, qmax, zero_code)
    shrink = finer[_first_best(errors)]
    scale = shrink * span / qmax
    lower = shrink * low if zero_code is None else -zero_code * scale
    return scale * unit, lower * unit, float(errors.min()) * float(unit) ** 2


def _errors(
    y: Tensor, m: Tensor, shrunken: Tensor, low: Tensor, span: Tensor, qmax: int, zero_code: float | None
) -> Tensor:
    errors = []
    for shrink in shrunken.unsqueeze(1).split(max(1, BLOCK // y.numel())):
        scale = shrink * span / qmax
        lower = shrink * low if zero_code is None else -zero_code * scale
        codes = ((y - lower) / scale).add_(0.5).floor_().clamp_(0, qmax)
        errors.append(codes.mul_(scale).add_(lower).sub_(y).mul_(m).square_().mean(-1))
    return torch.cat(errors)
