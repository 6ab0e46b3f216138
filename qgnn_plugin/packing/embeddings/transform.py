r"""Embeddings in the directions in which they vary: more bits where dot products need them, none where nothing is.

Node embeddings of a trained network lie close to a space of few dimensions, so that two bits for each feature spend
most of them on noise.  A transform code (Huang and Schultheiss, 1963; for search Brandt, CVPR 2010) rotates them to
their principal directions and shares the same bits out anew: direction ``k`` gets :math:`n_k` digits of :math:`b` bits,

.. math:: \hat x_i = f_i \Big(\mu + \sum_k (l_k + s_k c_{ik}) v_k\Big), \qquad
    c_{ik} = \sum_j 2^{b (n_k - 1 - j)} d_{ikj},

whose digits :math:`d` are packed as any codes.  The error of a product with a query :math:`q` that is distributed as
the embeddings are has the variance :math:`\sum_k E[(q v_k)^2] s_k^2 / 12`, and a digit divides :math:`s_k` by
:math:`2^b`: each goes where it takes most from that sum (reverse water-filling).  The factor :math:`f_i` brings every
row as close as one number can; most of what rounding does to a cosine is that it changes lengths.  With 32 bits of
further digits a row takes as many bytes as one with a range of its own does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Transform", "transform_codes"]

MOST_BITS = 16  # of a direction: float32 sums of more would round
BLOCK = 1 << 22  # elements in float64 at a time
CLIPS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6)  # shares of the whole range that are tried


@dataclass(frozen=True, eq=False)
class Transform:
    """How digits become values: ``codes @ basis() + center``, before the factor of each row.

    Args:
        directions: ``[D, F]`` float32: unit vectors times the step of the direction.
        center: ``[F]`` float32: the mean, and the lower ends of all ranges.
        digits: ``[D]`` uint8: digits of each direction, at least 1.
        bits: Width of a digit.
    """

    directions: Tensor
    center: Tensor
    digits: Tensor
    bits: int

    def __post_init__(self) -> None:
        rows, features = self.directions.size(0), self.center.numel()
        fits = self.directions.shape == (rows, features) and self.digits.shape == (rows,)
        if not fits or self.directions.dtype is not torch.float32 or self.center.dtype is not torch.float32:
            raise ValueError(
                f"Expected float32 directions [D, F] and a center [F] (got {list(self.directions.shape)} and "
                f"{list(self.center.shape)}, {self.directions.dtype} and {self.center.dtype})"
            )
        if self.digits.dtype is not torch.uint8 or bool(((self.digits < 1) | (self.digits > MOST_BITS)).any()):
            raise ValueError(f"Expected uint8 'digits' of 1 to {MOST_BITS} (got {self.digits.dtype})")
        if not bool(self.directions.isfinite().all() and self.center.isfinite().all()):
            raise ValueError("Expected finite directions and center (got NaN or infinity)")

    @property
    def num_codes(self) -> int:
        """Digits of a row."""
        return int(self.digits.sum())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What files hold of it."""
        return {"directions": self.directions, "center": self.center, "digits": self.digits}

    def basis(self) -> Tensor:
        """``[C, F]`` float64: what one unit of each digit adds to a row."""
        counts = self.digits.long()
        directions = self.directions.double().repeat_interleave(counts, dim=0)
        return directions * self._weights().unsqueeze(1)

    def _weights(self) -> Tensor:
        """``[C]`` float64: the place value of each digit, the most significant first."""
        places = [self.bits * (count - 1 - j) for count in self.digits.tolist() for j in range(count)]
        return torch.tensor([2.0**place for place in places], dtype=torch.float64, device=self.digits.device)

    def to(self, device: torch.device | str) -> Transform:
        return Transform(self.directions.to(device), self.center.to(device), self.digits.to(device), self.bits)


