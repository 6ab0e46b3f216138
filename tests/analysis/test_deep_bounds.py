"""Bounds of the errors of deep stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analysis.bound_support import ROUNDING, holds, report
from core.support import NODES, WIDTH, features, graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import (
    GAT,
    GCN,
    GCNConv,
    GraphSAGE,
)
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.analysis.error_report import LayerError
from qgnn_plugin.graph.adjacency import gcn_graph


def stack_report(model: nn.Module, bits: int, shift: float = 0.0, **smp: Any) -> list[LayerError]:
    """The layers of a deep stack, of a model that runs on the graph's features."""
    config = QuantConfig(bits=bits, smp=SMPConfig(**{"initial_residual": 0.1, "identity_map": 0.5, **smp}))
    args = (features(), to_undirected(graph()))
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, config=config), args, method="ranges").eval()
    with torch.no_grad():
        for name, parameter in qmodel.named_parameters():
            if name.endswith("log_scale"):
                parameter.add_(shift)
    found = qgnn.error_report(qmodel, args)
    places = {name for name, layer in qgnn.conversion.quantized_layers(qmodel).items() if hasattr(layer, "deep_place")}
    assert ("stack bound" in str(found)) == any(layer.stack is not None for layer in found.layers)
    return [layer for layer in found.layers if layer.name in places]


@settings(max_examples=12, deadline=None)
@given(
    depth=st.sampled_from([4, 9, 18]),
    bits=st.sampled_from([2, 4, 8]),
    shift=st.sampled_from([-0.7, 0.0, 0.5]),
    residual=st.sampled_from([None, 0.1, 0.5]),
    theta=st.sampled_from([None, 0.5, 1.5]),
    multiplier=st.sampled_from([0.0, 0.6]),
    act=st.sampled_from(["relu", "elu", "tanh"]),
    seed=st.integers(0, 2**16),
)
def test_deep_stacks_stay_within_their_bound(
    depth: int, bits: int, shift: float, residual: Any, theta: Any, multiplier: float, act: str, seed: int
) -> None:
    if residual is None and theta is None:
        residual = 0.0
    torch.manual_seed(seed)
    model = GCN(WIDTH, 8, depth, 3, act=act)
    layers = stack_report(
        model, bits, shift, initial_residual=residual, identity_map=theta, multiplier=multiplier, terms=2
    )
    assert len(layers) == depth - 2
    for layer in layers:
        holds(layer)
        assert layer.stack is not None
        assert 0 < layer.stack.carried <= layer.stack.bound * (1 + ROUNDING)
    assert layers[0].stack.carried == pytest.approx(layers[0].carried)  # type: ignore[union-attr]
    assert layers[0].stack.bound == layers[0].bound  # type: ignore[union-attr]


def test_errors_of_a_stack_stay_bounded() -> None:
    """The residual and the map make a layer contract: a deeper stack is not further off than a geometric series."""
    model = GCN(WIDTH, 8, 40, 3)
    with torch.no_grad():
        for conv in model.convs[1:-1]:
            conv.lin.weight.mul_(0.5 / torch.linalg.matrix_norm(conv.lin.weight, 2))
    layers = stack_report(model, 8)
    bounds = [layer.stack.bound for layer in layers]  # type: ignore[union-attr]
    own = max(layer.bound for layer in layers)  # type: ignore[type-var]
    assert max(bounds) <= own / 0.1  # type: ignore[operator]


def test_a_stack_without_a_known_activation_has_no_common_bound() -> None:
    layers = stack_report(GCN(WIDTH, 8, 6, 3, norm="batch_norm"), 4)
    assert layers[0].stack is not None
    assert [layer.stack for layer in layers[1:]] == [None] * 3
    for layer in layers:
        holds(layer)


@pytest.mark.parametrize("model", [GraphSAGE, GAT])
@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_layers_of_other_stacks_stay_within_their_bound(multiplier: float, model: Any) -> None:
    for v2 in (False, True) if model is GAT else (None,):
        options = {} if v2 is None else {"v2": v2}
        for layer in stack_report(model(WIDTH, 8, 6, 3, **options), 4, -0.4, multiplier=multiplier):
            assert layer.carried > 0
            assert layer.stack is None
            holds(layer)


def test_full_precision_has_no_error() -> None:
    layer = report(GCNConv(WIDTH, 6), (features(), graph()), QuantConfig(bits=32))
    assert (layer.error, layer.carried, layer.bound) == (0, 0, 0)


def test_report_of_a_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin, self.prop = GCNConv(WIDTH, 8), nn.Linear(8, 4), SMPropagation(5)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.prop(self.lin(self.conv(x, edge_index).relu()), edge_index)

    data = Data(x=features(), edge_index=to_undirected(graph()))
    model = Net()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), data).train()
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    found = qgnn.error_report(qmodel, data)
    assert [layer.name for layer in found.layers] == ["conv", "prop"]
    operator = gcn_graph(data.edge_index, None, NODES, dtype=torch.float64)
    with torch.no_grad():
        out = model.double()(data.x.double(), data.edge_index)
    expected = float((out * (out - operator.apply(out))).sum())
    assert found.layers[1].float_energy == pytest.approx(expected, rel=1e-6)
    assert found.layers[1].energy == pytest.approx(expected, rel=0.2)
    assert "prop" in str(found)
    assert qmodel.training
    for name, value in qmodel.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="quantize_model"):
        qgnn.error_report(model, data)
