"""Aggregations and poolings between quantized layers: what is inside them is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, GraphConv, SAGEConv, aggr
from torch_geometric.utils import to_dense_adj, to_dense_batch

import qgnn_plugin as qgnn

WIDTH, GRAPHS, SIZE = 16, 4, 10
BATCH = torch.arange(GRAPHS * SIZE) // SIZE


def _edges() -> Tensor:
    """Edges inside of each graph, sorted by target."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(SIZE, (2, 120), generator=generator) + SIZE * torch.randint(
        GRAPHS, (120,), generator=generator
    )
    return edge_index[:, edge_index[1].argsort(stable=True)]


EDGES = _edges()
DEGREES = torch.bincount(torch.bincount(EDGES[1], minlength=GRAPHS * SIZE))


def _net(out: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, out), nn.ReLU())


class Readout(nn.Module):
    def __init__(self, pool: Callable[..., Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.conv, self.pool, self.head = GCNConv(WIDTH, WIDTH), pool, nn.Linear(width, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x, edge_index).relu(), batch))


class Neighbours(nn.Module):
    """An aggregation inside of a convolution."""

    def __init__(self, aggregation: Any) -> None:
        super().__init__()
        self.conv = SAGEConv(WIDTH, 5, aggr=aggregation)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.conv(x, edge_index)


class Coarse(nn.Module):
    def __init__(self, pool: nn.Module, place: int) -> None:
        super().__init__()
        self.conv, self.pool, self.after, self.place = GCNConv(WIDTH, WIDTH), pool, GraphConv(WIDTH, 3), place

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        out = self.pool(self.conv(x, edge_index).relu(), edge_index, batch=batch)
        return pyg.global_mean_pool(self.after(out[0], out[1]), out[self.place], GRAPHS)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.assign = pyg.DenseGCNConv(WIDTH, 8), pyg.DenseSAGEConv(WIDTH, 5)
        self.gin, self.attend = pyg.DenseGINConv(nn.Linear(8, 8)), pyg.DenseGATConv(8, 4, heads=2)
        self.pool = pyg.DMoNPooling([8, 8], 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h, mask = to_dense_batch(x, batch)
        adj = to_dense_adj(edge_index, batch, max_num_nodes=h.size(1))
        h, adj, link, entropy = pyg.dense_diff_pool(self.embed(h, adj, mask), adj, self.assign(h, adj, mask), mask)
        _, h, adj, *losses = self.pool(self.attend(self.gin(h, adj), adj), adj)
        return h.mean(1) + link + entropy + sum(losses)


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.head = pyg.MemPooling(WIDTH, 8, heads=2, num_clusters=3), nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(x, batch)[0])


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = pyg.GraphUNet(WIDTH, 8, 3, depth=2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.net(x, edge_index, batch)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: Readout(aggr.SoftmaxAggregation(learn=True, channels=WIDTH)),
    "power mean": lambda: Readout(aggr.PowerMeanAggregation(learn=True)),
    "median": lambda: Readout(aggr.MedianAggregation()),
    "quantile": lambda: Readout(aggr.QuantileAggregation([0.2, 0.8]), 2 * WIDTH),
    "LSTM": lambda: Readout(aggr.LSTMAggregation(WIDTH, 8), 8),
    "GRU": lambda: Readout(aggr.GRUAggregation(WIDTH, 8), 8),
    "Set2Set": lambda: Readout(aggr.Set2Set(WIDTH, 3), 2 * WIDTH),
    "degrees": lambda: Readout(
        aggr.DegreeScalerAggregation(["mean", "max"], ["identity", "amplification"], DEGREES), 4 * WIDTH
    ),
    "sort": lambda: Readout(aggr.SortAggregation(4), 4 * WIDTH),
    "multiset": lambda: Readout(aggr.GraphMultisetTransformer(WIDTH, 5, heads=2)),
    "attention": lambda: Readout(aggr.AttentionalAggregation(nn.Linear(WIDTH, 1), _net())),
    "deep sets": lambda: Readout(aggr.DeepSetsAggregation(_net(), _net())),
    "set transformer": lambda: Readout(aggr.SetTransformerAggregation(WIDTH, heads=2)),
    "LCM": lambda: Readout(aggr.LCMAggregation(WIDTH, 8), 8),
    "patches": lambda: Readout(aggr.PatchTransformerAggregation(WIDTH, WIDTH, 2, 8, 1, heads=2)),
    "MLP": lambda: Readout(aggr.MLPAggregation(WIDTH, 8, SIZE, num_layers=1), 8),
    "several": lambda: Readout(
        aggr.MultiAggregation(
            ["mean", "std"], mode="attn", mode_kwargs={"in_channels": WIDTH, "out_channels": WIDTH, "num_heads": 2}
        )
    ),
    "mean": lambda: Readout(pyg.global_mean_pool),
    "max": lambda: Readout(pyg.global_max_pool),
    "sum": lambda: Readout(pyg.global_add_pool),
    "equilibrium": lambda: Readout(aggr.EquilibriumAggregation(WIDTH, 8, [10], grad_iter=2), 8),
    "neighbours, LSTM": lambda: Neighbours("lstm"),
    "neighbours, softmax": lambda: Neighbours("softmax"),
    "neighbours, median": lambda: Neighbours("median"),
    "neighbours, deep sets": lambda: Neighbours(aggr.DeepSetsAggregation(_net(), _net())),
    "TopK": lambda: Coarse(pyg.TopKPooling(WIDTH), 3),
    "SAG": lambda: Coarse(pyg.SAGPooling(WIDTH, GNN=GCNConv), 3),
    "ASAP": lambda: Coarse(pyg.ASAPooling(WIDTH), 3),
    "edges": lambda: Coarse(pyg.EdgePooling(WIDTH), 2),
    "DiffPool and dense convolutions": Dense,
    "memory": Memory,
    "GraphUNet": Unet,
}
FLOAT = {"memory": 0.6, "DiffPool and dense convolutions": 0.9, "multiset": 0.9}  # keys, seeds, attention vectors


