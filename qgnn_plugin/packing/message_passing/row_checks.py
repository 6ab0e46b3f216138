"""Whether a layer's functions treat every row for itself, and may be run by blocks of rows (:mod:`.row_blocks`).

A few made-up rows are computed together and apart, and compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn.aggr import Aggregation, GRUAggregation, LCMAggregation, LSTMAggregation

from .call import NotByRows, Propagation
from .row_blocks import Edges, RowBlocks, Runner, expect_per_edge, not_alone, parts_of, row_dim, widest

__all__ = ["TOLERANCE", "check_rows"]

SAMPLE_DEGREES = (1, 3, 0, 7, 2, 0, 24, 5, 1, 40, 0, 13)  # of the made-up rows
TOLERANCE = 1e-4  # of the largest result: functions of blocks may round otherwise

# Sequences of neighbours are padded to the longest of all rows, and the padding counts.
PADDED = (LSTMAggregation, GRUAggregation, LCMAggregation)


def check_rows(call: Propagation) -> RowBlocks:
    """How the calls of this form are cut, after a look at whether the layer's functions treat every row for itself.

    A few of the call's edges are given to made-up rows of very different degrees, and computed together and apart.

    Raises:
        NotByRows: If that makes a difference.
    """
    for module in call.layer.modules() if "aggregate" in call.stages else ():
        if isinstance(module, PADDED) and isinstance(module, Aggregation):
            raise NotByRows(f"{type(module).__name__} pads the neighbours of a node to those of all nodes")
    whole = _sample(call)
    cut = len(SAMPLE_DEGREES) // 2
    runner = Runner(call)
    with not_alone(runner):
        together = runner(whole)
        written = runner.written()
        apart = [runner(part) for part in _split(whole, cut)]
    for name, value in written.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != whole.count:
            raise NotByRows(f"its functions write '{name}', which is not one entry per edge")
    _compare(call, whole, together, apart, cut)
    return RowBlocks(max(widest(call), runner.width), tuple(written))


def _sample(call: Propagation) -> Edges:
    """Edges from all over the graph as those of a few rows."""
    plan = call.plan
    degrees = torch.tensor(SAMPLE_DEGREES, device=plan.device)
    count = int(degrees.sum())
    positions = torch.linspace(0, plan.num_edges - 1, count, device=plan.device).long()
    index = torch.repeat_interleave(torch.arange(degrees.numel(), device=plan.device), degrees)
    return Edges(positions, plan.col[positions].long(), plan.dst[positions], index, degrees.numel())


def _split(whole: Edges, cut: int) -> list[Edges]:
    """The first ``cut`` rows, and the others."""
    assert isinstance(whole.positions, Tensor)
    first = whole.index < cut
    parts = []
    for mask, start, rows in ((first, 0, cut), (~first, cut, whole.num_rows - cut)):
        parts.append(
            Edges(
                whole.positions[mask], whole.sources[mask], whole.targets[mask], whole.index[mask] - start, rows
            )
        )  # fmt: skip
    return parts


def _compare(call: Propagation, whole: Edges, together: Any, apart: list[Any], cut: int) -> None:
    """Raise where the results of the rows before ``cut`` and of the others are not those of all, in their order."""
    by_rows = "aggregate" in call.stages
    parts, others = parts_of(together)[0], [parts_of(out)[0] for out in apart]
    if not by_rows:
        expect_per_edge(parts, whole.count)
    first = cut if by_rows else int((whole.index < cut).sum())
    halves = [first, (whole.num_rows if by_rows else whole.count) - first]
    for k, value in enumerate(parts):
        dim = row_dim(call, value, whole.num_rows) if by_rows else 0
        for part, expected in zip(others, value.split(halves, dim), strict=True):
            if not _agree(part[k], expected):
                raise NotByRows("its functions look across rows")


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    usual = expected[expected.isfinite()]
    peak = float(usual.abs().max()) if usual.numel() else 0.0
    return bool(torch.isclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * peak, equal_nan=True).all())
