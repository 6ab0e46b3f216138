"""Logits of GATv2 from packed rows, sixteen sums over features at a time."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from ..cpu.codesum import prefetch_rows
from ..cpu.epilogue import GROUP
from ..cpu.simd import (
    peek,
    vcast,
    vlive,
    vload,
    vload_first,
    vload_parts,
    vpositive,
    vrun_sum,
    vsplat,
    vspread,
    vstore,
    vstore_first,
    vstore_parts,
)

__all__ = ["SUMS", "copy_row", "pair_logits"]

SUMS = 16  # logits that are added up together: those of some edges, all their heads
LANES = SUMS * GROUP


@njit(forceinline=True)
def copy_row(source, at, features, target):
    """Copy a row to where whole vectors may be read past its end."""
    for f in range(0, features, GROUP):
        vstore_first(target, f, vload_first(source, at + f, GROUP, features - f), features - f)


@njit(forceinline=True)
def pair_logits(
    col, low, high, final, heads, multiplier, multiplied, one, logits, factors, exact, parts, pair
):  # fmt: skip
    """``<att, LeakyReLU(x^_j + target)>`` and the multipliers of the sources of some edges, for each edge and head.

    ``pair`` has the packed rows, rows of :func:`copy_row`, and buffers: ``products`` of ``pitch`` numbers for each edge
    of a group, ``partial`` of sixteen for each of its sums.
    """
    words, stride, tiles, lanes, width, scale, offset, att, target, slope, zero, codes, products, pitch, partial = pair
    group = SUMS // heads
    for first in range(low, high, group):
        for q in range(group):
            e = min(first + q, high - 1)
            source, factor = np.int64(peek(col, e)), np.int32(1)
            if multiplied:
                factor = np.int32(peek(multiplier, source))
                vstore(factors, (first + q - low) * heads, vsplat(factor, one))
            for t in range(tiles):
                tile, at = t * lanes, 4 * t * lanes
                prefetch_rows(words, stride, tile, lanes, col, final, e, 1)
                row = vload_first(words, source * stride + tile, zero, vlive(stride - tile, exact))
                x = vcast(vspread(row, codes), "f32")
                step = vload_parts(scale, at, 4 * stride, x, parts)
                lower = vload_parts(offset, at, 4 * stride, x, parts)
                if multiplied:
                    times = vsplat(np.float32(factor), x)
                    step, lower = step * times, lower * times
                z = (x * step + lower) + vload_parts(target, at, 4 * stride, x, parts)
                z = vpositive(z, z, z * vsplat(slope, z)) * vload_parts(att, at, 4 * stride, x, parts)
                vstore_parts(products, q * pitch + at, 4 * stride, z, parts, vlive(4 * (stride - tile), exact))
        for k in range(SUMS):
            at, whole = k // heads * pitch + k % heads * width, width - width % GROUP
            total = vload_first(products, at + whole, GROUP, width - whole)
            for f in range(0, whole, GROUP):
                total = total + vload(products, at + f, GROUP)
            vstore(partial, k * GROUP, total)
        vstore(logits, (first - low) * heads, vrun_sum(vload(partial, 0, LANES), vsplat(np.float32(0), SUMS)))
