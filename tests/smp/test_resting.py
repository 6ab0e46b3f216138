"""Where the bound is far, constraints are measured now and then: nothing else changes, and no bound is missed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core.support import features, graph
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATConv, GCNConv, GINConv, GraphConv, SAGEConv, SGConv
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.smp.constraint import FAR_BELOW, MEASURED_EVERY, ConstraintState

WIDTH = 6
LAYERS = {
    "GCNConv": lambda: GCNConv(WIDTH, WIDTH),
    "SAGEConv": lambda: SAGEConv(WIDTH, WIDTH),
    "GATConv": lambda: GATConv(WIDTH, 3, heads=2),
    "GINConv": lambda: GINConv(nn.Linear(WIDTH, WIDTH)),
    "GraphConv": lambda: GraphConv(WIDTH, WIDTH),
    "APPNP": lambda: APPNP(3, 0.2),
    "SGConv": lambda: SGConv(WIDTH, WIDTH, K=2),
    "SMPropagation": lambda: SMPropagation(3, 0.2),
}


def converted(name: str, bits: int = 4, **smp: Any) -> Any:
    config = QuantConfig(bits=bits, smp=SMPConfig(**smp))
    return qgnn.quantize_model(LAYERS[name](), config=config)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(features().size(0), WIDTH), to_undirected(graph())


def trained(layer: Any, steps: int, *, always: bool) -> list[Tensor]:
    """Outputs of some steps, with every forward pass measured or as they come."""
    x, edge_index = inputs()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05) if list(layer.parameters()) else None
    outputs = []
    for _ in range(steps):
        if always:
            layer._rests = False
        out = layer.train()(x, edge_index)
        outputs.append(out.detach().clone())
        if optimizer is not None and out.requires_grad:
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
        qgnn.differential_multiplier_step(layer)
    return outputs


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_training_is_bitwise_the_same(name: str, bits: int) -> None:
    layer = converted(name, bits, alpha=100.0)
    other = copy.deepcopy(layer)
    torch.manual_seed(1)
    resting = trained(layer, 5, always=False)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    for one, two in zip(resting, trained(other, 5, always=True), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(state, torch.get_rng_state())
    assert layer._rests == (layer.constraint_state is not None)  # a GATConv without quantizers measures nothing
    for key, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_updates_that_change_nothing_are_what_they_would_be(damping: float) -> None:
    """Counted and reported as those that averages of processes ask for, and no longer once anything is written."""
    x, edge_index = inputs()
    model = nn.ModuleList([converted("GCNConv", alpha=100.0, damping=damping), converted("APPNP", alpha=100.0)])
    other = copy.deepcopy(model)
    for k in range(2 * MEASURED_EVERY + 3):
        for layer, same in zip(model, other, strict=True):
            layer.train()(x, edge_index)
            same.train()(x, edge_index)
            assert (layer._constraint_state is None) == (same._constraint_state is None)
        settled = all(layer._unchanged() is not None for layer in model)
        assert settled == (k % MEASURED_EVERY != 0 and k <= MEASURED_EVERY + 5)
        if k == MEASURED_EVERY + 5:  # a slack that alone uses up the bound
            for part in (model, other):
                part[0]._constraint_buffer("slack").fill_(1.0)
                assert part[0]._unchanged() is None
        assert qgnn.differential_multiplier_step(model) == qgnn.differential_multiplier_step(other, reduce=lambda t: t)
        for layer, same in zip(model, other, strict=True):
            assert (layer._rests, layer._updates) == (same._rests, same._updates)
            for ours, theirs in zip(layer._constraint_buffers, same._constraint_buffers, strict=True):
                assert torch.equal(ours, theirs)
    assert model[0].multiplier > 0


@pytest.mark.parametrize("name", LAYERS)
def test_one_forward_pass_of_many_measures(name: str) -> None:
    layer, (x, edge_index) = converted(name, alpha=100.0).train(), inputs()
    measured = []
    for k in range(2 * MEASURED_EVERY + 2):
        before = layer.constraint_state
        layer(x, edge_index)
        if layer.constraint_state is not before:
            measured.append(k)
        reported = qgnn.differential_multiplier_step(layer)[""].constraint
        assert reported == pytest.approx(layer.constraint, rel=1e-5)
    assert measured == [0, MEASURED_EVERY, 2 * MEASURED_EVERY]


@pytest.mark.parametrize(
    "smp", [{"alpha": 0.5}, {"alpha": 100.0, "multiplier": 0.3}, {"alpha": 100.0, "slack": 0.8}], ids=str
)
def test_no_rest_near_the_bound_or_with_a_multiplier(smp: dict[str, Any]) -> None:
    layer, (x, edge_index) = converted("GCNConv", eta_lambda=1e-3, **smp).train(), inputs()
    for _ in range(4):
        before = layer.constraint_state
        layer(x, edge_index)
        assert layer.constraint_state is not before
        qgnn.differential_multiplier_step(layer)
    assert smp.get("multiplier", 0) == 0 or float(layer.multiplier) > 0
    assert smp.get("slack") is not None or smp["alpha"] != 0.5 or layer.constraint > FAR_BELOW


def test_a_bound_that_is_exceeded_later_is_met() -> None:
    """The change grows past its bound while nobody looks: the multiplier moves within so many steps."""
    torch.manual_seed(0)
    layer, (x, edge_index) = converted("GCNConv", alpha=0.1, eta_lambda=0.3).train(), inputs()
    smooth = torch.ones_like(x)  # its own average, on the whole
    layer(smooth, edge_index)
    layer._constraint_state = ConstraintState(torch.tensor(0.1), torch.tensor(1.0))
    qgnn.differential_multiplier_step(layer)
    assert layer._rests
    moved = None
    for k in range(400):
        layer(x, edge_index)
        state = qgnn.differential_multiplier_step(layer)[""]
        if moved is None and state.multiplier > 0:
            moved = k
    assert moved is not None
    assert moved < MEASURED_EVERY
    assert layer.constraint == pytest.approx(1.0, abs=0.05)


def test_layers_measure_in_the_same_pass_and_processes_agree() -> None:
    """Whenever a layer comes to rest; the decision is made from what all processes have measured."""
    layers = nn.ModuleList([converted("GCNConv", alpha=100.0), converted("GCNConv", alpha=100.0)]).train()
    (x, edge_index), passes = inputs(), []
    for k in range(3 * MEASURED_EVERY):
        for index, layer in enumerate(layers):
            before = layer.constraint_state
            if index == 0 or k >= 5:  # the second layer is not used at first
                layer(x, edge_index)
            if layer.constraint_state is not before:
                passes.append((k, index))
        qgnn.differential_multiplier_step(layers)
    assert passes == [(0, 0), (5, 1), *((n * MEASURED_EVERY, i) for n in (1, 2) for i in (0, 1))]

    layer = layers[0]
    layer._rests = False
    layer(x, edge_index)
    over = torch.tensor([[3.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    qgnn.differential_multiplier_step(layers, reduce=lambda table: over)
    assert not layer._rests


def test_resetting_copies_and_restoring() -> None:
    layer, (x, edge_index) = converted("GCNConv", alpha=100.0).train(), inputs()
    layer(x, edge_index)
    qgnn.differential_multiplier_step(layer)
    assert layer._rests
    assert copy.deepcopy(layer)._rests
    with torch.no_grad():
        layer.multiplier.fill_(0.5)
    before = layer.constraint_state
    layer(x, edge_index)
    assert layer.constraint_state is not before  # whoever raised it
    restored = qgnn.restore_model(layer)
    assert not any(name in vars(restored) for name in ("_rests", "_updates"))
