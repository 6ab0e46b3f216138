"""Sorts the operations of a record: what is computed once, per source, target or edge, in the kernel, or per row."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .marks import LINEAR
from .shadow import NotTraceable
from .trace import Trace

__all__ = ["SHAPED", "Spaces", "fill_value", "reduction_of"]

aten = torch.ops.aten

# Where an operation is computed: once, per source, target or edge, by the kernel for each edge, per row beforehand, per
# row after the kernel, or not at all (indices).
CONST, SOURCE, TARGET, EDGE, MIXED, ROW, KERNEL, INDEX, SOURCE_INDEX = (
    "const", "source", "target", "edge", "mixed", "row", "kernel", "index", "source index",
)  # fmt: skip
OF_EDGES = (SOURCE, TARGET, EDGE, MIXED)

# Operations on the dimensions after the first.
SHAPED = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.expand.default, aten.alias.default, aten.detach.default, aten.clone.default,
    aten._to_copy.default, aten.lift_fresh_copy.default,
}  # fmt: skip
_CHOSEN = {aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
_SUMMED = {aten.sum.dim_IntList, aten.mean.dim, aten._softmax.default, aten.amax.default, aten.amin.default}
_JOINED = {aten.cat.default, aten.stack.default}
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.matmul.default, LINEAR}
_FILLED = {
    aten.new_zeros.default: 0.0, aten.new_ones.default: 1.0, aten.zeros.default: 0.0, aten.ones.default: 1.0,
    aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0,
}  # fmt: skip
_SELECTED = {aten.index_select.default, aten.index.Tensor, aten.embedding.default}
_SCATTERED = {aten.scatter_add.default: "sum", aten.scatter_reduce.two: ""}
_REDUCED = {"sum": "sum", "amax": "max", "amin": "min"}


def fill_value(node: fx.Node) -> float | None:
    """The number that a tensor is filled with; :obj:`None` where it is not."""
    if "filled" not in node.meta:  # told once: comparing operations takes its time, and calls ask again and again
        target: Any = node.target
        inner = node.args[0] if target is aten.expand.default else None
        node.meta["filled"] = fill_value(inner) if isinstance(inner, fx.Node) else _FILLED.get(target)
    return node.meta["filled"]


def reduction_of(node: fx.Node) -> str | None:
    """The reduction over the edges of a row that a ``scatter`` is; :obj:`None` for other operations.

    Raises:
        NotTraceable: If it is one that has no kernel.
    """
    if "reduction" not in node.meta:
        node.meta["reduction"] = _reduction_of(node) if node.target in _SCATTERED else None
    return node.meta["reduction"]


def _reduction_of(node: fx.Node) -> str:
    start, _, _, source, *more = node.args
    target: Any = node.target
    name = _SCATTERED[target] or _REDUCED.get(str(more[0]))
    if name is None or not isinstance(start, fx.Node) or fill_value(start) != 0 or not isinstance(source, fx.Node):
        raise NotTraceable(f"a scatter by '{more[0] if more else 'sum'}'")
    if name != "sum" and node.kwargs.get("include_self", True):
        raise NotTraceable("a scatter into other numbers than zeros")
    return name


class Spaces:
    """Where each operation of a record is computed.

    Raises:
        NotTraceable: If one looks across edges other than by a reduction over the edges of a row.
    """

    def __init__(self, record: Trace) -> None:
        self.record, self.of = record, dict[fx.Node, str]()
        # What follows from that, told once (:mod:`.evaluate`): what an operation reads, what is left to be computed.
        self.reads: dict[fx.Node, list[fx.Node]] = {}
        self.orders: dict[Any, list[fx.Node]] = {}
        inputs = iter(record.inputs)
        for node in record.graph.nodes:
            if node.op == "placeholder":
                kind = next(inputs).kind
                self.of[node] = CONST if kind in ("other", "parameter") else kind
            elif node.op == "get_attr":
                self.of[node] = CONST
            elif node.op == "call_function":
                self.of[node] = self._space(node)
            elif node.op == "output":
                self.output, *self.written = node.args[0]
            else:
                raise NotTraceable(f"an operation '{node.op}'")
        if not isinstance(self.output, fx.Node) or self.of[self.output] != KERNEL:
            raise NotTraceable("its result does not come from edges")
        if not all(isinstance(node, fx.Node) and self.of[node] in OF_EDGES for node in self.written):
            raise NotTraceable("it writes what is not of edges to the layer")

    def is_row_wise(self, node: fx.Node) -> bool:
        """Whether an operation of rows gives each of them what it would have alone, bit for bit."""
        if self.of[node] not in (ROW, KERNEL) or node.target in _PRODUCTS:
            return False
        if fill_value(node) is not None or reduction_of(node) is not None:
            return True
        try:
            self._expect_row_wise(node, self.record.targets, (ROW, KERNEL))
        except NotTraceable:
            return False
        return True

    def _space(self, node: fx.Node) -> str:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotTraceable("it draws random numbers")
        shape = self.record.shapes.get(node, ())
        if fill_value(node) is not None:
            return {self.record.edges: EDGE, self.record.targets: ROW}.get(shape[0] if shape else -1, CONST)
        kinds = {self.of[arg] for arg in node.all_input_nodes} - {CONST}
        if not kinds:
            return CONST
        if reduction_of(node) is not None:
            return self._scattered(node)
        if node.target in _SELECTED and kinds & {INDEX, SOURCE_INDEX, ROW, KERNEL}:
            return self._selected(node)
        if kinds <= {INDEX} or kinds <= {SOURCE_INDEX}:
            if node.target not in SHAPED:
                raise NotTraceable("it computes with the numbers of nodes")
            return next(iter(kinds))
        if kinds <= {ROW, KERNEL}:
            return KERNEL if KERNEL in kinds else ROW
        if not kinds <= set(OF_EDGES):
            raise NotTraceable("it mixes edges and rows")
        self._expect_row_wise(node, self.record.edges)
        return next(iter(kinds)) if len(kinds) == 1 else MIXED

    def _scattered(self, node: fx.Node) -> str:
        _, dim, index, source, *_ = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, fx.Node)
        if dim not in (0, -len(self.record.shapes[node])) or self.of.get(index) != INDEX:
            raise NotTraceable("a scatter by another index than that of targets")
        if fill_value(source) is not None:
            return ROW  # a multiple of the degrees
        if self.of[source] not in OF_EDGES:
            raise NotTraceable("a scatter of what is not of edges")
        return KERNEL

    def _selected(self, node: fx.Node) -> str:
        source, index = node.args[0], node.args[-1]
        if node.target is aten.index.Tensor:
            assert isinstance(index, (list, tuple))
            index = index[0] if len(index) == 1 else None
        elif node.target is aten.index_select.default:
            dim = node.args[1]
            assert isinstance(source, fx.Node)
            if dim not in (0, -len(self.record.shapes[source])):
                raise NotTraceable("it selects from another dimension than that of nodes")
        assert isinstance(source, fx.Node)
        if not isinstance(index, fx.Node) or self.of.get(index) != INDEX:
            raise NotTraceable("it selects by another index than that of targets")
        return {ROW: TARGET, KERNEL: MIXED}.get(self.of[source]) or self._refuse()

    def _refuse(self) -> str:
        raise NotTraceable("it selects from what is not of rows")

    def _expect_row_wise(self, node: fx.Node, count: int, kinds: tuple[str, ...] = OF_EDGES) -> None:
        """Refuse what does not treat every edge for itself, or every row, of which there are ``count``."""
        record, target = self.record, node.target
        shape = record.shapes.get(node)
        edges = [arg for arg in node.all_input_nodes if self.of[arg] in kinds]
        if target in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
            shape = (count,)
        if shape is not None and (not shape or shape[0] != count):
            raise NotTraceable(f"'{_name(node)}' looks across edges")
        if target is operator.getitem:
            return
        if any(len(record.shapes.get(arg, ())) == 0 or record.shapes[arg][0] != count for arg in edges):
            raise NotTraceable(f"'{_name(node)}' of other rows than those of edges")
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            assert shape is not None
            if any(len(record.shapes[arg]) != len(shape) for arg in edges):
                raise NotTraceable(f"'{_name(node)}' pairs edges with features")
            return
        if target in SHAPED:
            return
        times = node.args[1] if target is aten.repeat.default else ()
        if isinstance(times, (list, tuple)) and len(times) == len(self.record.shapes[edges[0]]) and times[0] == 1:
            return
        if target in _CHOSEN | _SUMMED | _JOINED and self._leaves_rows(node, edges):
            return
        if target in _PRODUCTS and self._is_product_of_rows(node, count, kinds):
            return
        if target in _SELECTED and self._looks_up(node, kinds):
            return
        raise NotTraceable(f"'{_name(node)}' is no operation on single edges")

    def _leaves_rows(self, node: fx.Node, edges: list[fx.Node]) -> bool:
        """Whether the dimensions that an operation is about are not the first."""
        rank = len(self.record.shapes[edges[0]]) + (node.target is aten.stack.default)
        position = 2 if node.target in (aten.split.Tensor, aten.split_with_sizes.default) else 1
        default = 1 if node.target is aten._softmax.default else 0
        dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        dims = dims if isinstance(dims, (tuple, list)) else [dims]
        return bool(dims) and all(isinstance(dim, int) and dim % rank != 0 for dim in dims)

    def _is_product_of_rows(self, node: fx.Node, count: int, kinds: tuple[str, ...]) -> bool:
        args = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.target is aten.bmm.default:
            return all(self.record.shapes[arg][0] == count for arg in args)
        if node.target is LINEAR:
            return True
        left, right = args[-2], args[-1]
        free = node.target is not aten.addmm.default or self.of[args[0]] == CONST
        return free and self.of[left] in kinds and self.of[right] == CONST

    def _looks_up(self, node: fx.Node, kinds: tuple[str, ...]) -> bool:
        """Rows of a constant table by a number that edges have."""
        source, index = node.args[0], node.args[-1]
        if node.target is aten.index.Tensor:
            assert isinstance(index, (list, tuple))
            index = index[0] if len(index) == 1 else None
        constant = isinstance(source, fx.Node) and self.of[source] == CONST
        return constant and isinstance(index, fx.Node) and self.of[index] in kinds and self.of[index] != MIXED


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]
