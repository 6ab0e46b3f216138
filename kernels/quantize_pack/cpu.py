"""``quantize_pack`` on the CPU: the epilogue alone."""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..cpu import jit
from ..cpu.epilogue import address, code_pitch, epilogue, finish_rows, opened
from ..cpu.parallel import even_chunks, run_chunks
from ..cpu.simd import atomic_add, keep, raw, raw_at

__all__ = ["pack_scaled", "quantize_pack"]

BLOCK_ROWS = 32


@jit.kernel
def _kernel(x, closed, code_row, bounds, counter):
    spec = opened(closed)
    unpacked = np.empty(code_row, np.uint8)
    nothing = np.zeros(BLOCK_ROWS, np.float32)
    rows, zeros, codes = raw_at(x, np.float32), raw(nothing), raw(unpacked)
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


def pack_scaled(
    x: Tensor, row_factor: Tensor | None, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None,
    column_factor: Tensor | None = None, column_term: Tensor | None = None, relu: bool = False,
) -> Any:
    """Quantize and pack ``row_factor * column_factor * x + column_term``, with ``relu`` no less than 0."""
    rows, width = x.shape
    out, closed, held = epilogue(
        rows, width, scale=column_factor, dst_scale=row_factor, bias=column_term, relu=relu, out_scale=scale,
        out_offset=offset, out_bits=bits, out_unit=unit,
    )  # fmt: skip
    if rows:
        chunks = even_chunks(rows, 1 + width // 16)
        run_chunks(_kernel, chunks, address(x, held), closed, code_pitch(width, bits))
    return out


def quantize_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None) -> Any:
    return pack_scaled(x, None, scale, offset, bits, unit)
