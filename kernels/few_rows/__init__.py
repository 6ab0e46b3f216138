"""Layers of few rows on the CPU, by compiled calls that take addresses, past checks and dispatcher.

What these make is to be called where :func:`..backend.is_direct` holds and numba is there, with tensors that are of the
CPU, contiguous, and of the shapes and dtypes described; see :mod:`.cpu`, :mod:`.cpu_rows`,
:mod:`.cpu_neighbours` and :mod:`.cpu_attention`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import Tensor

from ..cpu.memory import ALIGNMENT

__all__ = ["Range", "few_rows_linear", "few_rows_packed", "neighbour_attention", "neighbour_sums", "whole_lines"]


def whole_lines(size: int) -> int:
    """``size`` bytes, and those that are left of the last one's cache line."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


class Range(NamedTuple):
    """A range of codes whose numbers are read in each call.

    Args:
        bits: Width of a code: 1, 2, 4 or 8.
        scale: The step, one element, float32.
        lower: The lower end, one element; or the code that stands for zero.
        unit: What row multipliers count, one element; :obj:`None` where rows have none.
    """

    bits: int
    scale: Tensor
    lower: Tensor | float
    unit: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Step, lower end and unit, :obj:`None` where there is no tensor."""
        return self.scale, self.lower if isinstance(self.lower, Tensor) else None, self.unit

    @property
    def zero(self) -> float:
        """The code that stands for zero, where the lower end follows from it; else 0."""
        return 0.0 if isinstance(self.lower, Tensor) else float(self.lower)


def few_rows_linear(
    words: Tensor,
    scale: Tensor,
    lower: Tensor | float,
    num_in: int,
    bits: int,
    taken: Range,
    bias: Tensor | None,
    out: Range | None = None,
) -> Any:
    """A :class:`.cpu.Dense`: quantized, multiplied by a weight, and finished, as floats or as a message."""
    module = importlib.import_module(f"{__package__}.cpu")
    return module.Dense(words, scale, lower, num_in, bits, taken, bias, out)


def few_rows_packed(width: int, out: Range, epsilon: Tensor | None = None) -> Any:
    """A :class:`.cpu_rows.Rows`: rows as a message."""
    return importlib.import_module(f"{__package__}.cpu_rows").Rows(width, out, epsilon)


def neighbour_sums(width: int, bits: int) -> Any:
    """A :class:`.cpu_neighbours.NeighbourSums`: messages summed over neighbours."""
    return importlib.import_module(f"{__package__}.cpu_neighbours").NeighbourSums(width, bits)


def neighbour_attention(width: int, out: Range, heads: int, attention_bits: int, slope: float, concat: bool) -> Any:
    """A :class:`.cpu_attention.NeighbourAttention`: rows packed and summed by attention; :obj:`None` where its kernel
    has no such widths or heads.
    """
    module = importlib.import_module(f"{__package__}.cpu_attention")
    return module.neighbour_attention(width, out, heads, attention_bits, slope, concat)
