"""Packed models as ONNX files: nodes of our domain, or standard ops that onnxruntime runs to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing.test_export import CASES, fresh, models
from torch import nn

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.arithmetic import attention_thresholds
from qgnn_plugin.kernels.layout import PACKED_BITS, pack_codes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

EXACT = ("GCN", "GraphSAGE", "GraphSAGE, max", "GIN", "APPNP", "SAGE of two kinds", "GCN of zeros and ones")
ROUNDED = ("GAT", "GCN with weights")


def export(model: nn.Module, args: Any, path: Path, **options: Any) -> Any:
    qgnn.export_onnx(model, args, path, **options)
    return onnx.load(path)


def feeds(session: Any, args: Any) -> dict[str, np.ndarray]:
    flat = [a for arg in args for a in (arg if isinstance(arg, tuple) else (arg,))]
    return {i.name: value.numpy() for i, value in zip(session.get_inputs(), flat, strict=True)}


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
@torch.no_grad()
def test_standard_ops_give_the_same_logits(name: str, tmp_path: Path) -> None:
    found, inputs = models(name)
    model = export(found["packed"], inputs(50, 300), tmp_path / "model.onnx", standard_ops=True)
    assert {node.domain for node in model.graph.node} <= {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for nodes, edges in ((50, 300), (31, 90), (200, 2000)):
        args = inputs(nodes, edges)
        (got,) = session.run(None, feeds(session, args))
        expected = found["packed"](*args)
        if name in EXACT:
            assert np.array_equal(got, expected.numpy())
        else:
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_nodes_of_our_domain_have_the_arguments_of_the_ops(tmp_path: Path) -> None:
    found, inputs = models("GAT")
    model = export(found["packed"], inputs(50, 300), tmp_path / "model.onnx")
    ours = [node for node in model.graph.node if node.domain == "qgnn"]
    assert {node.op_type for node in ours} == {"plan", "quantize_pack_rows", "head_linear", "attention_aggregate"}
    assert [entry.version for entry in model.opset_import if entry.domain == "qgnn"] == [1]
    node = next(node for node in ours if node.op_type == "attention_aggregate")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["heads"], attributes["bits"], attributes["num_features"]) == (4, 4, 24)
    assert attributes["negative_slope"] == pytest.approx(0.2)
    assert [i.name for i in model.graph.input] == ["x", "edge_index"]
    words = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32]
    assert sum(onnx.numpy_helper.to_array(t).nbytes for t in words) > 0  # weights stay packed


def test_a_fresh_process_without_this_package_runs_the_file(tmp_path: Path) -> None:
    found, inputs = models("GCN")
    path, args = tmp_path / "model.onnx", inputs(31, 90)
    export(found["packed"], inputs(50, 300), path, standard_ops=True)
    with torch.no_grad():
        np.savez(tmp_path / "case.npz", x=args[0], edge_index=args[1], expected=found["packed"](*args))
    code = """
        import sys, numpy, onnxruntime
        case = numpy.load(sys.argv[2])
        got = onnxruntime.InferenceSession(sys.argv[1]).run(None, {k: case[k] for k in ("x", "edge_index")})[0]
        assert "torch" not in sys.modules
        print(numpy.array_equal(got, case["expected"]))
    """
    assert fresh(code, path, tmp_path / "case.npz").strip() == "True"


def test_nan_is_not_lost(tmp_path: Path) -> None:
    found, inputs = models("GCN")
    export(found["packed"], inputs(50, 300), tmp_path / "model.onnx", standard_ops=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x, edge_index = inputs(31, 90)
    x[3, 3] = float("inf")
    (got,) = session.run(None, feeds(session, (x, edge_index)))
    assert np.isnan(got).all()


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    found, inputs = models("GCN")
    with pytest.raises(TypeError, match="as a tuple"):
        qgnn.export_onnx(found["packed"], inputs(50, 300)[0], tmp_path / "model.onnx")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="made by pack_model"):
        qgnn.export_onnx(CASES["GCN"][0](), inputs(50, 300), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


# The standard forms, one by one #######################################################################################


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("width", [1, 37, 64])
def test_layout(width: int, bits: int) -> None:
    from qgnn_plugin.onnx import standard

    codes = torch.randint(1 << bits, (9, width))
    words = pack_codes(codes, bits)
    assert torch.equal(standard.pack(codes, bits), words)
    assert torch.equal(standard.unpack(words, width, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numerators(bits: int) -> None:
    from qgnn_plugin.onnx import standard

    table = attention_thresholds(bits)
    shifted = torch.cat([-torch.rand(500) * 9, table, table.nextafter(torch.tensor(-9.0)), torch.zeros(1)])
    expected = torch.searchsorted(table, shifted, right=True).float()
    assert torch.equal(standard.numerators(shifted, bits), expected)


def random_arguments(name: str) -> dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]:
    from qgnn_plugin.kernels.plan import GraphPlan

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
    from qgnn_plugin.onnx.standard import STANDARD

    args, kwargs = random_arguments(case)[case]()
    op = getattr(torch.ops.qgnn, case.partition(" ")[0]).default
    got, expected = STANDARD[op](*args, **kwargs), op(*args, **kwargs)
    if case.endswith(("weighted", "per row", "float_sum")):
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("overload", ["aggregate.rows", "linear.rows", "quantize_pack.rows"])
def test_packed_rows_with_multipliers(overload: str) -> None:
    from qgnn_plugin.onnx.standard import STANDARD

    name = overload.partition(".")[0]
    unit, out = torch.tensor(0.8), {"out_scale": torch.tensor(0.1), "out_offset": torch.tensor(-0.7), "out_bits": 4}
    if name == "quantize_pack":
        args: tuple[Any, ...] = (torch.randn(9, 20) * 3, out["out_scale"], out["out_offset"], 4, unit)
        kwargs: dict[str, Any] = {}
    else:
        args, kwargs = random_arguments(name)[name]()
        kwargs = {**kwargs, **out, "out_unit": unit}
    op = getattr(torch.ops.qgnn, name).rows
    for got, expected in zip(STANDARD[op](*args, **kwargs), op(*args, **kwargs), strict=True):
        assert torch.equal(got, expected)
