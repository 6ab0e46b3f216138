"""Models and graphs shared by the tests of conversion."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import (
    APPNP,
    GAT,
    GCN,
    GIN,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    GraphSAGE,
    LGConv,
    Linear,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
)

import qgnn_plugin as qgnn
from qgnn_plugin.conversion.converted import quantized_layers

NODES, WIDTH, OUT = 40, 12, 6


def graph(self_loops: bool = True, seed: int = 0) -> Tensor:
    """Directed edges ``[2, E]`` in no order, none twice; node 3 is isolated, node 7 has no incoming edge."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.unique(torch.randint(NODES, (2, 200), generator=generator), dim=1)
    keep = (edge_index != 3).all(0) & (edge_index[1] != 7)
    if not self_loops:
        keep &= edge_index[0] != edge_index[1]
    edge_index = edge_index[:, keep]
    return edge_index[:, torch.randperm(edge_index.size(1), generator=generator)]


def features(rows: int = NODES) -> Tensor:
    return torch.randn(rows, WIDTH)


def adjacency(edge_index: Tensor, fmt: str, weight: Tensor | None = None) -> Any:
    """``edge_index`` as one of PyG's adjacency formats; sparse ones carry the weights."""
    if fmt == "edge_index":
        return edge_index
    if fmt == "EdgeIndex":
        return EdgeIndex(edge_index, sparse_size=(NODES, NODES))
    values = torch.ones(edge_index.size(1)) if weight is None else weight
    coo = torch.sparse_coo_tensor(
        edge_index.flip(0), values, (NODES, NODES), check_invariants=False
    ).coalesce()
    return coo if fmt == "coo" else coo.to_sparse_csr()


FORMATS = ("edge_index", "EdgeIndex", "csr", "coo")


def _gin() -> GINConv:
    return GINConv(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, OUT)), train_eps=True)


# Every layer with a conversion of its own, in its variants; each maps [N, WIDTH] features.
CONVS: dict[str, Callable[[], nn.Module]] = {
    "GCNConv": lambda: GCNConv(WIDTH, OUT),
    "GCNConv improved": lambda: GCNConv(WIDTH, OUT, improved=True, bias=False),
    "GCNConv cached": lambda: GCNConv(WIDTH, OUT, cached=True),
    "GCNConv without loops": lambda: GCNConv(WIDTH, OUT, add_self_loops=False),
    "GCNConv not normalized": lambda: GCNConv(WIDTH, OUT, normalize=False),
    "GATConv": lambda: GATConv(WIDTH, OUT, heads=3),
    "GATConv mean": lambda: GATConv(WIDTH, OUT, heads=3, concat=False, residual=True),
    "GATConv without loops": lambda: GATConv(WIDTH, OUT, add_self_loops=False, bias=False),
    "GATv2Conv": lambda: GATv2Conv(WIDTH, OUT, heads=3),
    "GATv2Conv shared": lambda: GATv2Conv(WIDTH, OUT, share_weights=True, residual=True),
    "SAGEConv": lambda: SAGEConv(WIDTH, OUT),
    "SAGEConv wider": lambda: SAGEConv(WIDTH, 2 * WIDTH),
    "SAGEConv sum": lambda: SAGEConv(WIDTH, OUT, aggr="sum", root_weight=False),
    "SAGEConv max": lambda: SAGEConv(WIDTH, OUT, aggr="max"),
    "SAGEConv project": lambda: SAGEConv(WIDTH, OUT, project=True, normalize=True),
    "GINConv": _gin,
    "GraphConv": lambda: GraphConv(WIDTH, OUT),
    "GraphConv mean": lambda: GraphConv(WIDTH, OUT, aggr="mean", bias=False),
    "APPNP": lambda: APPNP(4, 0.1),
    "APPNP cached": lambda: APPNP(4, 0.1, cached=True, dropout=0.3),
    "SGConv": lambda: SGConv(WIDTH, OUT, K=3),
    "SGConv wider": lambda: SGConv(WIDTH, 2 * WIDTH, K=2),
    "SGConv cached": lambda: SGConv(WIDTH, OUT, K=2, cached=True, add_self_loops=False),
    "SSGConv": lambda: SSGConv(WIDTH, OUT, alpha=0.1, K=3),
    "TAGConv": lambda: TAGConv(WIDTH, OUT, K=2),
    "TAGConv not normalized": lambda: TAGConv(WIDTH, OUT, K=1, normalize=False, bias=False),
    "LGConv": lambda: LGConv(),
}


class Summed(GraphConv):
    """A GraphConv with a message of its own: the same one, which nothing knows."""

    def message(self, x_j: Tensor, edge_weight: Optional[Tensor]) -> Tensor:  # noqa: UP045
        return x_j if edge_weight is None else edge_weight.view(-1, 1) * x_j


class Plain(nn.Module):
    """An ordinary model: a convolution, a generic one, a container, a shared layer, an arbitrary forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Linear(WIDTH, 8)
        self.convs = nn.ModuleList([GCNConv(8, 8), Summed(8, 8)])
        self.heads = nn.ModuleDict({"main": nn.Linear(8, OUT), "other": nn.Linear(8, OUT)})
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor, edge_index: Any, *, head: str = "main") -> Tensor:
        x = self.encoder(x)
        for conv in self.convs:
            x = conv(x, edge_index).relu()
        x = self.again(self.norm(self.shared(x)).relu())
        return self.heads[head](x)


# Whole models, [N, WIDTH] features to OUT classes.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: GCN(WIDTH, 8, 2, OUT, norm="batch_norm"),
    "GAT": lambda: GAT(WIDTH, 8, 2, OUT),
    "GraphSAGE": lambda: GraphSAGE(WIDTH, 8, 2, OUT),
    "GIN": lambda: GIN(WIDTH, 8, 2, OUT),
    "Plain": Plain,
}


def through_pickle(model: nn.Module) -> nn.Module:
    """A copy by way of a pickle."""
    return pickle.loads(pickle.dumps(model))


def quantized(model: nn.Module, *args: Any, bits: int = 8, **options: Any) -> nn.Module:
    """Converted, calibrated on one batch of arguments, in eval mode."""
    qmodel = qgnn.quantize_model(model, bits, **options) if "config" not in options else (
        qgnn.quantize_model(model, **options)
    )  # fmt: skip
    return qgnn.calibrate(qmodel, [args], method="ranges").eval()


def names(model: nn.Module) -> list[str]:
    """Those of its converted layers."""
    return list(quantized_layers(model))


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
