"""``quantize_pack`` on the CPU: the epilogue alone."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from torch import Tensor

from . import jit
from .epilogue import code_pitch, epilogue, finish_rows, flat
from .parallel import even_chunks, run_chunks
from .simd import atomic_add, keep, raw

__all__ = ["pack_scaled", "quantize_pack"]

BLOCK_ROWS = 32


@jit.kernel
def _kernel(x, spec, code_row, bounds, counter):
    unpacked = np.zeros(BLOCK_ROWS * code_row, np.uint8)
    nothing = np.zeros(BLOCK_ROWS, np.float32)
    rows, zeros, codes = raw(x), raw(nothing), raw(unpacked)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for first in range(bounds[chunk], bounds[chunk + 1], BLOCK_ROWS):
            count = min(BLOCK_ROWS, bounds[chunk + 1] - first)
            base = first * spec.width
            finish_rows(rows, base, spec.width, zeros, first, count, spec, codes)
    keep(unpacked)
    keep(nothing)


def pack_scaled(x: Tensor, row_factor: Tensor | None, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Quantize and pack ``row_factor * x``."""
    rows, width = x.shape
    out, spec = epilogue(rows, width, dst_scale=row_factor, out_scale=scale, out_offset=offset, out_bits=bits)
    if out.numel():
        chunks = even_chunks(rows, 1 + width // 16)
        run_chunks(_kernel, chunks, flat(x), spec, code_pitch(width, bits))
    return out


def quantize_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return pack_scaled(x, None, scale, offset, bits)
