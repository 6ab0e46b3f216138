"""The constraint of every step of a propagation: bounds, schedules, the authors' update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.support import NODES, features, graph
from smp.dense import energy, remaining, walk
from torch import Tensor
from torch_geometric.nn import APPNP, GCNConv
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.graph.adjacency import NormalizedGraph


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", ["SMPropagation", "APPNP"])
def test_larger_multiplier_leaves_less_and_the_bound_is_met(name: str, bits: int) -> None:
    x, edge_index = features(), to_undirected(graph())
    config = SMPConfig(alpha=0.1, eta_lambda=0.3)
    layer: Any = SMPropagation(6, smp=config) if name == "SMPropagation" else APPNP(6, 0.1)
    layer = qgnn.calibrate(qgnn.quantize_model(layer, config=QuantConfig(bits=bits, smp=config)), (x, edge_index))
    ratios = []
    for multiplier in (0.0, 0.05, 0.2, 1.0, 5.0, 50.0):
        layer.multiplier.fill_(multiplier)
        layer.train()(x, edge_index)
        ratios.append(layer.constraint)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 0.1 * ratios[0]
    layer.multiplier.fill_(0.0)
    for _ in range(150):
        layer(x, edge_index)
        state = qgnn.differential_multiplier_step(layer)[""]
    assert 0.9 < state.constraint < 1.05
    assert 0 < state.multiplier < 50


@pytest.mark.parametrize("bits", [32, 4])
def test_products_per_step(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplier of zero costs nothing, and measuring K steps one product more than they take."""
    x, edge_index = features(), graph()
    layer: Any = qgnn.calibrate(qgnn.quantize_model(SMPropagation(5), bits), (x, edge_index))
    products = []
    original = NormalizedGraph.apply

    def apply(self: NormalizedGraph, v: Tensor) -> Tensor:
        products.append(v)
        return original(self, v)

    monkeypatch.setattr(NormalizedGraph, "apply", apply)
    layer.eval()(x, edge_index)
    assert len(products) == (5 if bits == 32 else 0)  # quantized steps sum codes
    products.clear()
    layer.train()(x, edge_index)
    assert len(products) == 6


def test_default_bound_leaves_propagation_alone() -> None:
    layer = SMPropagation(8)
    layer(features(), to_undirected(graph()))
    state = qgnn.differential_multiplier_step(layer)[""]
    assert state.constraint <= 1
    assert state.multiplier == 0


def test_inner_schedule_moves_with_the_steps() -> None:
    edge_index, steps = to_undirected(graph()), 6
    config = SMPConfig(
        alpha=0.05, schedule="inner", eta_lambda=0.2, eta_slack=0.1, damping=0.1, multiplier=0.3, slack=0.5
    )
    x, operator = features().double(), walk(edge_index)
    layer = SMPropagation(steps, smp=config).double()
    h, multiplier, slack, penalty = x, 0.3, 0.5, 0.0
    for _ in range(steps):
        force = max(0.0, multiplier + penalty)
        proposed = -config.eta * ((h - x) + config.mu * (h - operator @ h))
        change = remaining(proposed, operator, config, force)
        violation = energy(change, operator) / (0.05 * energy(h, operator)) - 1 + slack**2
        penalty = config.damping * violation
        slack -= 2 * config.eta_slack * max(0.0, multiplier + penalty) * slack
        multiplier = max(0.0, multiplier + config.eta_lambda * violation)
        h = h + change
    for _ in range(2):  # restarted in every forward
        torch.testing.assert_close(layer(x, edge_index), h)
    assert float(layer.multiplier) == pytest.approx(multiplier)
    assert float(layer.slack) == pytest.approx(slack)
    assert float(layer._buffers["penalty"]) == pytest.approx(penalty)
    torch.testing.assert_close(layer.eval()(x, edge_index), h)
    state = qgnn.differential_multiplier_step(layer)[""]
    assert state.multiplier == pytest.approx(multiplier)  # reported, and left alone


def test_carried_schedule_goes_on_where_it_ended() -> None:
    x, edge_index = features(), to_undirected(graph())
    layer = SMPropagation(3, smp=SMPConfig(alpha=0.01, schedule="inner", eta_lambda=0.01, carry=True))
    outs, values = [], []
    for _ in range(3):
        outs.append(layer(x, edge_index))
        values.append(float(layer.multiplier))
    assert 0 < values[0] < values[1] < values[2]
    assert not torch.equal(outs[0], outs[1])
    other = SMPropagation(3, smp=layer.smp)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, edge_index), layer(x, edge_index))
    before = layer.state_dict()["multiplier"].clone()
    layer.eval()(x, edge_index)
    assert torch.equal(layer.multiplier, before)


def test_reference_is_the_authors_update() -> None:
    """Written out with the incidence matrix and dense products, as in their code."""
    edge_index, steps = to_undirected(graph(self_loops=False)), 10
    x, operator = features().double().requires_grad_(), walk(edge_index)
    factor = operator.diagonal().sqrt()
    pairs = edge_index[:, edge_index[0] < edge_index[1]]
    incidence = torch.zeros(pairs.size(1), NODES, dtype=torch.float64)
    rows = torch.arange(pairs.size(1))
    incidence[rows, pairs[0]], incidence[rows, pairs[1]] = factor[pairs[0]], -factor[pairs[1]]
    torch.testing.assert_close(incidence.t() @ incidence, torch.eye(NODES, dtype=torch.float64) - operator)
    alpha, eta, eta_lambda = 0.1, 0.1, 1e-2  # a faster ascent than 1e-5, so that it shows
    h, multiplier, slack = x, torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    for _ in range(steps):
        u = (1 - (1 + 9) * eta) * h + 9 * eta * operator @ h + eta * x
        gap = u - h
        h = u + 2 * eta * multiplier * operator @ gap
        slack = slack + 2 * 1e-5 * multiplier * slack
        count = (operator != 0).sum()
        multiplier = multiplier + eta_lambda * (alpha * count - slack * slack - (incidence @ gap).square().sum())
    layer = SMPropagation(steps, smp=SMPConfig.reference(eta_lambda=eta_lambda)).double()
    out = layer(x, edge_index)
    torch.testing.assert_close(out, h)
    assert float(layer.multiplier) == pytest.approx(multiplier.item())
    assert float(layer.slack) == pytest.approx(slack.item())
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, h))
    torch.testing.assert_close(ours, theirs)


def test_reference_is_for_propagation_only() -> None:
    config = QuantConfig(smp=SMPConfig.reference())
    assert SMPConfig.from_dict(config.smp.to_dict()) == config.smp
    with pytest.raises(ValueError, match=r"propagation layer.*GCNConv"):
        qgnn.quantize_model(GCNConv(3, 3), config=config)
    with pytest.raises(ValueError, match="'bound' = 'absolute'"):
        SMPConfig.reference(bound="relative")