@pytest.mark.filterwarnings("ignore:.*stay float:UserWarning", "ignore:Only zeros:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_between_quantized_layers(name: str) -> None:
    args = (torch.randn(GRAPHS * SIZE, WIDTH), EDGES, BATCH)
    model = MODELS[name]().eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [args]).eval()
    sites = qgnn.quantizers(qmodel)
    assert not [key for key, site in sites.items() if not site.is_set and "gap" not in key]
    assert qgnn.summary(qmodel).coverage.share >= FLOAT.get(name, 1.0)  # type: ignore[union-attr]
    with torch.no_grad():
        expected, found = model(*args), qmodel(*args)
        if name not in ("sort", "TopK", "SAG", "ASAP", "edges", "GraphUNet"):  # whose choices a step may change
            assert float((found - expected).norm() / expected.norm()) < 0.1
        packed = qgnn.pack_model(qmodel)
        assert torch.equal(packed(*args), found)
        assert torch.equal(qgnn.quantize_model(model, 32)(*args), expected)
        assert torch.equal(qgnn.restore_model(qmodel)(*args), expected)
    model.train()(*args).square().sum().backward()
    qmodel.train()(*args).square().sum().backward()
    learned = [key for key, p in model.named_parameters() if p.grad is not None]
    assert all(qmodel.get_parameter(key).grad is not None for key in learned)


def test_what_is_differentiated_in_the_forward_pass_stays_as_converted() -> None:
    args = (torch.randn(GRAPHS * SIZE, WIDTH), EDGES, BATCH)
    qmodel = qgnn.calibrate(qgnn.quantize_model(MODELS["equilibrium"](), 8), [args]).eval()
    table = str(qgnn.summary(qgnn.pack_model(qmodel)))
    assert "float: differentiated in the forward pass" in table
