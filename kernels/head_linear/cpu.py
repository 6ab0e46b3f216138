"""``head_linear`` on the CPU: ``linear``, with dot products of each block of rows while its floats are in the cache."""
# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu.epilogue import address, code_pitch, epilogue
from ..cpu.memory import empty
from ..cpu.parallel import even_chunks, run_chunks
from ..layout import BITS_PER_BYTE
from ..linear.cpu import FEATURES, linear_kernel, weights_of
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
    weight, start, colsum = weights_of(w_words, in_features, w_bits, x_bits == BITS_PER_BYTE)
    packed, closed, held = epilogue(
        rows, channels, scale=w_scale, offset=w_offset, dst_scale=x_scale, row_term=x_offset, multiples=multiplier,
        bias=bias, out_scale=out_scale, out_offset=out_offset, out_bits=out_bits, out_unit=out_unit,
    )  # fmt: skip
    number = vectors.size(0)
    dots = empty((number, rows, heads), torch.float32)
    if rows and channels:
        run_chunks(
            linear_kernel(x_bits, 1), even_chunks(rows, 1 + in_features * channels // 512), address(x_words, held),
            x_words.size(1), weight.data_ptr(), start.numel(), -(-in_features // FEATURES), start.data_ptr(),
            colsum.data_ptr(), in_features, closed, code_pitch(channels, out_bits),
            (address(vectors, held), number, heads, dots.data_ptr(), rows),
        )  # fmt: skip
    elif rows:
        dots.zero_()
    return *with_multipliers(packed), dots
