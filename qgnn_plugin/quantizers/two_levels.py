r"""Ranges of one bit: the two levels of least squared error, in closed form.

Free levels are the means of the two groups into which the sorted values split best (Lloyd and Max; k-means in one
dimension): of all splits, that whose means explain most.  With a level at zero the other is the mean of the largest
values, and levels of :math:`\pm s/2` are :math:`s = 2\, \mathrm{mean} |x|` apart (XNOR-Net, arXiv 1603.05279).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["search_two_levels"]


def search_two_levels(
    x: Tensor, zero_code: float | None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find scale and lower end per row of ``x``, whose codes are 0 and 1.

    Args:
        x: ``[R, M]`` finite values, one range per row, ``M >= 1``.
        zero_code: The code that stands for zero: 0, 1, or 1/2 for levels around zero; :obj:`None` leaves both free.
        weight: ``[R, M]`` how much each squared error counts; default 1.

    Returns:
        ``scale`` and ``lower``, ``[R]`` each, and the mean weighted square of the errors.  The scale is 0 where one
        level is enough: of equal values, or of zeros (which ``lower`` then is).
    """
    values = x.double()
    weights = torch.ones_like(values) if weight is None else weight.double()
    squares = (weights * values.square()).sum(1)
    if zero_code == 0.5:
        mean = (weights * values.abs()).sum(1) / weights.sum(1)
        scale, lower, explained = 2 * mean, -mean, mean.square() * weights.sum(1)
    elif zero_code is not None:
        level, explained = _level_beside_zero(values if zero_code == 0 else -values, weights)
        scale, lower = level, -zero_code * level
    else:
        scale, lower, explained = _free(values, weights)
    error = (squares - explained).clamp_min(0) / x.size(1)
    return scale.to(x.dtype), lower.to(x.dtype), error.to(x.dtype)


def _level_beside_zero(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The level ``>= 0`` whose values are the largest ones, and what it explains."""
    order = x.argsort(1, descending=True)
    mass, total = w.gather(1, order).cumsum(1), (w * x).gather(1, order).cumsum(1).clamp_min(0)
    explained, last = (total.square() / mass).max(1, keepdim=True)
    return (total.gather(1, last) / mass.gather(1, last)).squeeze(1), explained.squeeze(1)


def _free(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step and lower one of two free levels, and what they explain."""
    order = x.argsort(1)
    sorted_x, sorted_w = x.gather(1, order), w.gather(1, order)
    mass, total = sorted_w.cumsum(1), (sorted_w * sorted_x).cumsum(1)
    mean = total[:, -1:] / mass[:, -1:]
    whole = (mean * total[:, -1:]).squeeze(1)
    if x.size(1) == 1:
        return torch.zeros_like(whole), mean.squeeze(1), whole
    # Around their mean, so that what a split explains is no small difference of large numbers.
    below, above = mass[:, :-1], mass[:, -1:] - mass[:, :-1]
    apart = (sorted_w * (sorted_x - mean)).cumsum(1)[:, :-1]
    gain, at = (apart.square() * (1 / below + 1 / above)).max(1, keepdim=True)
    apart, below, above = (t.gather(1, at).squeeze(1) for t in (apart, below, above))
    lower, upper = mean.squeeze(1) + apart / below, mean.squeeze(1) - apart / above
    gain = gain.squeeze(1)
    one = gain <= 0
    return torch.where(one, 0.0, upper - lower), torch.where(one, mean.squeeze(1), lower), whole + gain
