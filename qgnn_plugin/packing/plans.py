"""Plans of graphs that layers make anew in every call: found again by what they hold."""

from __future__ import annotations

import os
from collections import OrderedDict
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..kernels.checksum import checksum
from ..kernels.plan import GraphPlan
from ..layers.edges import edges_of
from ..layers.fixed import cached

__all__ = ["plan_of"]

CAPACITY = 128  # several relations in each of several layers


class _Plans:
    """The plans used last, by checksum: a graph of a relation, or one with self-loops, is new memory in every call."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.lock = capacity, Lock()
        self.entries: OrderedDict[tuple[Any, ...], GraphPlan] = OrderedDict()

    def get(self, key: tuple[Any, ...]) -> GraphPlan | None:
        with self.lock:
            plan = self.entries.get(key)
            if plan is not None:
                self.entries.move_to_end(key)
            return plan

    def put(self, key: tuple[Any, ...], plan: GraphPlan) -> None:
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

    if edge_index.device.type != "cpu" or edge_index.layout is not torch.strided:
        return cached((edge_index,), ("messages", size, flow), build)
    key = (checksum(edge_index), tuple(edge_index.shape), edge_index.dtype, size, flow)
    plan = _plans.get(key)
    if plan is None:
        plan = build()
        _plans.put(key, plan)
    return plan


def _renew_lock() -> None:
    _plans.lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
