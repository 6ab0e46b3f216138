"""Host side of range arguments."""

from __future__ import annotations

from torch import Tensor

from ..arithmetic import is_per_row

__all__ = ["range_kind"]

# The values of bits.ONE, bits.COLUMN and bits.ROW.
_ONE, _COLUMN, _ROW = 0, 1, 2


def range_kind(value: Tensor | None) -> int:
    """Which of the kinds a kernel distinguishes a range tensor is; one element where there is
    none.
    """
    if value is None or value.numel() == 1:
        return _ONE
    return _ROW if is_per_row(value) else _COLUMN
