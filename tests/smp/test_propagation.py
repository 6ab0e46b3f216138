"""SMPropagation against APPNP and against dense float64 computations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from core.support import FORMATS, NODES, adjacency, features, graph
from smp.dense import dense_steps, energy, walk
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import APPNP, MessagePassing
from torch_geometric.utils import to_undirected

from qgnn_plugin import SMPConfig, SMPropagation


@pytest.mark.parametrize("options", [{}, {"add_self_loops": False}, {"normalize": False}, {"cached": True}])
@pytest.mark.parametrize("fmt", FORMATS)
def test_equals_appnp(fmt: str, options: dict[str, Any]) -> None:
    x, edges = features(), adjacency(graph(self_loops=False), fmt)
    ours, theirs = SMPropagation(10, **options), APPNP(10, 0.1, **options)
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), rtol=1e-5, atol=1e-5)
    assert isinstance(ours, MessagePassing)


def test_edge_weights_and_gradients_equal_appnp() -> None:
    edge_index = graph()
    inputs = [features().double(), torch.rand(edge_index.size(1), dtype=torch.float64)]
    gradients = []
    for layer in (SMPropagation(6, 0.15, dropout=0.0), APPNP(6, 0.15)):
        x, weight = (value.clone().requires_grad_() for value in inputs)
        out = layer(x, edge_index, weight)
        gradients.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("correction", ["proximal", "explicit"])
@pytest.mark.parametrize(("eta", "mu"), [(0.1, 9.0), (0.1, 4.0), (0.3, 2.0), (0.05, 30.0)])
@pytest.mark.parametrize("multiplier", [0.0, 0.4])
def test_descends_as_the_dense_computation_does(eta: float, mu: float, multiplier: float, correction: str) -> None:
    edge_index = to_undirected(graph())
    config = SMPConfig(eta=eta, mu=mu, multiplier=multiplier, correction=correction, alpha=0.5)  # type: ignore[arg-type]
    x, operator = features().double(), walk(edge_index)
    layer = SMPropagation(5, smp=config).double()
    states = dense_steps(x, operator, config, 5, multiplier)
    torch.testing.assert_close(layer(x, edge_index), states[-1])
    torch.testing.assert_close(layer.eval()(x, edge_index), states[-1])
    measured = layer.constraint_state
    assert measured is not None
    for k, (before, after) in enumerate(itertools.pairwise(states)):
        assert float(measured.energy[k]) == pytest.approx(energy(after - before, operator), rel=1e-6)
        assert float(measured.bound[k]) == pytest.approx(0.5 * energy(before, operator), rel=1e-6)
    assert layer.constraint == pytest.approx(
        max(float(e / b) for e, b in zip(measured.energy, measured.bound, strict=True))
    )


def test_absolute_bound_counts_edges_with_loops() -> None:
    edge_index = graph(self_loops=False)
    layer = SMPropagation(2, smp=SMPConfig(bound="absolute", alpha=0.25))
    layer(features(), edge_index)
    assert layer.constraint_state is not None
    assert layer.constraint_state.bound.tolist() == [0.25 * (edge_index.size(1) + NODES)] * 2


class Largest(TorchDispatchMode):
    """The largest tensor that any operation wrote."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self.size = max(self.size, value.numel())
        return out


@pytest.mark.parametrize("multiplier", [0.0, 1.0])
def test_memory_is_linear(multiplier: float) -> None:
    nodes = 3000
    x, edge_index = torch.randn(nodes, 4), to_undirected(torch.randint(nodes, (2, 4 * nodes)))
    layer = SMPropagation(4, smp=SMPConfig(multiplier=multiplier))
    with Largest() as largest:
        layer(x.requires_grad_(), edge_index).sum().backward()
    assert largest.size <= 2 * (edge_index.size(1) + nodes)


def test_dropout_acts_on_edges_in_training_only() -> None:
    x, edge_index = features(), graph()
    layer, plain = SMPropagation(4, dropout=0.5), SMPropagation(4)
    assert not torch.allclose(layer(x, edge_index), plain(x, edge_index))
    assert layer.constraint is not None
    torch.testing.assert_close(layer.eval()(x, edge_index), plain(x, edge_index))


def test_cached_graph_is_that_of_the_first_call() -> None:
    x, edge_index = features(), graph()
    layer = SMPropagation(3, cached=True)
    expected = layer(x, edge_index)
    assert torch.equal(layer(x, graph(seed=1)), expected)
    layer.multiplier.fill_(2.0)
    layer.reset_parameters()
    assert float(layer.multiplier) == 0
    assert not torch.equal(layer(x, graph(seed=1)), expected)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\] \(got 0\)"):
        SMPropagation(3, 0)
    with pytest.raises(ValueError, match="'add'"):
        SMPropagation(3, aggr="mean")
    with pytest.raises(ValueError, match="Expected node features"):
        SMPropagation(3)(torch.randn(NODES), graph())
    layer = SMPropagation(3)
    layer.explain = True
    with pytest.raises(NotImplementedError, match="APPNP"):
        layer(features(), graph())
