"""Misuse of the public API: what is wrong, where, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.recipe import run_recipe

NODES, FEATURES, EDGES = 30, 12, 90
X, GRAPH = torch.randn(NODES, FEATURES), torch.randint(NODES, (2, EDGES))
MASKS = {f"{name}_mask": torch.arange(NODES) % 3 == i for i, name in enumerate(("train", "val", "test"))}
LAYERS = {"GCN": GCN, "GAT": GAT, "GraphSAGE": GraphSAGE, "GIN": GIN}


def make(kind: str = "GCN") -> nn.Module:
    return LAYERS[kind](FEATURES, 8, 2, 4)


@cache
def model(state: str, kind: str = "GCN") -> nn.Module:
    if state == "plain":
        return make(kind)
    qmodel = qgnn.calibrate(qgnn.quantize_model(make(kind), bits=4), (X, GRAPH)).eval()
    return qmodel if state == "converted" else qgnn.pack_model(qmodel)


INPUTS: dict[str, tuple[Callable[[], tuple[Any, ...]], Any, str]] = {
    "too many features": (lambda: (torch.randn(NODES, 13), GRAPH), ValueError, r"Expected 12 features.*\[30, 13\]"),
    "too few features": (lambda: (torch.randn(NODES, 5), GRAPH), ValueError, r"Expected 12 features.*\[30, 5\]"),
    "features of one dimension": (lambda: (X[0], GRAPH), ValueError, r"shape \[(\*, )?N, F\].*'convs\.0"),
    "features in NumPy": (lambda: (X.numpy(), GRAPH), TypeError, r"tensor of features.*ndarray.*torch\.as_tensor"),
    "features in a list": (lambda: (X.tolist(), GRAPH), TypeError, r"tensor of features.*list.*torch\.as_tensor"),
    "no features": (lambda: (None, GRAPH), TypeError, r"tensor of features.*NoneType"),
    "double features": (lambda: (X.double(), GRAPH), TypeError, r"float.*got.*(double|float64).*convert"),
    "NaN": (lambda: (X * float("nan"), GRAPH), ValueError, r"finite values at 'convs\.0.*check the features"),
    "float edges": (lambda: (X, GRAPH.float()), ValueError, r"integer type.*float32.*\.long\(\)"),
    "edges in NumPy": (lambda: (X, GRAPH.numpy()), TypeError, r"'edge_index'.*ndarray.*torch\.as_tensor"),
    "edges in a list": (lambda: (X, GRAPH.tolist()), TypeError, r"'edge_index'.*list.*torch\.as_tensor"),
    "no edges": (lambda: (X, None), TypeError, r"'edge_index'.*NoneType"),
    "edges transposed": (lambda: (X, GRAPH.t()), ValueError, r"shape \[2, E\].*\[90, 2\]"),
    "nodes that do not exist": (lambda: (X, GRAPH + 20), ValueError, r"in the interval \[0, 30\).*feature matrix"),
    "swapped": (
        lambda: (GRAPH, X), (ValueError, TypeError), r"\[2, E\]|12 features|integer type|floating-point|float32 tensor",
    ),
}


@pytest.mark.parametrize("kind", ["GCN", "GAT", "GraphSAGE"])  # GINConv takes counts, as PyG's does
@pytest.mark.parametrize("state", ["converted", "packed"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_features_of_another_kind(kind: str, state: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"Expected .*float.* at 'convs\.0.*got {dtype}.*\.float\(\)"):
        model(state, kind)(X.to(dtype), GRAPH)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("state", ["converted", "packed"])
@pytest.mark.parametrize("case", list(INPUTS))
def test_inputs(case: str, state: str, kind: str) -> None:
    inputs, error, message = INPUTS[case]
    with pytest.raises(error, match=message) as raised:
        model(state, kind)(*inputs())
    assert re.search(r"'convs\.0", str(raised.value))  # the layer


@pytest.mark.parametrize("state", ["converted", "packed"])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.rand(EDGES - 1), ValueError, r"shape \[90\] or \[90, 1\].*\[89\]"),
        (torch.rand(EDGES, 2), ValueError, r"'edge_attr'"),
        (np.ones(EDGES), TypeError, r"ndarray.*torch\.as_tensor"),
    ],
)
def test_edge_weights(state: str, weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(state)(X, GRAPH, edge_weight=weight)


class Recorded:
    """Calls that are to fail, by what they do."""

    def __init__(self, folder: Path) -> None:
        plain, converted, packed = (model(state) for state in ("plain", "converted", "packed"))
        file = folder / "model.safetensors"
        qgnn.save_packed(packed, file)
        args = (X, GRAPH)
        inference = r"made for inference only"
        self.calls: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
            "save to no folder": (
                lambda: qgnn.save_packed(packed, folder / "none" / "a"),
                FileNotFoundError, r"Expected a folder.*make it",
            ),
            "save to a folder": (lambda: qgnn.save_packed(packed, folder), IsADirectoryError, r"name of a file"),
            "save a converted model": (lambda: qgnn.save_packed(converted, file), ValueError, r"pack it first"),
            "save what holds a packed model": (
                lambda: qgnn.save_packed(nn.Sequential(packed), file),
                ValueError, r"got a Sequential.*its '0' is one: pass that",
            ),
            "load, swapped": (lambda: qgnn.load_packed(plain, file), TypeError, r"load_packed\(path, model\)"),
            "load a lazy model": (
                lambda: qgnn.load_packed(file, GCN(-1, 8, 2, 4)), ValueError, r"lazy layers: convs\.0.*run it once"
            ),
            "load another": (lambda: qgnn.load_packed(file, GCN(FEATURES, 9, 2, 4)), ValueError, r"first difference"),
            "load into a packed one": (lambda: qgnn.load_packed(file, packed), ValueError, r"the float architecture"),
            "load nothing": (lambda: qgnn.load_packed(folder / "b", plain), FileNotFoundError, r"Expected a file"),
            "bits twice": (
                lambda: qgnn.quantize_model(plain, bits=4, config=QuantConfig(bits=2)),
                ValueError, r"'bits' or 'config', not both.*QuantConfig\(bits=4",
            ),
            "convert a packed model": (lambda: qgnn.quantize_model(packed), ValueError, inference),
            "convert twice": (lambda: qgnn.quantize_model(converted), ValueError, r"restore_model"),
            "convert a class": (lambda: qgnn.quantize_model(GCN), TypeError, r"torch\.nn\.Module"),
            "convert a lazy model": (lambda: qgnn.quantize_model(GCN(-1, 8, 2, 4)), ValueError, r"run the model once"),
            "restore a packed model": (lambda: qgnn.restore_model(packed), ValueError, inference),
            "calibrate a packed model": (lambda: qgnn.calibrate(packed, args), ValueError, inference),
            "calibrate a plain model": (lambda: qgnn.calibrate(plain, args), ValueError, r"convert it first"),
            "calibrate on nothing": (
                lambda: qgnn.calibrate(qgnn.quantize_model(plain), []), ValueError, r"at least one batch"
            ),
            "calibrate on NumPy": (
                lambda: qgnn.calibrate(qgnn.quantize_model(plain), (X.numpy(), GRAPH)), TypeError, r"torch\.as_tensor"
            ),
            "report on a packed model": (lambda: qgnn.error_report(packed, args), ValueError, inference),
            "ranges of a packed model": (lambda: qgnn.range_parameters(packed), ValueError, inference),
            "sites of a packed model": (lambda: qgnn.quantizers(packed), ValueError, inference),
            "groups of a packed model": (
                lambda: qgnn.training.parameter_groups(packed, lr=0.1), ValueError, inference
            ),
            "layers of a name": (lambda: qgnn.smp_layers("GCN"), TypeError, r"give the model itself"),
            "summary of a plain model": (lambda: qgnn.summary(plain), ValueError, r"convert it first"),
            "pack a plain model": (lambda: qgnn.pack_model(plain), ValueError, r"convert it first"),
            "pack twice": (lambda: qgnn.pack_model(packed), ValueError, r"use it as it is"),
            "pack without ranges": (lambda: qgnn.pack_model(qgnn.quantize_model(plain)), ValueError, r"calibrate"),
            "half of a packed model": (lambda: packed.half(), ValueError, r"stay in float32.*float32 features"),
            "gradients": (lambda: packed(X.clone().requires_grad_(), GRAPH), RuntimeError, r"torch\.no_grad"),
            "state of a packed model": (
                lambda: qgnn.quantize_like(plain, packed.state_dict()), ValueError, r"load_packed"
            ),
            "state of a plain model": (
                lambda: qgnn.quantize_like(plain, plain.state_dict()), ValueError, r"does not say how"
            ),
            "another number of bits": (lambda: QuantConfig(bits=5), ValueError, r"1, 2, 4, 8 or 32"),
            "a field that is none": (lambda: QuantConfig.from_dict({"bit": 4}), ValueError, r"[Dd]id you mean 'bits'"),
            "no fields": (lambda: QuantConfig.from_dict([4]), TypeError, r"as a mapping .got list"),
            "steps as text": (lambda: SMPConfig.for_steps("4"), TypeError, r"as an integer .got '4'"),
            "K as text": (lambda: qgnn.SMPropagation("4"), ValueError, r"'K' as an integer"),
            "a trace": (lambda: torch.jit.trace(packed, args), RuntimeError, r"torch\.export"),
            "a script": (lambda: torch.jit.script(packed), TypeError, r"torch\.compile"),
            "data without masks": (
                lambda: run_recipe(make(), Data(x=X, edge_index=GRAPH, y=torch.zeros(NODES).long())),
                ValueError, r"boolean 'train_mask' \[30\] .got none.*RandomNodeSplit",
            ),
            "numbers to predict of another size": (
                lambda: run_recipe(make(), Data(x=X, edge_index=GRAPH, y=X[:, :2], **MASKS)), ValueError, r"\[30, 2\]"
            ),
        }  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("misuse"))


def test_calls(recorded: Recorded) -> None:
    wrong = []
    for name, (call, error, message) in recorded.calls.items():
        try:
            call()
        except Exception as raised:
            if not isinstance(raised, error) or not re.search(message, str(raised)):
                wrong.append(f"{name}: {type(raised).__name__}: {raised}")
        else:
            wrong.append(f"{name}: no error")
    assert wrong == []


def test_what_is_fine() -> None:
    plain = model("plain")
    assert qgnn.quantize_model(plain, QuantConfig(bits=2)).convs[0].lin.weight_quantizer.bits == 2
    assert not qgnn.is_packed(3)  # type: ignore[arg-type]
    assert not qgnn.is_quantized("a model")  # type: ignore[arg-type]
    assert qgnn.range_parameters(plain) == []
