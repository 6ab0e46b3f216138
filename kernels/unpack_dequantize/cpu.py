"""``unpack_dequantize`` on the CPU."""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..arithmetic import is_per_row
from ..cpu import jit
from ..cpu.epilogue import address, epilogue, finish_rows, opened
from ..cpu.parallel import even_chunks, run_chunks
from ..cpu.simd import atomic_add, keep, raw, raw_at, vcast, vlanes, vload_first, vspread, vstore_parts
from ..layout import parts_per_byte
from . import unpack_dequantize_reference

__all__ = ["unpack_dequantize"]

BLOCK_ROWS = 16
LANES = 16  # words per tile


@cache
def _kernel(bits: int):
    parts = parts_per_byte(bits)
    codes = parts * 4 * LANES

    @jit.kernel
    def kernel(place, stride, closed, bounds, counter):
        spec, words = opened(closed), raw_at(place, np.int32)
        pitch = 4 * stride * parts
        acc = np.empty(BLOCK_ROWS * pitch + 4 * LANES, np.float32)
        ones, unused = np.ones(BLOCK_ROWS, np.float32), np.empty(0, np.uint8)
        zero, none = vlanes("i32", LANES), vlanes("u8", codes)
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            for first in range(bounds[chunk], bounds[chunk + 1], BLOCK_ROWS):
                count = min(BLOCK_ROWS, bounds[chunk + 1] - first)
                for r in range(count):
                    for tile in range(0, stride, LANES):
                        at, live = (first + r) * stride + tile, stride - tile
                        row = vspread(vload_first(words, at, zero, live), none)
                        at = r * pitch + 4 * tile
                        vstore_parts(acc, at, 4 * stride, vcast(row, "f32"), parts, 4 * live)
                finish_rows(raw(acc), 0, pitch, raw(ones), first, count, spec, raw(unused))
        keep(acc)
        keep(ones)
        keep(unused)

    return kernel


def unpack_dequantize(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int, multiplier: Tensor | None = None
) -> Tensor:
    rows = words.size(0)
    if multiplier is not None and (scale.numel() > 1 or offset.numel() > 1):
        # (c s_f + l_f) m would round differently
        return unpack_dequantize_reference(words, scale, offset, num_features, bits, multiplier)
    if multiplier is not None or is_per_row(scale) or is_per_row(offset):
        # (c * s_i) + (1 * l_i) by the row factors of the epilogue.
        factors = {
            "dst_scale": scale,
            "term": torch.ones(num_features, dtype=torch.float32),
            "row_term": offset,
            "multiples": multiplier,
        }
    else:
        factors = {"scale": scale, "offset": offset}
    out, closed, held = epilogue(rows, num_features, **factors)
    if out.numel():
        chunks = even_chunks(rows, 1 + num_features // 16)
        run_chunks(_kernel(bits), chunks, address(words, held), words.size(1), closed)
    return out
