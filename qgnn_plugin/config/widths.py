"""Widths of codes."""

from __future__ import annotations

from ..kernels.layout import PACKED_BITS

__all__ = ["BITS", "MULTILEVEL_BITS", "OFF", "shown_widths"]

OFF = 32  # not quantized
BITS = (*PACKED_BITS, OFF)
MULTILEVEL_BITS = BITS[1:]  # of what two levels cannot hold: attention numerators, gap messages, states


def shown_widths(widths: tuple[int, ...] = BITS) -> str:
    """Widths as errors name them."""
    return f"{', '.join(map(str, widths[:-1]))} or {OFF} = off"
