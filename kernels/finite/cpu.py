"""Finite floats, by their exponents."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import carray

from ..cpu import jit
from ..cpu.address import at

__all__ = ["all_finite"]

EXPONENT = np.int32(0x7F800000)  # all ones in what is not finite


@jit.kernel
def all_finite(address, count):
    """Whether ``count`` floats at ``address`` are finite."""
    words = carray(at(address, np.int32), (count,))
    bad = 0
    for i in range(count):
        bad += (words[i] & EXPONENT) == EXPONENT
    return bad == 0
