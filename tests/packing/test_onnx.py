"""Packed models as ONNX files: nodes of our domain, or standard ops that onnxruntime runs to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing.test_export import CASES, fresh, models
from torch import nn

import qgnn_plugin as qgnn

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
