"""Ops in operations that ONNX has, against the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qgnn_plugin.kernels import onnx
from qgnn_plugin.kernels.arithmetic import attention_thresholds
from qgnn_plugin.kernels.attention_aggregate.onnx import numerators
from qgnn_plugin.kernels.backend import onnx_forms
from qgnn_plugin.kernels.layout import PACKED_BITS, pack_codes
from qgnn_plugin.kernels.plan import GraphPlan


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("width", [1, 37, 64])
def test_layout(width: int, bits: int) -> None:
    codes = torch.randint(1 << bits, (9, width))
    words = pack_codes(codes, bits)
    assert torch.equal(onnx.pack(codes, bits), words)
    assert torch.equal(onnx.unpack(words, width, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numerators(bits: int) -> None:
    table = attention_thresholds(bits)
    shifted = torch.cat([-torch.rand(500) * 9, table, table.nextafter(torch.tensor(-9.0)), torch.zeros(1)])
    expected = torch.searchsorted(table, shifted, right=True).float()
    assert torch.equal(numerators(shifted, bits), expected)


def random_arguments(name: str) -> dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]:
    nodes, width = 30, 20
    plan = GraphPlan.from_edges(torch.randint(nodes, (120,)), torch.randint(nodes - 3, (120,)), nodes, nodes)
    words = pack_codes(torch.randint(16, (nodes, width)), 4)
    s, low = torch.tensor(0.3), torch.tensor(-1.1)
    graph = (plan.rowptr, plan.col)
    m = torch.randint(1, 16, (nodes,), dtype=torch.uint8)
    out = {"out_scale": torch.tensor(0.7), "out_offset": torch.tensor(-4.0), "out_bits": 2}
    edge, alpha = torch.rand(120, 4), torch.randn(nodes, 4)
    attention = (words, *graph, s, low, width, 4, 4, 4, 0.2, alpha, alpha.flip(0))
    weights = (pack_codes(torch.randint(4, (7, width)), 2), s, low, torch.rand(7), -torch.rand(7), width, 4, 2)
    per_row = (torch.rand(nodes, 1), -torch.rand(nodes, 1))
    sums = (words, *graph, s, low, width, 4)
    return {
        "aggregate": lambda: (sums, {}),
        "aggregate packed": lambda: (sums, {"bias": torch.randn(width), "relu": True, **out}),
        "aggregate max": lambda: (sums, {"reduce": "max"}),
        "aggregate weighted": lambda: (sums, {"edge_weight": edge}),
        "aggregate per row": lambda: ((words, *graph, *per_row, width, 4), {}),
        "aggregate multiplied": lambda: (sums, {"multiplier": m}),
        "linear": lambda: ((words, *weights), {"row_scale": torch.rand(nodes), **out}),
        "linear multiplied": lambda: ((words, *weights), {"multiplier": m}),
        "linear_pair": lambda: ((words, *weights, torch.randn(7), m, words, *weights, None, None), out),
        "attention_aggregate": lambda: (attention, {}),
        "attention_aggregate averaged": lambda: (attention, {"concat": False, "alpha_edge": edge}),
        "attention_aggregate multiplied": lambda: (attention, {"multiplier": m}),
        "unpack_dequantize": lambda: ((words, s, low, width, 4), {"multiplier": m}),
        "segment_largest": lambda: ((edge, plan.rowptr, -1.0), {}),
        "float_sum": lambda: ((torch.randn(nodes, width), *graph), {"weight": edge, "edge": torch.randperm(120)}),
    }


OPS = list(random_arguments(""))


@pytest.mark.parametrize("case", OPS)
def test_each_op_is_its_reference(case: str) -> None:
    args, kwargs = random_arguments(case)[case]()
    name = case.partition(" ")[0]
    op = getattr(torch.ops.qgnn, name).default
    got, expected = onnx_forms()[name](*args, **kwargs), op(*args, **kwargs)
    if case.endswith(("weighted", "per row", "float_sum")):
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("overload", ["aggregate.rows", "linear.rows", "linear_pair.rows", "quantize_pack.rows"])
def test_packed_rows_with_multipliers(overload: str) -> None:
    name = overload.partition(".")[0]
    unit, out = torch.tensor(0.8), {"out_scale": torch.tensor(0.1), "out_offset": torch.tensor(-0.7), "out_bits": 4}
    if name == "quantize_pack":
        args: tuple[Any, ...] = (torch.randn(9, 20) * 3, out["out_scale"], out["out_offset"], 4, unit)
        kwargs: dict[str, Any] = {}
    else:
        args, kwargs = random_arguments(name)[name]()
        kwargs = {**kwargs, **out, "out_unit": unit}
    op = getattr(torch.ops.qgnn, name).rows
    for got, expected in zip(onnx_forms()[name](*args, **kwargs), op(*args, **kwargs), strict=True):
        assert torch.equal(got, expected)
