"""Sums of messages over neighbours, from addresses: ``multiplied.sum_kernel`` at a fraction of its time on few rows."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from ..cpu.epilogue import HAS_ADDEND, HAS_BIAS, HAS_DST
from ..cpu.multiplied import BLOCK_FLOATS, multiplied_lanes, sum_kernel
from ..layout import row_words
from .cpu import HEADER

__all__ = ["NeighbourSums"]


class NeighbourSums:
    """``t_i (s sum_j m_j c_j + l sum_j m_j) + b + a_i`` over the neighbours ``j`` of ``i``.

    Args:
        width: Features of a message.
        bits: Width of its codes.
    """

    __slots__ = ("block", "kernel", "stride", "width")

    def __init__(self, width: int, bits: int) -> None:
        self.width, self.stride = width, row_words(width, bits)
        lanes = multiplied_lanes(self.stride, bits)
        self.kernel = sum_kernel(bits, lanes, int(self.stride % lanes == 0))
        self.block = max(1, BLOCK_FLOATS // width)

    def __call__(
        self, message_at: int, scale_at: int, graph, out_at: int, dst_at: int = 0, bias_at: int = 0, addend_at: int = 0
    ) -> None:
        """Write the sums at ``out_at``, float32 ``[num_dst, width]``.

        Args:
            message_at: What :class:`.cpu_rows.Rows` or :class:`.cpu.Dense` wrote, of all sources.
            scale_at: Step of its range.
            graph: A :class:`~qgnn_plugin.kernels.edge_order.few.FewEdges`.
            out_at: Where the result goes.
            dst_at: A factor of each row, float32 ``[num_dst]``; or 0.
            bias_at: Float32 ``[width]``; or 0.
            addend_at: Float32 ``[num_dst, width]``, which may be ``out_at``; or 0.
        """
        words_at = message_at + HEADER
        flags = (HAS_DST if dst_at else 0) | (HAS_BIAS if bias_at else 0) | (HAS_ADDEND if addend_at else 0)
        closed = (
            graph.num_dst, self.width, 0, flags, out_at, 0, 0, scale_at, 1, message_at, 1, 0, bias_at,
            0, 0, 0, 0, 0, dst_at, 1, 0, 0, 0, addend_at, 0,
        )  # fmt: skip
        multiplier_at = words_at + 4 * self.stride * graph.num_src
        self.kernel(
            words_at, self.stride, graph.rowptr_at, graph.col_at, graph.num_edges - 1, multiplier_at, closed,
            self.block, 0, graph.bounds, np.zeros(1, np.int64),
        )  # fmt: skip
