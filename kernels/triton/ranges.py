"""Host side of range arguments."""

from __future__ import annotations

from torch import Tensor

from ..arithmetic import is_per_row

__all__ = ["range_kind"]

# The values of bits.ONE, bits.COLUMN, bits.ROW and bits.HEAD.
_ONE, _COLUMN, _ROW, _HEAD = 0, 1, 2, 3


def range_kind(value: Tensor | None) -> int:
    """Which of the kinds a kernel distinguishes a range tensor is; one element where there is
    none.
    """
    if value is None or value.numel() == 1:
        return _ONE
    if is_per_row(value):
        return _ROW if value.size(1) == 1 else _HEAD
    return _COLUMN
