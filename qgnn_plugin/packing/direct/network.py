"""The short way through a network: linear layers with ReLU between them, without a matrix of their own for each."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ...kernels.few_rows import whole_lines
from ..layers.few_rows import ROW_COST, direct_call, is_few, is_shared
from ..layers.linear import PackedLinear

__all__ = ["Steps", "direct_steps"]


class Steps(NamedTuple):
    """Maps of few rows, one after another.

    Args:
        maps: Each with the width of its result, and whether ReLU follows.
        width: Of the last result.
    """

    maps: list[tuple[Any, int, bool]]
    width: int

    def room(self, rows: int) -> int:
        """Bytes of what is between the maps."""
        return sum([whole_lines(4 * rows * width) for _, width, _ in self.maps[:-1]])

    def __call__(self, x_at: int, rows: int, between_at: int, out_at: int) -> bool:
        """Write the result for ``rows`` float32 rows at ``x_at`` to ``out_at``, with :meth:`room` bytes at
        ``between_at``; whether all on the way is finite.
        """
        *inner, last = self.maps
        for call, width, relu in inner:
            if not call(x_at, rows, between_at, relu=relu):
                return False
            x_at, between_at = between_at, between_at + whole_lines(4 * rows * width)
        call, _, relu = last
        done: bool = call(x_at, rows, out_at, relu=relu)
        return done


def direct_steps(network: Any, rows: int, width: int) -> Steps | None:
    """The ``network`` of ``rows`` rows of ``width`` features; :obj:`None` where that is for its own ``forward``.

    To be called where :func:`..layers.few_rows.is_plain_call` holds of the layer that has it.
    """
    if type(network) is not nn.Sequential or network._forward_hooks or network._forward_pre_hooks:
        return None
    maps: list[tuple[Any, int, bool]] = []
    for child in network._modules.values():
        if child is None or child.training or child._forward_hooks or child._forward_pre_hooks:
            return None
        if type(child) is nn.ReLU and maps:
            maps[-1] = (*maps[-1][:2], True)
            continue
        if not isinstance(child, PackedLinear) or child._is_seen or child._num_in != width:
            return None
        call, width = direct_call(child), child._num_out
        if call is None or not is_few(rows * width) or is_shared(rows * (1 + child._num_in * width // ROW_COST)):
            return None
        maps.append((call, width, False))
    return Steps(maps, width) if maps else None
