"""Plans of graphs that layers make anew in every call: found again by what they hold."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ...graph.edges import edges_of
from ...graph.fixed import cached
from ...kernels.checksum import checksum
from ...kernels.plan import GraphPlan

__all__ = ["found_by_contents", "plan_of"]

CAPACITY = 128  # several relations in each of several layers


class _Plans:
    """What was used last, by checksum: a graph of a relation, or one with self-loops, is new memory in every call."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.lock = capacity, Lock()
        self.entries: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def get(self, key: tuple[Any, ...]) -> Any:
        with self.lock:
            plan = self.entries.get(key)
            if plan is not None:
                self.entries.move_to_end(key)
            return plan

    def put(self, key: tuple[Any, ...], plan: Any) -> None:
        with self.lock:
            self.entries[key] = plan
            while len(self.entries) > self.capacity:
                self.entries.popitem(last=False)


_plans = _Plans(CAPACITY)


def plan_of(edge_index: Tensor, size: tuple[int, int], flow: str) -> GraphPlan:
    """The plan of edges, or of a sparse matrix, without values; the same object while the edges hold the same.

    Raises:
        TypeError, ValueError: If these are no edges between ``size`` sources and targets.
    """

    def build() -> GraphPlan:
        edges = edges_of(edge_index, None, flow, size)
        return GraphPlan.from_edges(edges.src, edges.dst, *size)

    return found_by_contents((edge_index,), ("messages", size, flow), build)


def found_by_contents(tensors: tuple[Tensor, ...], key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
    """What ``build()`` derives from ``tensors``: the same object for whatever tensors that hold the same.

    On an accelerator, where a checksum would wait for the device, of the same memory.
    """
    if any(t.device.type != "cpu" or t.layout is not torch.strided for t in tensors):
        return cached(tensors, key, build)
    held = tuple((checksum(t), tuple(t.shape), t.dtype) for t in tensors)
    found = _plans.get((key, held))
    if found is None:
        found = build()
        _plans.put((key, held), found)
    return found


def _renew_lock() -> None:
    _plans.lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
