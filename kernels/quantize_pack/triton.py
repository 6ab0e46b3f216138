"""``quantize_pack`` on Triton: one pass, floats read once, words written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER
from ..layout import row_words
from ..triton.bits import feature_tile, load_range
from ..triton.epilogue import pack_features, quantize, row_multipliers
from ..triton.launch import UNSPECIALIZED, check_devices, config_for, launch, warp_size, whole_row_tile, word_tile
from ..triton.ranges import range_kind
from . import quantize_pack_reference

__all__ = ["pack_scaled", "quantize_pack", "quantize_pack_kernel"]

MOST_WORDS = 256  # of rows whose peak one program finds: wider ones would not fit its registers


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_pack_kernel(  # type: ignore[no-untyped-def]
    x, factor, scale, offset, unit, out, multiplier, num_rows,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """``c = clamp(floor((n x - l) / s + 1/2), 0, Q)``, packed; ``n`` is a factor per row.  With ``unit`` a program has
    whole rows, and their ranges are multiples of ``s`` and ``l``.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    first = tl.program_id(1) * WORDS
    feature, feature_ok = feature_tile(first, F, W, BITS, WORDS)
    ok = row_ok[:, None, None] & feature_ok[None, :, :]
    row64 = row.to(tl.int64)
    value = tl.load(x + row64[:, None, None] * F + feature[None, :, :], mask=ok, other=0.0)
    if factor is not None:
        value = value * tl.load(factor + row, mask=row_ok, other=0.0)[:, None, None]
    s = load_range(scale, SCALE, row, row_ok, feature, feature_ok)
    offsets = load_range(offset, OFFSET, row, row_ok, feature, feature_ok)
    if unit is not None:
        size = tl.abs(value)
        size = tl.where(ok & (size > 0), size, 0.0)  # false for NaN
        times = row_multipliers(tl.max(tl.max(size, 2), 1), unit, LARGEST)
        tl.store(multiplier + row, times.to(tl.uint8), mask=row_ok)
        s, offsets = s * times[:, None, None], offsets * times[:, None, None]
    codes = tl.where(feature_ok[None, :, :], quantize(value, s, offsets, BITS), 0)
    word = first + tl.arange(0, WORDS)
    tl.store(
        out + row64[:, None] * W + word[None, :],
        pack_features(codes, BITS, ROWS, WORDS),
        mask=row_ok[:, None] & (word < W)[None, :],
    )


def quantize_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None) -> Any:
    return pack_scaled(x, None, scale, offset, bits, unit)


def pack_scaled(
    x: Tensor, factor: Tensor | None, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None
) -> Any:
    """Quantize and pack ``factor * x``, with a factor per row (``[N]``) or none; with ``unit`` multipliers as well."""
    device = check_devices(x, factor, scale, offset, unit)
    factor = None if factor is None else factor.contiguous()
    num_rows, num_features = x.shape
    words = row_words(num_features, bits)
    if unit is not None and (words > MOST_WORDS or words == 0):
        scaled = x if factor is None else x * factor.unsqueeze(1)
        return quantize_pack_reference(scaled, scale, offset, bits, unit)
    out = x.new_empty((num_rows, words), dtype=torch.int32)
    multiplier = None if unit is None else x.new_empty(num_rows, dtype=torch.uint8)
    config = config_for("elementwise", device, words)
    rows, width = (word_tile if unit is None else whole_row_tile)(config, words, warp_size(), bits)
    launch(
        quantize_pack_kernel, (triton.cdiv(num_rows, rows), triton.cdiv(words, width)), device,
        x.contiguous(), factor, scale.contiguous(), offset.contiguous(), unit, out, multiplier, num_rows,
        F=num_features, W=words, BITS=bits, ROWS=rows, WORDS=width,
        SCALE=range_kind(scale), OFFSET=range_kind(offset), LARGEST=LARGEST_MULTIPLIER, num_warps=config.num_warps,
    )  # fmt: skip
    return out if multiplier is None else (out, multiplier)