def transform_codes(x: Tensor, bits: int, further_bits: int = 0) -> tuple[Tensor, Tensor, Transform]:
    """Codes of a transform fitted to ``x``, of at most ``bits`` bits for each feature and ``further_bits``.

    Args:
        x: ``[N, F]`` finite float32.
        bits: 2, 4 or 8.
        further_bits: Of each row.

    Returns:
        Digits ``[N, C]`` uint8, factors ``[N, 1]`` float32, and the transform.
    """
    mean = _mean(x)
    directions, weight = _directions(x, mean)
    low, high = _ranges(x, mean, directions)
    digits = _shared_out((high - low).square() * weight, x.size(1) + further_bits // bits, bits)
    kept = digits > 0
    directions, digits, low, high = directions[:, kept], digits[kept], low[kept], high[kept]
    top = 2.0 ** (bits * digits) - 1
    low, step = _clipped(x, mean, directions, low, high, top)
    parts = [_digits(rows, mean, directions, low, step, top, digits, bits) for rows in _blocks(x)]
    codes = torch.cat(parts) if parts else x.new_zeros((0, int(digits.sum())), dtype=torch.uint8)
    transform = Transform(
        (directions * step).t().float().contiguous(),
        (mean + directions @ low).float(),
        digits.to(torch.uint8),
        bits,
    )
    return codes, _factors(x, codes, transform), transform


def _blocks(x: Tensor) -> Iterator[Tensor]:
    for rows in x.split(max(1, BLOCK // max(1, x.size(1)))):
        yield rows.double()


def _mean(x: Tensor) -> Tensor:
    total = sum((rows.sum(0) for rows in _blocks(x)), x.new_zeros(x.size(1), dtype=torch.float64))
    return total / max(1, x.size(0))


def _directions(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions ``[F, F]``, the widest first, and ``E[(x v_k)^2]`` ``[F]``."""
    second = sum((rows.t() @ rows for rows in _blocks(x)), mean.new_zeros((mean.numel(), mean.numel())))
    second = second / max(1, x.size(0))
    directions = torch.linalg.eigh(second - torch.outer(mean, mean)).eigenvectors.flip(1)
    return directions, ((second @ directions) * directions).sum(0).clamp_min(0)


def _ranges(x: Tensor, mean: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest coordinate of each direction."""
    ends = [torch.aminmax((rows - mean) @ directions, dim=0) for rows in _blocks(x)]
    return torch.stack([low for low, _ in ends]).amin(0), torch.stack([high for _, high in ends]).amax(0)


def _shared_out(cost: Tensor, num_digits: int, bits: int) -> Tensor:
    """Digits of each direction, ``num_digits`` in all where so many are worth having."""
    digits = torch.zeros(cost.numel(), dtype=torch.long, device=cost.device)
    most = max(1, MOST_BITS // bits)
    left = cost.clone()
    left[cost <= cost.amax() * torch.finfo(torch.float32).eps ** 2] = 0  # nothing but rounding
    for _ in range(num_digits):
        best = int(left.argmax())
        if left[best] <= 0:
            break
        digits[best] += 1
        left[best] = 0 if digits[best] == most else left[best] / 4.0**bits
    return digits


def _clipped(
    x: Tensor, mean: Tensor, directions: Tensor, low: Tensor, high: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Lower ends and steps of the least error, where the error of a row weighs as much as its own square length."""
    middle, half = (low + high) / 2, (high - low) / 2
    steps = [2 * half * share / top for share in CLIPS]
    lows = [middle - half * share for share in CLIPS]
    errors = torch.zeros((len(CLIPS), low.numel()), dtype=torch.float64, device=x.device)
    for rows in _blocks(x):
        z, importance = (rows - mean) @ directions, rows.square().sum(1, keepdim=True)
        for index, (lower, step) in enumerate(zip(lows, steps, strict=True)):
            codes = ((z - lower) / step + 0.5).floor().clamp_min(0).minimum(top)
            errors[index] += ((codes * step + lower - z).square() * importance).sum(0)
    best = errors.argmin(0, keepdim=True)
    return torch.stack(lows).gather(0, best)[0], torch.stack(steps).gather(0, best)[0]


def _digits(
    rows: Tensor, mean: Tensor, directions: Tensor, low: Tensor, step: Tensor, top: Tensor, digits: Tensor, bits: int
) -> Tensor:
    codes = (((rows - mean) @ directions - low) / step + 0.5).floor().clamp_min(0).minimum(top).long()
    columns = [
        (codes[:, k] >> (bits * (count - 1 - j))) & ((1 << bits) - 1)
        for k, count in enumerate(digits.tolist())
        for j in range(count)
    ]
    return torch.stack(columns, dim=1).to(torch.uint8) if columns else rows.new_zeros((len(rows), 0), dtype=torch.uint8)


def _factors(x: Tensor, codes: Tensor, transform: Transform) -> Tensor:
    """``<x, x^> / <x^, x^>``, at least 0; 1 where there is nothing to scale."""
    basis, center, parts = transform.basis(), transform.center.double(), []
    for rows, found in zip(_blocks(x), codes.split(max(1, BLOCK // max(1, x.size(1)))), strict=True):
        values = found.double() @ basis + center
        squares = values.square().sum(1, keepdim=True)
        best = (rows * values).sum(1, keepdim=True).clamp_min(0) / squares
        parts.append(torch.where(squares > 0, best, 1.0).float())
    return torch.cat(parts) if parts else x.new_ones((0, 1))
