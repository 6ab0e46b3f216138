"""Runs parts of a record in torch: what belongs to sources, targets, edges or rows, for all of them at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..packing.lazy.deferred import materialized
from ..packing.lazy.producers import gathered, row_blocks
from .marks import LINEAR
from .spaces import CONST, EDGE, KERNEL, ROW, SOURCE, TARGET, Spaces, fill_value, reduction_of
from .trace import Trace

__all__ = ["Values"]

aten = torch.ops.aten


class Values:
    """The values of a record's operations in one call.

    Args:
        record: What was recorded.
        sorted_: Where its operations are computed.
        inputs: What each input holds in this call: all rows of sources, targets and edges.
        counts: Number of sources, targets and edges.
        degree: ``[num_dst]`` float32.
    """

    def __init__(
        self, record: Trace, sorted_: Spaces, inputs: dict[fx.Node, Tensor], counts: dict[str, int], degree: Tensor
    ) -> None:
        self.record, self.sorted, self.spaces = record, sorted_, sorted_.of
        self.counts, self.degree = counts, degree
        self.known: dict[fx.Node, Any] = dict(inputs)
        self.found: dict[Any, Any] = {}
        self.own: set[fx.Node] = set()

    def put(self, node: fx.Node, value: Tensor, is_own: bool = False) -> None:
        """What a kernel has computed; ``is_own`` where nothing else is in its memory, which may be written over."""
        self.known[node] = value
        if is_own:
            self.own.add(node)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, computed once per call."""
        if key not in self.found:
            self.found[key] = compute()
        return self.found[key]

    def __getitem__(self, node: fx.Node) -> Any:
        if node not in self.known:
            for earlier in _needed(node, self.known, self._reads):
                self.known[earlier] = self._compute(earlier)
        value = self.known[node]
        if callable(value) and not isinstance(value, Tensor):  # an input that is only unpacked where it is needed
            value = self.known[node] = value()
        return value

    def last(self, node: fx.Node) -> Any:
        """The value of ``node``, after which no other is asked for: each is let go of once nothing needs it."""
        order = self.left_to(node)
        if self._is_by_rows(node, order):
            return self._by_rows(node)
        left = Counter(arg for later in order for arg in self._reads(later))
        left[node] += 1
        self.found.clear()
        for known in [known for known in self.known if not left[known]]:
            del self.known[known]
        for later in order:
            first: Any = later.args[0] if later.args else None
            in_place = later.target is aten.div.Tensor and first in self.own and left[first] == 1
            if in_place and self.record.shapes[later] == self.record.shapes[first]:
                self.known[later] = self[first].div_(self[later.args[1]])  # type: ignore[index]
            else:
                self.known[later] = self._compute(later)
            for arg in self._reads(later):
                left[arg] -= 1
                if not left[arg]:
                    del self.known[arg]
        return self[node]

    # -- by rows --------------------------------------------------------------------------------------------------

    def left_to(self, node: fx.Node) -> list[fx.Node]:
        """The operations that ``node`` follows from and that are not computed yet, itself included, in order."""
        orders, key = self.sorted.orders, (node, frozenset(self.known))
        if key not in orders:  # which are few: what is known of a record is the same in each call, and each block of it
            orders[key] = _needed(node, self.known, self._reads)
        return orders[key]

    def are_row_wise(self, order: list[fx.Node]) -> bool:
        """Whether each row has of these operations what it would have alone."""
        return all(self.spaces[later] == CONST or self.sorted.is_row_wise(later) for later in order)

    def rows(self, node: fx.Node, rows: slice) -> Values:
        """What ``node`` follows from, of some rows alone; what all rows share is computed for all of them at once."""
        shared, own = self.once(("left", node), lambda: self._left(node))
        known = shared | {arg: self[arg][rows] for arg in own}
        counts = self.counts | {TARGET: rows.stop - rows.start}
        part = Values(self.record, self.sorted, known, counts, self.degree[rows])
        part.own = self.own
        return part

    def _left(self, node: fx.Node) -> tuple[dict[fx.Node, Any], list[fx.Node]]:
        """Of what ``node`` follows from, the values that all rows share, and what is known of each row."""
        reads = {arg for later in self.left_to(node) for arg in (later, *self._reads(later))}
        shared = {arg: self[arg] for arg in reads if self.spaces[arg] == CONST}
        return shared, [arg for arg in reads if arg in self.known and self.spaces[arg] in (ROW, KERNEL)]

    def _is_by_rows(self, node: fx.Node, order: list[fx.Node]) -> bool:
        """Whether :meth:`last` takes several blocks of rows: where the result is wider than what it is made of."""
        if len(self._row_blocks(node)) < 2:
            return False
        shapes = self.record.shapes
        inner = [math.prod(shapes[arg][1:]) for later in order for arg in self._reads(later) if arg in self.known]
        return bool(inner) and math.prod(shapes[node][1:]) > max(inner) and self.are_row_wise(order)

    def _by_rows(self, node: fx.Node) -> Tensor:
        blocks = self._row_blocks(node)
        return gathered(self.counts[TARGET], ((rows, self.rows(node, rows).last(node)) for rows in blocks))

    def _row_blocks(self, node: fx.Node) -> list[slice]:
        numbers = math.prod(self.record.shapes[node][1:])
        return list(row_blocks(self.counts[TARGET], numbers, self.degree.device))

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """What the value of ``node`` is computed from, each once."""
        reads = self.sorted.reads
        if node not in reads:
            reads[node] = list(dict.fromkeys(self._read_by(node)))
        return reads[node]

    def _read_by(self, node: fx.Node) -> list[fx.Node]:
        if fill_value(node) is not None:
            return []
        if reduction_of(node) is not None:  # of ones: degrees
            return []
        if self.spaces[node] == TARGET and self._is_lifted(node):
            return [node.args[0]]  # type: ignore[list-item]
        return list(node.all_input_nodes)

    def _is_lifted(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        return isinstance(source, fx.Node) and self.spaces.get(source) == ROW

    def _rows(self, node: fx.Node) -> dict[int, int]:
        """Numbers of rows while recording, and in this call."""
        space, record = self.spaces[node], self.record
        if space in (SOURCE, TARGET, EDGE):
            return {record.edges: self.counts[space]}
        return {record.targets: self.counts[TARGET]}

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return getattr(self.record.module, str(node.target)).detach()
        filled, rows = fill_value(node), self._rows(node)
        if filled is not None:
            shape = [rows.get(n, n) for n in self.record.shapes[node]]
            return torch.full(shape, filled, dtype=self.record.dtypes[node], device=self.degree.device)
        if reduction_of(node) is not None:
            share = fill_value(node.args[3])  # type: ignore[arg-type]
            assert share is not None
            rest = self.record.shapes[node][1:]
            return (self.degree * share).view(-1, *(1 for _ in rest)).expand(-1, *rest)
        if self.spaces[node] == TARGET and self._is_lifted(node):
            return self[node.args[0]]  # type: ignore[index]
        args: Any = fx.node.map_arg(node.args, lambda arg: self[arg])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda arg: self[arg])
        if node.target is LINEAR:
            return materialized(self.record.linears[args[1]](args[0].contiguous()))
        if self.spaces[node] != CONST:
            args = fx.node.map_aggregate(args, lambda a: rows.get(a, a) if type(a) is int else a)
        if node.target is aten.view.default:
            return args[0].reshape(args[1])
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _needed(node: fx.Node, known: dict[fx.Node, Any], reads: Any) -> list[fx.Node]:
    """The operations that ``node`` follows from, itself included, in an order to compute them."""
    order: list[fx.Node] = []
    stack = [(node, False)]
    seen = set(known)
    while stack:
        current, ready = stack.pop()
        if ready:
            order.append(current)
        elif current not in seen:
            seen.add(current)
            stack.append((current, True))
            stack += [(arg, False) for arg in reads(current)]
    return order
