"""Features of several samples on one graph, ``[*, N, F]``: each sample gets what it gets alone, in every form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import erdos_renyi
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    GCNConv,
    GINConv,
    GraphConv,
    LGConv,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
)
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation

NODES, WIDTH = 6, 8
GRAPH = to_undirected(erdos_renyi(NODES, 10, seed=1).edge_index)
WEIGHT = (GRAPH[0] + 1.0) * (GRAPH[1] + 1.0) / 30


def _gin(**options: Any) -> GINConv:
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    return GINConv(network, train_eps=True, **options)


# What each takes, and whether it takes edge weights.
LAYERS: dict[str, tuple[Callable[..., nn.Module], bool]] = {
    "GCNConv": (lambda **o: GCNConv(WIDTH, 4, **o), True),
    "SAGEConv": (lambda **o: SAGEConv(WIDTH, 4, **o), False),
    "SAGEConv wider": (lambda **o: SAGEConv(WIDTH, 20, aggr="sum", normalize=True, project=True, **o), False),
    "SAGEConv max": (lambda **o: SAGEConv(WIDTH, 4, aggr="max", **o), False),
    "GINConv": (_gin, False),
    "APPNP": (lambda **o: APPNP(3, 0.1, **o), True),
    "SMPropagation": (lambda **o: SMPropagation(3, 0.1, **o), True),
    "SGConv": (lambda **o: SGConv(WIDTH, 4, K=2, **o), True),
    "SSGConv": (lambda **o: SSGConv(WIDTH, 20, alpha=0.1, K=2, **o), True),
    "TAGConv": (lambda **o: TAGConv(WIDTH, 4, K=2, **o), True),
    "LGConv": (lambda **o: LGConv(**o), True),
    "GraphConv": (lambda **o: GraphConv(WIDTH, 4, **o), True),
}


class Model(nn.Module):
    """A convolution between two linear maps."""

    def __init__(self, conv: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv, nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Any, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        args = () if edge_weight is None else (edge_weight,)
        return self.head(self.norm(self.conv(x, edge_index, *args)).relu())


def _model(name: str, **options: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    conv, weighted = LAYERS[name][0](**options), LAYERS[name][1]
    width = conv(torch.randn(NODES, WIDTH), GRAPH).size(-1)
    return Model(conv, width).eval(), (GRAPH, WEIGHT) if weighted else (GRAPH,)


@pytest.mark.parametrize("multiplier", [0.0, 0.4])
@pytest.mark.parametrize("name", LAYERS)
def test_samples_do_not_mix(name: str, multiplier: float, tmp_path: Path) -> None:
    """Converted, packed and loaded; with an acting multiplier, with ranges of every kind."""
    model, graph = _model(name)
    x = torch.randn(2 * NODES, NODES, WIDTH)
    for granularity in ("tensor",) if multiplier == 0 else ("channel", "node", "row"):
        config = QuantConfig(bits=8, granularity=granularity, smp=SMPConfig(multiplier=multiplier))  # type: ignore
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, config=config), (x, *graph)).eval()
        packed = qgnn.pack_model(qmodel)
        alone = torch.stack([qmodel(sample, *graph) for sample in x])
        for samples in (1, 3, NODES, 2 * NODES):
            assert torch.equal(qmodel(x[:samples], *graph), alone[:samples])
            assert torch.equal(packed(x[:samples], *graph), alone[:samples])
        assert torch.equal(packed(x[:6].view(2, 3, NODES, WIDTH), *graph), alone[:6].view(2, 3, NODES, -1))
        assert qmodel(x[:0], *graph).shape == packed(x[:0], *graph).shape == (0, NODES, 3)
    if multiplier == 0:
        expected = model(x, *graph)
        assert (alone - expected).norm() < 0.03 * expected.norm()
        qgnn.save_packed(packed, tmp_path / "packed")
        assert torch.equal(qgnn.load_packed(tmp_path / "packed", model)(x, *graph), alone)


@pytest.mark.parametrize("name", LAYERS)
def test_off_is_bitwise_the_original_and_training_measures(name: str) -> None:
    """At 32 bits; the constraint of the samples together is measured as that of one graph that holds them."""
    model, graph = _model(name)
    x = torch.randn(3, NODES, WIDTH)
    qmodel = qgnn.quantize_model(model, bits=32)
    assert torch.equal(qmodel(x, *graph), model(x, *graph))
    for bits in (32, 8):
        qmodel = qgnn.quantize_model(model, bits=bits).train()
        out = qmodel(x, *graph)
        out.sum().backward()
        assert out.shape == (3, NODES, 3)
        if (constraint := qmodel.conv.constraint) is not None:
            state = qmodel.conv.constraint_state
            single = [_measured(qmodel, sample, graph) for sample in x]
            for value, parts in zip((state.energy, state.bound), zip(*single, strict=True), strict=True):
                torch.testing.assert_close(value, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-5)
            assert constraint >= 0


def _measured(qmodel: nn.Module, x: Tensor, graph: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    qmodel(x, *graph)
    return qmodel.conv.constraint_state.energy, qmodel.conv.constraint_state.bound


@pytest.mark.parametrize("name", ["SAGEConv", "SAGEConv max", "GINConv"])
def test_other_node_dimensions(name: str) -> None:
    """Nodes first, ``[N, *, F]``; a dimension that holds features is refused by name."""
    model, graph = _model(name, node_dim=0)
    x = torch.randn(NODES, 5, WIDTH)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), (x, *graph)).eval()
    expected = torch.stack([qmodel(x[:, t], *graph) for t in range(5)], 1)
    assert torch.equal(qmodel(x, *graph), expected)
    assert torch.equal(qgnn.pack_model(qmodel)(x, *graph), expected)
    assert (expected - model(x, *graph)).norm() < 0.03 * expected.norm()
    qmodel.conv.node_dim = -1
    with pytest.raises(ValueError, match=r"\[\*, N, F\] in 'conv'"):
        qmodel(x, *graph)


@pytest.mark.parametrize("root_weight", [True, False])
@pytest.mark.parametrize("name", ["SAGEConv", "SAGEConv wider", "GINConv"])
def test_pairs(name: str, root_weight: bool) -> None:
    """Samples of both kinds of nodes, or one set of targets for all of them, as PyG broadcasts them."""
    options = {} if name == "GINConv" else {"root_weight": root_weight}
    model, _ = _model(name, **options)
    targets = 7
    graph = torch.stack([torch.randint(NODES, (30,)), torch.randint(targets, (30,))])
    for shape in ((3, targets, WIDTH), (targets, WIDTH)):
        pair = torch.randn(3, NODES, WIDTH), torch.randn(shape)
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), (pair, graph)).eval()
        both = zip(pair[0], pair[1].expand(3, targets, WIDTH), strict=True)
        expected = torch.stack([qmodel(sample, graph) for sample in both])
        assert torch.equal(qmodel(pair, graph), expected)
        assert torch.equal(qgnn.pack_model(qmodel)(pair, graph), expected)
        assert (expected - model(pair, graph)).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GINConv", "APPNP", "TAGConv", "GraphConv"])
def test_errors_are_reported(name: str) -> None:
    """The errors of all samples together; bounds where a propagation has them."""
    model, graph = _model(name)
    x = torch.randn(3, NODES, WIDTH)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=4), (x, *graph)).eval()
    assert "conv" in str(qgnn.error_report(qmodel, (x, *graph)))
