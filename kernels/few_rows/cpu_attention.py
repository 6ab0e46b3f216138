"""GAT's attention over messages of few rows: ``attention_aggregate`` at a fraction of its time around the kernel.

What a call passes besides what changes is made once, and everything between the product and the sum lies in one piece
of memory, so that no tensor is made, viewed or checked.
"""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from ..attention_aggregate.cpu import BLOCK_FLOATS, are_bytes
from ..attention_aggregate.cpu_sums import gat_kernel, head_groups, numerator_levels, tile_lanes
from ..cpu.bytedot import permutes
from ..cpu.epilogue import HAS_BIAS
from ..head_dots.cpu import dot_rows
from ..layout import row_words, top_code
from . import Range, whole_lines
from .cpu import HEADER
from .cpu_rows import Rows

__all__ = ["NeighbourAttention", "neighbour_attention"]

_NO_FLOATS, _NO_BYTES = np.empty(0, np.float32), np.empty(0, np.uint8)


class NeighbourAttention:
    """Rows packed as a message, their logits' terms, and the sum that quantized attention weights.

    Args:
        width: Features of a row, those of all heads side by side.
        out: Range of the messages.
        heads: 1, 2, 4, 8 or 16.
        attention_bits: Width of the numerators, 2, 4 or 8.
        slope: Of the negative side of LeakyReLU.
        concat: Whether heads stay side by side; their mean otherwise.
    """

    __slots__ = (
        "block", "concat", "fixed", "heads", "kernel", "levels", "packed", "slope", "step", "step_at", "stride",
        "width",
    )  # fmt: skip

    def __init__(self, width: int, out: Range, heads: int, attention_bits: int, slope: float, concat: bool) -> None:
        self.packed, self.width, self.heads, self.concat = Rows(width, out), width, heads, concat
        self.stride, self.slope = row_words(width, out.bits), np.float32(slope)
        top, multiplied = top_code(attention_bits), out.unit is not None
        lanes = tile_lanes(self.stride, out.bits, top, multiplied)
        self.fixed = head_groups(width, out.bits, heads, lanes)
        exact = int(self.stride % lanes == 0)
        self.kernel = gat_kernel(out.bits, heads, lanes, exact, top, multiplied)
        self.levels, self.block = numerator_levels(attention_bits), max(1, BLOCK_FLOATS // width)
        self.step, self.step_at = _NO_FLOATS, 0

    def room(self, rows: int) -> int:
        """Bytes of memory that a call takes: floats ``[rows, width]`` first, which are there before it."""
        return self._message(rows) + whole_lines(self.packed.room(rows)) + 8 * rows * self.heads

    def _message(self, rows: int) -> int:
        return whole_lines(4 * rows * self.width)

    def _steps(self) -> np.ndarray:
        """The step of each feature, read where it is."""
        place = self.packed.places[0]
        if place != self.step_at:
            self.step, self.step_at = self.packed.tensors[0].detach().view(1).numpy(), place
        return np.full(self.width, self.step[0], np.float32)

    def __call__(self, memory, at, rows, graph, src_at, dst_at, out_at, bias_at=0) -> bool:
        """Write the result at ``out_at``, float32 ``[rows, width]`` or ``[rows, width / heads]``; whether the rows are
        finite.

        Args:
            memory: :meth:`room` bytes, which start with the rows.
            at: Its address.
            rows: How many.
            graph: A :class:`~qgnn_plugin.kernels.edge_order.few.FewEdges`.
            src_at, dst_at: Vectors of the logits, float32 ``[heads, width / heads]``.
            out_at: Where the result goes.
            bias_at: Float32, as wide as the result; or 0.
        """
        width, heads = self.width, self.heads
        start = self._message(rows)
        terms = start + whole_lines(self.packed.room(rows))
        if not self.packed(at, rows, at + start):
            return False
        size = 4 * rows * heads
        for vector, place in ((src_at, terms), (dst_at, terms + size)):
            dot_rows(at, 0, rows, rows, width // heads, heads, vector, 1, at + place)
        lower, words = memory[start : start + 4].view(np.float32), start + HEADER
        multipliers = words + 4 * rows * self.stride
        unit = self.packed.places[2]
        result = width if self.concat else width // heads
        closed = (
            rows, result, 0, HAS_BIAS if bias_at else 0, out_at, 0, 0, 0, 0, 0, 0, 0, bias_at,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        rowptr, col = graph.arrays
        self.kernel(
            memory[words:multipliers].view(np.int32), self.stride, rowptr, col, width, *self.fixed, self.slope,
            (
                memory[terms : terms + size].view(np.float32),
                memory[terms + size : terms + 2 * size].view(np.float32),
                _NO_FLOATS,
            ),
            memory[multipliers : multipliers + rows] if unit else _NO_BYTES, self.levels, self._steps(),
            np.full(width, lower[0], np.float32), self.concat, closed, self.block, 0, graph.bounds,
            np.zeros(1, np.int64),
        )  # fmt: skip
        return True


def neighbour_attention(
    width: int, out: Range, heads: int, attention_bits: int, slope: float, concat: bool
) -> NeighbourAttention | None:
    """A :class:`NeighbourAttention`; :obj:`None` for what its kernel does not compute."""
    if not are_bytes(out.bits, attention_bits, heads):
        return None
    made = NeighbourAttention(width, out, heads, attention_bits, slope, concat)
    return made if made.fixed[1] is None or permutes() else None
