"""Makes a row program of a record: one kernel for everything that mixes sources, targets and edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.generated.program import Node, Operand, Program, Use
from .edge_maps import joined, product_of, softmax, widens
from .evaluate import Values
from .leaves import SIDE, Leaf, PackedForm
from .marks import LINEAR
from .operations import OPERATIONS, Handle
from .products import is_product, is_small
from .shadow import NotTraceable
from .spaces import CONST, EDGE, KERNEL, MIXED, OF_EDGES, ROW, SHAPED, SOURCE, TARGET, Spaces, reduction_of
from .split_maps import product
from .spreading import is_simple, mode
from .trace import Trace

__all__ = ["Built", "build"]

aten = torch.ops.aten
Dims = tuple[int, ...]


@dataclass
class Built:
    """A program and what belongs to it.

    Args:
        program: The kernel.
        leaves: What its operands hold.
        results: The operations of the record that its outputs are, with what is left to do to them.
        indices: The node of the program that each of them comes from.
        maps: The packed linear layers that edges are mapped by, the products of the program.
    """

    program: Program
    leaves: list[Leaf]
    results: list[tuple[fx.Node, Callable[[Tensor], Tensor]]]
    indices: list[int]
    maps: list[Any]


def build(record: Trace, spaces: Spaces, packed: dict[fx.Node, PackedForm]) -> Built:
    """The program of a record.

    Args:
        record: What was recorded.
        spaces: Where its operations are computed.
        packed: The inputs that are packed.

    Raises:
        NotTraceable: If an operation of edges has no counterpart in kernels.
        Unsupported: If the program is too large.
    """
    builder = _Builder(record, spaces, packed)
    for node in record.graph.nodes:
        if spaces.of.get(node) == KERNEL and reduction_of(node) is not None and builder.is_needed_after(node):
            builder.output(node)
    kept = [builder.edge(node) for node in spaces.written]
    program = Program(
        tuple(builder.operands), tuple(builder.nodes), tuple(builder.outputs), tuple(handle.index for handle in kept),
        tuple(product for lin in builder.maps if (product := product_of(lin)) is not None),
    )  # fmt: skip
    return Built(program.check(), builder.leaves, builder.results, builder.indices, builder.maps)


@dataclass
class _Builder:
    record: Trace
    spaces: Spaces
    packed: dict[fx.Node, PackedForm]
    operands: list[Operand] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    results: list[tuple[fx.Node, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    maps: list[Any] = field(default_factory=list)
    made: dict[Any, Handle] = field(default_factory=dict)

    # -- nodes of the program -------------------------------------------------------------------------------------

    def add(self, op: str, args: tuple[Use, ...], width: int, value: float = 0.0, is_row: bool = False) -> int:
        node = Node(op, args, width, value, is_row)
        for index, known in enumerate(self.nodes):
            if known == node:
                return index
        self.nodes.append(node)
        return len(self.nodes) - 1

    def literal(self, value: float, is_row: bool = False) -> Handle:
        return Handle(self.add("literal", (), 1, float(value), is_row), ())

    def leaf(self, key: Any, side: str, dims: Dims, leaf: Leaf, form: PackedForm | None = None) -> Handle:
        if key not in self.made:
            width = math.prod(dims)
            bits, ranges = (form.bits, form.ranges) if form is not None else (0, "")
            self.operands.append(Operand(side, width, bits, ranges))
            self.leaves.append(leaf)
            self.made[key] = Handle(self.add("load", (), width, len(self.operands) - 1), dims)
        return self.made[key]

    def part(self, node: fx.Node, number: int) -> Handle:
        """The part ``number`` of the dimension after the first of a value of sources, targets or edges."""

        def value(values: Values) -> Tensor:
            return values[node].select(1, number)

        dims = self.record.shapes[node][2:]
        return self.leaf(("part", node, number), SIDE[self.spaces.of[node]], dims, Leaf(node, value=value))

    def apply(self, op: str, *args: Handle | float, value: float = 0.0, is_row: bool = False) -> Handle:
        """An operation number by number, with broadcasting."""
        handles = [a if isinstance(a, Handle) else self.literal(a, is_row) for a in args]
        dims = tuple(torch.broadcast_shapes(*(h.dims for h in handles)))
        width = math.prod(dims)
        uses = tuple(Use(h.index, mode(h.dims, dims)) for h in handles)
        return Handle(self.add(op, uses, width, value, is_row), dims)

    # -- from the record ------------------------------------------------------------------------------------------

    def is_needed_after(self, node: fx.Node) -> bool:
        """Whether something other than edges of this kernel reads a reduction."""
        for user in node.users:
            space = self.spaces.of.get(user)
            if user.op == "output" or (space == KERNEL and self._reaches_output(user)):
                return True
        return False

    def _reaches_output(self, node: fx.Node) -> bool:
        return any(
            user.op == "output" or (self.spaces.of.get(user) == KERNEL and reduction_of(user) is None
                                    and self._reaches_output(user))
            for user in node.users
        ) or (node is self.spaces.output)  # fmt: skip

    def output(self, node: fx.Node) -> None:
        source = node.args[3]
        assert isinstance(source, fx.Node)
        rest = self.record.shapes[node][1:]
        after: Callable[[Tensor], Tensor] = _shaped(rest)
        reduced = source
        if reduction_of(node) == "sum" and source.target is aten.sum.dim_IntList and self.spaces.of[source] == MIXED:
            inner: Any = source.args[0]
            dims: Any = source.args[1]
            if not self._is_trailing(inner, dims):  # rows first, then these dimensions
                keep = bool(source.args[2]) if len(source.args) > 2 else False
                shape = self.record.shapes[inner]
                axes = [dim % len(shape) for dim in dims]
                reduced = inner

                def after(y: Tensor) -> Tensor:
                    return y.view(-1, *shape[1:]).sum(axes, keepdim=keep)

        handle = self.reduction(node, reduced)
        if handle.index not in self.outputs:
            self.outputs.append(handle.index)
        self.results.append((node, after))
        self.indices.append(handle.index)

    def reduction(self, node: fx.Node, source: fx.Node | None = None) -> Handle:
        source = source or node.args[3]  # type: ignore[assignment]
        assert isinstance(source, fx.Node)
        key = ("reduction", node, source)
        if key not in self.made:
            handle, name = self.edge(source), reduction_of(node)
            assert name is not None
            index = self.add(name, (Use(handle.index),), math.prod(handle.dims), 0.0, True)
            self.made[key] = Handle(index, handle.dims)
        return self.made[key]

    def edge(self, node: fx.Node) -> Handle:
        """What an operation gives for every edge."""
        if node not in self.made:
            self.made[node] = self._edge(node)
        return self.made[node]

    def _edge(self, node: fx.Node) -> Handle:
        space = self.spaces.of[node]
        dims = self.record.shapes[node][1:]
        if space in (SOURCE, TARGET, EDGE):
            if space == SOURCE and self._stays_packed(node):
                if node in self.packed:
                    return self.leaf(node, SOURCE, dims, Leaf(node, is_packed=True), self.packed[node])
                return self.operation(node)
            base = node
            while space == EDGE and base.target in SHAPED and self.spaces.of.get(base.args[0]) == EDGE:  # type: ignore[arg-type]
                base = base.args[0]  # type: ignore[assignment]
            alone = len(node.users) == 1 and len(base.users) == 1
            if space == EDGE and base.target is LINEAR and alone and is_small(base, self.record):
                return Handle(product(self, base).index, dims)
            if space == EDGE and widens(self, node):
                return self.operation(node)
            if not self.record.dtypes[node].is_floating_point:
                raise NotTraceable("it computes with whole numbers of edges")
            return self.leaf(node, SIDE[space], dims, Leaf(node))
        if space != MIXED:
            raise NotTraceable(f"a message of what is {space}")
        return self.operation(node)

    def _stays_packed(self, node: fx.Node) -> bool:
        """Whether ``node`` follows from one packed input, number by number."""
        if node in self.packed:
            return True
        edges = [arg for arg in node.all_input_nodes if self.spaces.of[arg] in OF_EDGES]
        if len(edges) != 1 or math.prod(self.record.shapes[edges[0]]) != math.prod(self.record.shapes.get(node, (0,))):
            return False
        known = node.target in SHAPED or node.target in OPERATIONS
        return known and self._stays_packed(edges[0])

    def row(self, node: fx.Node) -> Handle:
        """What an operation gives for a row, inside the kernel."""
        key = ("row", node)
        if key not in self.made:
            self.made[key] = self._row(node)
        return self.made[key]

    def _row(self, node: fx.Node) -> Handle:
        space = self.spaces.of[node]
        if space == ROW:
            return self.leaf(("row", node), "target", self.record.shapes[node][1:], Leaf(node))
        if space != KERNEL:
            raise NotTraceable(f"a row of what is {space}")
        if reduction_of(node) is not None:
            source = node.args[3]
            assert isinstance(source, fx.Node)
            handle = self.reduction(node, source)
            return Handle(handle.index, self.record.shapes[node][1:])
        return self.operation(node, is_row=True)

    def argument(self, arg: Any, node: fx.Node, is_row: bool) -> Handle | float:
        """An argument of an operation of ``node``."""
        if isinstance(arg, (int, float)):
            return float(arg)
        assert isinstance(arg, fx.Node)
        if self.spaces.of[arg] != CONST:
            return self.row(arg) if is_row else self._fitting(arg, node)
        rank, shape = len(self.record.shapes[node]), self.record.shapes[arg]
        if len(shape) == rank and shape[0] != 1:
            raise NotTraceable("a constant of edges")
        dims = shape[1:] if len(shape) == rank else shape

        def value(values: Values) -> Tensor:
            return values[arg].to(torch.float32).reshape(1, -1)

        if is_simple(dims, self.record.shapes[node][1:]):
            return self.leaf(("constant", arg, dims), "constant", dims, Leaf(arg, value=value))
        full = self.record.shapes[node][1:]

        def spread(values: Values) -> Tensor:
            return values[arg].to(torch.float32).reshape(dims).expand(full).reshape(1, -1)

        return self.leaf(("constant", arg, full), "constant", full, Leaf(arg, value=spread))

    def _fitting(self, arg: fx.Node, node: fx.Node) -> Handle:
        """An argument of edges; what is not computed in the kernel is spread where the kernel could not."""
        full = self.record.shapes[node][1:]
        shape = self.record.shapes[arg]
        single = self.spaces.of[arg] in (SOURCE, TARGET, EDGE) and node.target not in SHAPED
        if not single or len(shape) != len(full) + 1 or is_simple(shape[1:], full):
            return self.edge(arg)
        side = SIDE[self.spaces.of[arg]]

        def value(values: Values) -> Tensor:
            return values[arg].expand(-1, *full)

        return self.leaf(("spread", arg, full), side, full, Leaf(arg, value=value))

    def operation(self, node: fx.Node, is_row: bool = False) -> Handle:
        target, dims = node.target, self.record.shapes[node][1:]
        if target in (aten.index_select.default, aten.index.Tensor) and not is_row:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self.row(source)
        if target in SHAPED:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            handle = self.row(source) if is_row else self.edge(source)
            if math.prod(handle.dims) == math.prod(dims):
                return Handle(handle.index, dims)
            if target is not aten.expand.default:
                raise NotTraceable("a view of some numbers")
            uses = (Use(handle.index, mode((1,) * (len(dims) - len(handle.dims)) + handle.dims, dims)),)
            return Handle(self.add("copy", uses, math.prod(dims), is_row=is_row), dims)
        if target in (aten.select.int, aten.squeeze.dim) and not is_row:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if math.prod(self.record.shapes[source]) == math.prod(self.record.shapes[node]):
                return Handle(self.edge(source).index, dims)
        parts: Any = node.args[0] if target in (aten.stack.default, aten.cat.default) else ()
        if len(parts) == 1 and not is_row:
            return Handle(self.edge(parts[0]).index, dims)
        if parts and not is_row:
            return joined(self, node)
        if target is aten._softmax.default and not is_row:
            return softmax(self, node)
        if target in (aten.sum.dim_IntList, aten.mean.dim) and not is_row:
            return self._dot(node)
        if is_product(node) and not is_row:
            return product(self, node)
        if target not in OPERATIONS:
            raise NotTraceable(f"no kernel for {str(target).removeprefix('aten.')}")

        def arg(position: int, default: Any = None) -> Any:
            value = node.args[position] if len(node.args) > position else default
            return self.argument(value, node, is_row) if isinstance(value, fx.Node) else value

        def do(op: str, *args: Handle | float, value: float = 0.0) -> Handle:
            return self.apply(op, *args, value=value, is_row=is_row)

        handle = OPERATIONS[target](do, arg, node)
        if math.prod(handle.dims) != math.prod(dims):
            raise NotTraceable(f"'{target}' broadcasts otherwise")
        return Handle(handle.index, dims)

    def _is_trailing(self, node: fx.Node, dims: Any) -> bool:
        shape = self.record.shapes[node]
        axes = {dim % len(shape) for dim in dims}
        wide = [k for k in range(len(shape)) if shape[k] != 1 or k == 0]
        summed = [k for k in wide if k in axes]
        return wide[len(wide) - len(summed) :] == summed

    def _dot(self, node: fx.Node) -> Handle:
        source, axes = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        if not self._is_trailing(source, axes):
            raise NotTraceable("a sum over other dimensions than the last")
        dims, handle = self.record.shapes[node][1:], self.edge(source)
        width = math.prod(dims)
        if width == math.prod(handle.dims):
            return Handle(handle.index, dims)
        result = Handle(self.add("dot", (Use(handle.index),), width), dims)
        if node.target is aten.mean.dim:
            share = width / math.prod(handle.dims)
            return Handle(self.apply("mul", result, share).index, dims)
        return result


def _shaped(rest: Dims) -> Callable[[Tensor], Tensor]:
    return lambda y: y.view(-1, *rest)
