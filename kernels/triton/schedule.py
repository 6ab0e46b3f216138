"""The order in which programs walk the rows of a graph, and the split of its hubs.

Rows are sorted by degree, so that rows which share a program are equally long and the longest
start first.  A row of more than ``segment`` edges is a *hub*: its edges are cut into segments that
are rows of their own, with partial results in scratch memory that a second stage adds up in a fixed
order.  Results therefore depend neither on timing nor on the launch configuration where sums are
integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..indices import is_capturing
from ..plan import PlanCache

__all__ = ["ROW_ALIGNMENT", "Schedule", "build_schedule", "schedule_for"]

ROW_ALIGNMENT = 256  # segments are padded to this, so that no program mixes segments and whole rows
MAX_SEGMENT = 256  # sums of 256 8-bit codes fit 16 bits


class Schedule(NamedTuple):
    """Work items: ``num_partial`` hub segments (padded with empty ones), then whole rows.

    Attributes:
        row: ``[I]`` int32, destination row.
        begin: ``[I]`` int64, first edge.
        length: ``[I]`` int32, number of edges; descending within segments and within rows.
        slot: ``[num_partial]`` int32, where a segment's partial result goes; consecutive per hub.
        hub_row, hub_first, hub_count: ``[num_hubs]`` int32, row, first slot and number of slots.
        num_partial: Number of segments, padded to a multiple of ``ROW_ALIGNMENT``.
    """

    row: Tensor
    begin: Tensor
    length: Tensor
    slot: Tensor
    hub_row: Tensor
    hub_first: Tensor
    hub_count: Tensor
    num_partial: int

    @property
    def num_items(self) -> int:
        return self.row.numel()

    @property
    def num_hubs(self) -> int:
        return self.hub_row.numel()


_cache = PlanCache(capacity=64)


def schedule_for(rowptr: Tensor, segment: int) -> Schedule:
    """The schedule of a graph, built once and cached by the identity of ``rowptr``."""

    def build() -> Schedule:
        if is_capturing(rowptr):
            raise RuntimeError(
                "Expected the graph's schedule to exist before CUDA graph capture (got a new "
                "graph); run the model once before capturing it"
            )
        return build_schedule(rowptr, segment)

    return _cache.get((rowptr,), ("schedule", segment), build)


def build_schedule(rowptr: Tensor, segment: int) -> Schedule:
    """Sort the rows of ``rowptr`` (``[num_rows + 1]`` int64) and split those longer than
    ``segment``.
    """
    if not 1 <= segment <= MAX_SEGMENT:
        raise ValueError(f"Expected 'segment' between 1 and {MAX_SEGMENT} (got {segment})")
    degree = rowptr[1:] - rowptr[:-1]
    is_hub = degree > segment
    hub_row = is_hub.nonzero().view(-1)
    count = (degree[hub_row] + segment - 1) // segment
    first = torch.cumsum(count, 0) - count
    slots = torch.repeat_interleave(torch.arange(hub_row.numel(), device=rowptr.device), count)
    index = torch.arange(slots.numel(), device=rowptr.device) - first[slots]
    row = hub_row[slots]
    begin = rowptr[row] + index * segment
    length = torch.minimum(rowptr[row + 1] - begin, torch.full_like(begin, segment))
    slot = torch.argsort(length, descending=True, stable=True)
    padding = -slots.numel() % ROW_ALIGNMENT

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(padding)])

    light = (~is_hub).nonzero().view(-1)
    light = light[torch.argsort(degree[light], descending=True, stable=True)]
    return Schedule(
        row=torch.cat([padded(row[slot]), light]).to(torch.int32),
        begin=torch.cat([padded(begin[slot]), rowptr[light]]),
        length=torch.cat([padded(length[slot]), degree[light]]).to(torch.int32),
        slot=torch.cat([slot, torch.arange(slots.numel(), slots.numel() + padding, device=rowptr.device)]).to(
            torch.int32
        ),
        hub_row=hub_row.to(torch.int32),
        hub_first=first.to(torch.int32),
        hub_count=count.to(torch.int32),
        num_partial=slots.numel() + padding,
    )
