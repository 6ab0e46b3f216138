"""Dot products of the heads of a row with some vectors, from where the row lies, sixteen features at a time."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from ..arithmetic import DOT_LANES
from .simd import vfold_sum, vlanes, vload, vload_first, vsplat, vstore

__all__ = ["dot_row"]


@njit(forceinline=True)
def dot_row(x, at, width, heads, vectors, count, out, to, step):
    """``out[to + v step + h] = <x_h, a_vh>`` of the row at ``x[at]``, heads ``width`` long, for ``count`` vectors."""
    one = vlanes("f32", 1)
    whole = width - width % DOT_LANES
    for v in range(count):
        vector = v * heads * width
        for h in range(heads):
            begin = h * width
            total = vsplat(np.float32(0), DOT_LANES)
            for f in range(begin, begin + whole, DOT_LANES):
                total = total + vload(x, at + f, DOT_LANES) * vload(vectors, vector + f, DOT_LANES)
            if whole < width:
                f, left = begin + whole, width - whole
                y = vload_first(x, at + f, DOT_LANES, left)
                total = total + y * vload_first(vectors, vector + f, DOT_LANES, left)
            vstore(out, to + v * step + h, vfold_sum(total, one))
