"""Deep stacks, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import erdos_renyi
from packing.cases import CLASSES, FEATURES, features, quantized
from torch_geometric.nn import GCN, GraphSAGE

import qgnn_plugin
from qgnn_plugin import SMPConfig
from qgnn_plugin.smp.deep import StackScope

HIDDEN, LAYERS = 12, 5
DEEP = {"initial_residual": 0.1, "identity_map": 0.5}
CONFIGS: list[dict[str, Any]] = [
    {"bits": 2},
    {"bits": 4, "granularity": "node", "message_levels": "half"},
    {"bits": 4, "granularity": "row", "message_levels": "half"},
    {"bits": 8, "smp": SMPConfig(**DEEP, multiplier=0.5)},
]


def deep_pair(model: Any, **config: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    graph = erdos_renyi(40, 200)
    args = (features("dense", 40), graph.edge_index)
    qmodel = quantized(model, *args, **{"smp": SMPConfig(**DEEP), **config})
    return qmodel, qgnn_plugin.pack_model(qmodel), args


@pytest.mark.parametrize("config", CONFIGS, ids=["int2", "int4 node", "int4 row", "int8 smoothed"])
def test_packed_stack_equals_the_converted_one_bit_for_bit(config: dict[str, Any], poison_empty: None) -> None:
    qmodel, packed, args = deep_pair(GCN(FEATURES, HIDDEN, LAYERS, CLASSES), **config)
    with torch.no_grad():
        assert torch.equal(packed(*args), qmodel(*args))
    report = qgnn_plugin.summary(packed)
    assert all(layer.reason is None for layer in report.layers)
    assert "GCNConv (deep 3/3)" in str(report)


@pytest.mark.parametrize("model", [GCN, GraphSAGE])
def test_saved_stack(model: Any, tmp_path: Path) -> None:
    """Layers without a packed form among them: they keep their place in the stack."""
    plain = model(FEATURES, HIDDEN, LAYERS, CLASSES)
    _, packed, args = deep_pair(plain, bits=4)
    path = tmp_path / "deep.safetensors"
    qgnn_plugin.save_packed(packed, path)
    loaded = qgnn_plugin.load_packed(path, model(FEATURES, HIDDEN, LAYERS, CLASSES))
    assert torch.equal(loaded(*args), packed(*args))
    assert str(qgnn_plugin.summary(loaded)) == str(qgnn_plugin.summary(packed))
    assert not isinstance(plain, StackScope)


def test_stack_that_runs_in_floats_says_so() -> None:
    _, packed, _ = deep_pair(GraphSAGE(FEATURES, HIDDEN, LAYERS, CLASSES), bits=4)
    reasons = {layer.name: layer.reason for layer in qgnn_plugin.summary(packed).layers}
    assert reasons["convs.2"] == "no packed SAGEConv in a deep stack"
    assert reasons["convs.0"] is None


def test_packed_stack_shares_nothing_with_the_converted_one() -> None:
    qmodel, packed, args = deep_pair(GCN(FEATURES, HIDDEN, LAYERS, CLASSES), bits=4)
    ours = {id(m.deep_stack) for m in qmodel.modules() if hasattr(m, "deep_stack")}
    theirs = {id(m.deep_stack) for m in packed.modules() if hasattr(m, "deep_stack")}
    assert len(ours) == len(theirs) == 1
    assert ours != theirs
    packed(*args)
    assert packed.deep_stacks[0].initial is None
