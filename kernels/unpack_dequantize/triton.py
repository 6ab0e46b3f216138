"""``unpack_dequantize`` on Triton: one pass, words read once, floats written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import multiplied
from ..layout import row_words
from ..triton.bits import by_feature, feature_tile, load_range, load_words, spread
from ..triton.launch import UNSPECIALIZED, check_devices, config_for, launch, warp_size, word_tile
from ..triton.ranges import range_kind
from . import unpack_dequantize_reference

__all__ = ["unpack_dequantize", "unpack_dequantize_kernel"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def unpack_dequantize_kernel(  # type: ignore[no-untyped-def]
    words, scale, offset, out, num_rows,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """``x^ = c s + l``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    first = tl.program_id(1) * WORDS
    word = first + tl.arange(0, WORDS)
    row64 = row.to(tl.int64)
    tile = load_words(words + row64[:, None] * W + word[None, :], row_ok[:, None] & (word < W)[None, :])
    codes = by_feature(spread(tile, BITS, 32), BITS, ROWS, WORDS).to(tl.int32)
    feature, feature_ok = feature_tile(first, F, W, BITS, WORDS)
    s = load_range(scale, SCALE, row, row_ok, feature, feature_ok)
    offsets = load_range(offset, OFFSET, row, row_ok, feature, feature_ok)
    tl.store(
        out + row64[:, None, None] * F + feature[None, :, :],
        codes.to(tl.float32) * s + offsets,
        mask=row_ok[:, None, None] & feature_ok[None, :, :],
    )


def unpack_dequantize(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int, multiplier: Tensor | None = None
) -> Tensor:
    if multiplier is not None:
        if scale.numel() > 1 or offset.numel() > 1:  # no range tensor holds one per row and column
            return unpack_dequantize_reference(words, scale, offset, num_features, bits, multiplier)
        scale, offset = multiplied(scale, offset, multiplier)
    device = check_devices(words, scale, offset)
    num_rows, num_words = words.size(0), row_words(num_features, bits)
    out = words.new_empty((num_rows, num_features), dtype=torch.float32)
    config = config_for("elementwise", device, num_words)
    rows, width = word_tile(config, num_words, warp_size(), bits)
    launch(
        unpack_dequantize_kernel,
        (triton.cdiv(num_rows, rows), triton.cdiv(num_words, width)), device,
        words.contiguous(), scale.contiguous(), offset.contiguous(), out, num_rows,
        F=num_features, W=num_words, BITS=bits, ROWS=rows, WORDS=width,
        SCALE=range_kind(scale), OFFSET=range_kind(offset), num_warps=config.num_warps,
    )  # fmt: skip
    return out
