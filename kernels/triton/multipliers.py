"""Row multipliers on Triton: a range per row made from them, and the multipliers of packed results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..aggregate import sum_rows
from ..arithmetic import finish, multiplied, quantize_codes, row_multipliers
from ..layout import pack_codes

__all__ = ["pack_rows", "sum_multiplied"]


def pack_rows(y: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Pack float rows at the ranges of their multipliers: words and multipliers."""
    from .quantize_pack import pack_scaled

    multiplier = row_multipliers(y, unit)
    scale, offset = multiplied(scale, offset, multiplier)
    if scale.size(1) == offset.size(1) == 1:
        return pack_scaled(y, None, scale, offset, bits), multiplier
    return pack_codes(quantize_codes(y, scale, offset, bits), bits), multiplier


def sum_multiplied(
    words: Tensor, rowptr: Tensor, col: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int,
    multiplier: Tensor, dst_scale: Tensor | None, bias: Tensor | None, relu: bool,
) -> Any:  # fmt: skip
    """Float rows of an unweighted sum of rows with multipliers."""
    from .aggregate import aggregate

    factor = multiplier.to(torch.float32).unsqueeze(1)
    total = aggregate(words, rowptr, col, factor, torch.zeros_like(factor), num_features, bits)
    mass = sum_rows(multiplier.to(torch.int32).unsqueeze(1), rowptr, col).to(torch.float32)
    y = (total * scale) + (mass * offset)
    if dst_scale is not None:
        y = y * dst_scale.unsqueeze(1)
    return finish(y, bias, relu)
