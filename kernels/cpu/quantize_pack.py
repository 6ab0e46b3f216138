"""``quantize_pack`` on the CPU: the epilogue alone."""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from . import jit
from .epilogue import GROUP, HAS_UNIT, address, code_pitch, epilogue, finish_rows, opened
from .parallel import even_chunks, run_chunks
from .simd import atomic_add, keep, raw, raw_at, vload, vload_first, vstore, vstore_first

__all__ = ["pack_scaled", "quantize_pack"]

BLOCK_ROWS = 32


@jit.kernel
def _copy(source, at, target, count):
    whole = count - count % GROUP
    for k in range(0, whole, GROUP):
        vstore(target, k, vload(source, at + k, GROUP))
    if whole < count:
        vstore_first(target, whole, vload_first(source, at + whole, GROUP, count - whole), count - whole)


@jit.kernel
def _kernel(x, closed, code_row, bounds, counter):
    spec = opened(closed)
    unpacked = np.zeros(BLOCK_ROWS * code_row, np.uint8)
    nothing = np.zeros(BLOCK_ROWS, np.float32)
    # Rows with multipliers are finished where they lie before they are quantized: that is not done to the input.
    copied = np.empty(BLOCK_ROWS * spec.width if spec.flags & HAS_UNIT else 0, np.float32)
    rows, zeros, codes, block = raw_at(x, np.float32), raw(nothing), raw(unpacked), raw(copied)
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        for first in range(bounds[chunk], bounds[chunk + 1], BLOCK_ROWS):
            count = min(BLOCK_ROWS, bounds[chunk + 1] - first)
            base = first * spec.width
            if spec.flags & HAS_UNIT:
                _copy(rows, base, block, count * spec.width)
                finish_rows(block, 0, spec.width, zeros, first, count, spec, codes)
            else:
                finish_rows(rows, base, spec.width, zeros, first, count, spec, codes)
    keep(copied)
    keep(unpacked)
    keep(nothing)


def pack_scaled(
    x: Tensor, row_factor: Tensor | None, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None
) -> Any:
    """Quantize and pack ``row_factor * x``."""
    rows, width = x.shape
    out, closed, held = epilogue(
        rows, width, dst_scale=row_factor, out_scale=scale, out_offset=offset, out_bits=bits, out_unit=unit
    )
    if rows:
        chunks = even_chunks(rows, 1 + width // 16)
        run_chunks(_kernel, chunks, address(x, held), closed, code_pitch(width, bits))
    return out


def quantize_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None) -> Any:
    return pack_scaled(x, None, scale, offset, bits, unit)
