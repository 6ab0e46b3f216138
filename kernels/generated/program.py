"""Row programs: what every edge of a destination row computes, and how a row's edges are reduced.

A :class:`Program` is a list of nodes in static single assignment.  A node stands for ``width`` float32 numbers per
*edge*, or per *row* once edges were reduced; a row's numbers are read by every edge of that row, so that a softmax over
neighbours is a maximum, a difference, an exponential, a sum and a quotient.  Nodes of fewer numbers are broadcast to
wider ones: each number for a run of consecutive features (``"repeat"``, heads), or the numbers over and over
(``"tile"``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..layout import unpack_codes
from ..linear import linear_reference
from ..quantize_pack import quantize_pack_reference

__all__ = [
    "ELEMENTWISE",
    "KEPT",
    "REDUCTIONS",
    "Node",
    "Operand",
    "Product",
    "Program",
    "Unsupported",
    "Use",
    "reference",
]

MAX_WIDTH = 2048  # kernels are unrolled over the features
MAX_NODES = 200

REDUCTIONS = ("sum", "max", "min")  # over the edges of a row; 0 where there are none
KEPT = ("linear", "join")  # of edges, computed a row's edges at once


class Unsupported(Exception):
    """No kernel is written for this expression; the message says why."""


@dataclass(frozen=True)
class Operand:
    """A matrix that a program reads.

    Args:
        side: Which of its rows an edge reads: that of its ``"source"``, its ``"target"``, its own (``"edge"``), or the
            only one (``"constant"``).
        width: Numbers per row.
        bits: Width of packed codes; 0 for float32.
        ranges: Of codes: one for the ``"tensor"``, one per ``"column"`` or one per ``"row"``.
    """

    side: str
    width: int
    bits: int = 0
    ranges: str = ""


@dataclass(frozen=True)
class Product:
    """A packed linear map of what an edge has.

    Its arrays are the words of the weight ``[O, row_words(K, w_bits)]``, scale and lower end of its range (one element,
    or one per output), the bias ``[O]``, and of the range of what is mapped the scale, the lower end and the unit of
    its row multipliers, one element each; what there is none of is empty.

    Args:
        num_in, num_out: ``K`` and ``O``.
        x_bits, w_bits: Widths of codes.
        has_unit: Whether edges have multipliers.
        has_bias: Whether there is a bias.
    """

    num_in: int
    num_out: int
    x_bits: int
    w_bits: int
    has_unit: bool
    has_bias: bool


@dataclass(frozen=True)
class Use:
    """How a node reads another: ``"full"``, or broadcast by ``"repeat"`` or ``"tile"``."""

    node: int
    mode: str = "full"


@dataclass(frozen=True)
class Node:
    """One operation.

    Args:
        op: ``"load"`` (of the operand ``value``), ``"literal"`` (``value``), ``"dot"`` and ``"top"`` (sums of
            consecutive features, and the largest of few), ``"map"`` (few numbers of an edge times a constant matrix,
            row after row; sums in any order), ``"linear"`` (the product ``value`` of what it reads, one behind the
            other), ``"join"`` (what it reads, one behind the other), one of :data:`REDUCTIONS` over the edges of a row,
            or one of :data:`ELEMENTWISE`.
        args: What it reads.
        width: Numbers per edge or row.
        value: An operand, or the parameter of an operation.
        is_row: Whether it is one of a row, not of an edge.
    """

    op: str
    args: tuple[Use, ...]
    width: int
    value: float = 0.0
    is_row: bool = False


@dataclass(frozen=True)
class Program:
    """A kernel's work.

    Args:
        operands: What it reads.
        nodes: What it computes, in order.
        outputs: The reductions that are its results, ``[num_dst, width]`` float32 each.
        edge_outputs: Few numbers of edges that are results as well, ``[E, width]`` float32 in the caller's order.
        products: The linear maps of edges.
    """

    operands: tuple[Operand, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    edge_outputs: tuple[int, ...] = ()
    products: tuple[Product, ...] = ()

    @cached_property
    def key(self) -> str:
        """A digest of everything that a kernel is written from."""
        told = repr((self.operands, self.nodes, self.outputs, self.edge_outputs, self.products))
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def __hash__(self) -> int:
        # Kernels are found by it in every call: that of all nodes takes as long as a small kernel.
        return hash(self.key)

    def check(self) -> Program:
        """The program itself.

        Raises:
            Unsupported: If it is too large for a kernel.
        """
        if len(self.nodes) > MAX_NODES:
            raise Unsupported(f"{len(self.nodes)} operations per edge")
        widest = max((node.width for node in self.nodes), default=0)
        if widest > MAX_WIDTH:
            raise Unsupported(f"{widest} features per edge")
        if not self.outputs:
            raise Unsupported("nothing is reduced over edges")
        return self


def _leaky(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


# Name to what it does in torch; those with a parameter take it last.
ELEMENTWISE: dict[str, Any] = {
    "copy": lambda x: x,
    "neg": torch.neg,
    "abs": torch.abs,
    "relu": torch.relu,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": _softplus,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "greater": lambda a, b: (a > b).float(),
    "greater_equal": lambda a, b: (a >= b).float(),
    "where": lambda c, a, b: torch.where(c != 0, a, b),
}
WITH_VALUE: dict[str, Any] = {"leaky_relu": _leaky}


def spread(x: Tensor, mode: str, width: int) -> Tensor:
    """``[N, S]`` broadcast to ``[N, width]``."""
    if x.size(1) == width:
        return x
    if mode == "tile":
        return x.repeat(1, width // x.size(1))
    return x.repeat_interleave(width // x.size(1), 1)


def operand_rows(operand: Operand, arrays: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """The rows of an operand as floats; ``arrays`` are its matrix, or its words, scale and lower end."""
    if not operand.bits:
        return arrays[0] if rows is None else arrays[0][rows]
    words, scale, lower = arrays
    codes = unpack_codes(words if rows is None else words[rows], operand.width, operand.bits).to(torch.float32)
    if operand.ranges == "row" and rows is not None:
        scale, lower = scale.view(-1, 1)[rows], lower.view(-1, 1)[rows]
    elif operand.ranges == "row":
        scale, lower = scale.view(-1, 1), lower.view(-1, 1)
    return codes * scale + lower


def reference(
    program: Program, arrays: Sequence[Sequence[Tensor]], rowptr: Tensor, col: Tensor, edge: Tensor
) -> list[Tensor]:
    """The results of ``program``, edge by edge in torch.

    Args:
        program: The expression.
        arrays: The matrices of each operand, then of each product.
        rowptr: ``[num_dst + 1]``, first edge of each destination.
        col: ``[E]``, source of each edge.
        edge: ``[E]``, row of each edge in operands of edges.
    """
    num_dst = rowptr.numel() - 1
    dst = torch.repeat_interleave(torch.arange(num_dst), rowptr[1:] - rowptr[:-1])
    rows = {"source": col.long(), "target": dst, "edge": edge, "constant": torch.zeros_like(dst)}
    values: list[Tensor] = []
    for node in program.nodes:
        if node.op == "load":
            operand = program.operands[int(node.value)]
            values.append(operand_rows(operand, arrays[int(node.value)], rows[operand.side]))
            continue
        if node.op == "literal":
            count = num_dst if node.is_row else dst.numel()
            values.append(torch.full((count, node.width), node.value, dtype=torch.float32))
            continue
        args = []
        for use in node.args:
            value, arg = values[use.node], program.nodes[use.node]
            if arg.is_row and not node.is_row:
                value = value[dst]
            elif node.is_row and node.op not in REDUCTIONS and arg.op == "load":  # of the row itself
                value = operand_rows(program.operands[int(arg.value)], arrays[int(arg.value)], None)
            alone = node.op in ("dot", "top", "map", *KEPT)
            args.append(value if alone else spread(value, use.mode, node.width))
        if node.op == "linear":
            number = int(node.value)
            args = [_product(program.products[number], arrays[len(program.operands) + number], torch.cat(args, 1))]
        values.append(_apply(node, args, dst, num_dst))
    of_edges = [torch.empty_like(values[index]).index_copy_(0, edge, values[index]) for index in program.edge_outputs]
    return [*(values[index] for index in program.outputs), *of_edges]


def _product(product: Product, arrays: Sequence[Tensor], x: Tensor) -> Tensor:
    """The linear map of ``x`` ``[E, K]``, quantized row by row."""
    words, w_scale, w_lower, bias, scale, lower, unit = arrays
    packed = quantize_pack_reference(x, scale.view(()), lower.view(()), product.x_bits, unit if unit.numel() else None)
    codes, multiplier = packed if product.has_unit else (packed, None)
    return linear_reference(
        codes, words, scale, lower, w_scale, w_lower, product.num_in, product.x_bits, product.w_bits,
        bias if product.has_bias else None, multiplier=multiplier,
    )  # fmt: skip


def _apply(node: Node, args: list[Tensor], dst: Tensor, num_dst: int) -> Tensor:
    if node.op == "linear":
        return args[0]
    if node.op == "join":
        return torch.cat(args, 1)
    if node.op == "top":
        return args[0].unflatten(1, (node.width, args[0].size(1) // node.width)).amax(-1)
    if node.op == "dot":
        return args[0].unflatten(1, (node.width, args[0].size(1) // node.width)).sum(-1)
    if node.op == "map":
        if not args[0].size(0):
            return args[0].new_empty((0, node.width))
        return args[0] @ args[1][:1].view(args[0].size(1), node.width)
    if node.op in REDUCTIONS:
        index = dst.view(-1, 1).expand_as(args[0])
        out = args[0].new_zeros((num_dst, args[0].size(1)))
        reduce = {"sum": "sum", "max": "amax", "min": "amin"}[node.op]
        return out.scatter_reduce_(0, index, args[0], reduce, include_self=False)
    if node.op in WITH_VALUE:
        return WITH_VALUE[node.op](args[0], node.value)
    return ELEMENTWISE[node.op](*args)
