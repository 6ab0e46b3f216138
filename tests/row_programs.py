"""Row programs that generated kernels are tested on, and operands for them."""

from __future__ import annotations

import torch
from torch import Tensor

from qgnn_plugin.kernels.generated.program import Node, Operand, Product, Program, Use
from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.plan import GraphPlan


def load(operand: int, width: int) -> Node:
    return Node("load", (), width, operand)


def node(op: str, *args: int | Use, width: int, value: float = 0.0, row: bool = False) -> Node:
    return Node(op, tuple(a if isinstance(a, Use) else Use(a) for a in args), width, value, row)


def gathered(width: int, bits: int, ranges: str) -> Program:
    """``relu(x_j + e)``: its sum, maximum, minimum and second moment at once."""
    nodes = (
        load(0, width),
        load(1, width),
        node("add", 0, 1, width=width),
        node("relu", 2, width=width),
        node("sum", 3, width=width, row=True),
        node("max", 3, width=width, row=True),
        node("min", 2, width=width, row=True),
        node("mul", 3, 3, width=width),
        node("sum", 7, width=width, row=True),
    )
    return Program((Operand("source", width, bits, ranges), Operand("edge", width)), nodes, (4, 5, 6, 8))


def attention(heads: int, channels: int, bits: int) -> Program:
    """Dot products, softmax over neighbours, a weighted sum; the weights of edges come out as well."""
    width = heads * channels
    nodes = (
        load(0, width),
        load(1, width),
        load(2, width),
        node("mul", 0, 1, width=width),
        node("dot", 3, width=heads),
        node("literal", width=1, value=0.3),
        node("mul", 4, Use(5, "repeat"), width=heads),
        node("max", 6, width=heads, row=True),
        node("sub", 6, 7, width=heads),
        node("exp", 8, width=heads),
        node("sum", 9, width=heads, row=True),
        node("literal", width=1, value=1e-16, row=True),
        node("add", 10, Use(11, "repeat"), width=heads, row=True),
        node("div", 9, 12, width=heads),
        node("mul", 2, Use(13, "repeat"), width=width),
        node("sum", 14, width=width, row=True),
    )
    operands = (
        Operand("target", width),
        Operand("source", width, bits, "tensor"),
        Operand("source", width, bits, "column"),
    )
    return Program(operands, nodes, (15,), (13,))


def softmax_of_features(width: int, bits: int) -> Program:
    """A softmax over neighbours of every feature for itself."""
    nodes = (
        load(0, width),
        node("relu", 0, width=width),
        node("max", 1, width=width, row=True),
        node("sub", 1, 2, width=width),
        node("exp", 3, width=width),
        node("sum", 4, width=width, row=True),
        node("literal", width=1, value=1e-16, row=True),
        node("add", 5, Use(6, "repeat"), width=width, row=True),
        node("div", 4, 7, width=width),
        node("mul", 1, 8, width=width),
        node("sum", 9, width=width, row=True),
    )
    return Program((Operand("source", width, bits, "row"),), nodes, (10,))


def mapped(width: int, few: int, bits: int, has_unit: bool, has_bias: bool) -> Program:
    """Two linear maps of an edge with ReLU between them, beside one of few outputs with a softmax over these."""
    heads = 4
    nodes = (
        load(0, width),
        load(1, width),
        load(2, few),
        node("sub", 0, 1, width=width),
        node("linear", 0, 3, 2, width=24, value=0),
        node("relu", 4, width=24),
        node("linear", 5, width=2 * width, value=1),
        node("max", 6, width=2 * width, row=True),
        node("linear", 3, width=heads, value=2),
        node("top", 8, width=1),
        node("sub", 8, Use(9, "repeat"), width=heads),
        node("exp", 10, width=heads),
        node("dot", 11, width=1),
        node("div", 11, Use(12, "repeat"), width=heads),
        node("join", 6, 2, 13, width=2 * width + few + heads),
        node("sum", 14, width=2 * width + few + heads, row=True),
    )
    operands = (Operand("source", width, 4, "row"), Operand("target", width), Operand("edge", few))
    products = (
        Product(2 * width + few, 24, bits, 4, has_unit, has_bias),
        Product(24, 2 * width, bits, 2, has_unit, not has_bias),
        Product(width, heads, bits, 8, has_unit, False),
    )
    return Program(operands, nodes, (7, 15), products=products)


def arrays_for(program: Program, plan: GraphPlan) -> list[tuple[Tensor, ...]]:
    rows = {"source": plan.num_src, "target": plan.num_dst, "edge": plan.num_edges, "constant": 1}
    out: list[tuple[Tensor, ...]] = []
    for operand in program.operands:
        count = rows[operand.side]
        if operand.bits:
            number = {"tensor": 1, "column": operand.width, "row": count}[operand.ranges]
            codes = torch.randint(2**operand.bits, (count, operand.width))
            out.append((pack_codes(codes, operand.bits), torch.rand(number) * 0.3 + 0.1, torch.randn(number)))
        else:
            out.append((torch.randn(count, operand.width),))
    return out + [product_arrays(product) for product in program.products]


def product_arrays(product: Product) -> tuple[Tensor, ...]:
    codes = torch.randint(2**product.w_bits, (product.num_out, product.num_in))
    top, bias = 2**product.x_bits - 1, torch.randn(product.num_out if product.has_bias else 0)
    return (
        pack_codes(codes, product.w_bits), torch.rand(product.num_out) * 0.1 + 0.01, torch.randn(product.num_out) * 0.1,
        bias, torch.tensor([1.0 / top]), torch.tensor([-0.4]), torch.full((int(product.has_unit),), 0.7),
    )  # fmt: skip


PROGRAMS = {
    "64 features, 4 bits": gathered(64, 4, "tensor"),
    "17 features, 2 bits": gathered(17, 2, "column"),
    "5 features, 8 bits": gathered(5, 8, "row"),
    "1 feature, 1 bit": gathered(1, 1, "tensor"),
    "200 features, 4 bits": gathered(200, 4, "column"),
    "4 heads of 16": attention(4, 16, 4),
    "8 heads of 16": attention(8, 16, 4),  # tiles of two runs of heads
    "1 head of 33": attention(1, 33, 2),
    "3 heads of 5": attention(3, 5, 8),
    "2 heads of 100": attention(2, 100, 4),
    "softmax of 33 features": softmax_of_features(33, 2),
    "maps of 32 features, multipliers": mapped(32, 5, 4, True, True),
    "maps of 13 features, 8 bits": mapped(13, 3, 8, False, False),
    "maps of 20 features, 8 bits, multipliers": mapped(20, 7, 8, True, True),  # tiles of two widths
    "maps of 30 features, 2 bits, multipliers": mapped(30, 9, 2, True, False),
    "maps of 70 features, 2 bits, multipliers": mapped(70, 9, 2, True, False),
}
LARGE_MAPS = ("maps of 70 features, 2 bits, multipliers",)  # more weights than registers of an accelerator hold
