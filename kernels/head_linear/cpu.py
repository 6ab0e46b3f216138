"""``head_linear`` on the CPU: ``linear``, with dot products of each block of rows while its floats are in the cache."""
# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu.epilogue import address, epilogue
from ..cpu.memory import empty
from ..linear.cpu import run_linear
from . import with_multipliers

__all__ = ["head_linear"]


def head_linear(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    vectors: Tensor,
    heads: int,
    out_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = x_words.size(0), w_words.size(0)
    packed, closed, held = epilogue(
        rows, channels, scale=w_scale, offset=w_offset, dst_scale=x_scale, row_term=x_offset, multiples=multiplier,
        bias=bias, out_scale=out_scale, out_offset=out_offset, out_bits=out_bits, out_unit=out_unit,
    )  # fmt: skip
    number = vectors.size(0)
    dots = empty((number, rows, heads), torch.float32)
    if rows and channels:
        wanted = (address(vectors, held), number, heads, dots.data_ptr(), rows)
        run_linear(x_words, w_words, in_features, x_bits, w_bits, out_bits, closed, held, wanted)
    elif rows:
        dots.zero_()
    return *with_multipliers(packed), dots
