"""A ``torch_sparse.SparseTensor`` as the graph of converted and packed layers: what they compute on its edges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv, SGConv
from torch_geometric.typing import SparseTensor, torch_sparse

import qgnn_plugin as qgnn

NODES, EDGES, WIDTH, FEATURES = 20, 120, 8, 3


class Sparse(SparseTensor):
    """The part of ``SparseTensor`` that layers read; the real one has no wheel for every version of torch."""

    def __init__(self, row: Tensor, col: Tensor, value: Tensor | None) -> None:
        self.parts = row, col, value

    def coo(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.parts

    def size(self, dim: int) -> int:
        return NODES

    def sparse_sizes(self) -> tuple[int, int]:
        return NODES, NODES

    def csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        rowptr = torch.searchsorted(self.parts[0], torch.arange(NODES + 1))
        return rowptr, *self.parts[1:]

    def set_value(self, value: Tensor, layout: str) -> Sparse:
        assert (layout, value.size(0)) == ("coo", self.parts[0].numel())
        return Sparse(*self.parts[:2], value)


def set_diag(adj: Sparse) -> Sparse:
    """Its self-loops, how many there are of one, replaced by one per node; rows in order, columns too."""
    row, col, _ = adj.coo()
    kept, nodes = row != col, torch.arange(NODES)
    row, col = torch.cat([row[kept], nodes]), torch.cat([col[kept], nodes])
    order = (row * NODES + col).argsort(stable=True)
    return Sparse(row[order], col[order], None)


@pytest.fixture
def edge_index() -> Tensor:
    """Edges in the order of a ``SparseTensor``, self-loops and edges that are there twice among them."""
    edges = torch.randint(NODES, (2, EDGES), generator=torch.Generator().manual_seed(0))
    edges[:, 1], edges[:, 2], edges[1, 3] = edges[:, 0], 5, edges[0, 3]
    return edges[:, (edges[1] * NODES + edges[0]).argsort()]


def sparse(edge_index: Tensor, value: Tensor | None = None) -> Sparse:
    return Sparse(edge_index[1], edge_index[0], value)


def models(layer: Any, *args: Any) -> list[Any]:
    """The converted layer and the packed one."""
    qmodel = qgnn.calibrate(qgnn.quantize_model(layer, bits=4), [args], method="ranges").eval()
    return [qmodel, qgnn.pack_model(copy.deepcopy(qmodel))]


LAYERS = {
    "GCNConv": lambda: GCNConv(WIDTH, 8, add_self_loops=False),
    "SGConv": lambda: SGConv(WIDTH, 8, K=2, add_self_loops=False),
    "GINConv": lambda: GINConv(torch.nn.Linear(WIDTH, 8)),
    "SAGEConv": lambda: SAGEConv(WIDTH, 8),
    "GATConv": lambda: GATConv(WIDTH, 4, heads=2),
    "GATConv, loops as they are": lambda: GATConv(WIDTH, 4, heads=2, add_self_loops=False),
    "GATv2Conv": lambda: GATv2Conv(WIDTH, 4, heads=2),
}

NOT_READ = ("GINConv", "SAGEConv", "GATConv", "GATConv, loops as they are")


@pytest.mark.parametrize(
    ("name", "values"), [*((name, "none") for name in LAYERS), *((name, "features") for name in NOT_READ)]
)
def test_results_are_those_of_its_edges(name: str, values: str, edge_index: Tensor) -> None:
    """Repeated edges count as often as they are there; values that a layer does not read may be anything."""
    x, value = torch.randn(NODES, WIDTH), torch.rand(EDGES, FEATURES) if values == "features" else None
    for model in models(LAYERS[name](), x, edge_index):
        torch.testing.assert_close(model(x, sparse(edge_index, value)), model(x, edge_index))


@pytest.mark.parametrize("make", [GATConv, GATv2Conv])
@pytest.mark.parametrize("loops", [False, True])
def test_attention_weights_are_values_of_the_matrix(
    make: Any, loops: bool, edge_index: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_sparse, "set_diag", set_diag, raising=False)
    x, adj = torch.randn(NODES, WIDTH), sparse(edge_index)
    expected = set_diag(adj) if loops else adj
    for model in models(make(WIDTH, 4, heads=2, add_self_loops=loops), x, edge_index):
        out, found = model(x, adj, return_attention_weights=True)
        *pairs, alpha = found.coo()
        row, _ = pairs
        assert torch.equal(torch.stack(pairs), torch.stack(expected.coo()[:2]))
        torch.testing.assert_close(torch.zeros(NODES, 2).index_add(0, row, alpha), torch.ones(NODES, 2))
        torch.testing.assert_close(out, model(x, edge_index))
        want, (edges, weights) = model(x, edge_index, return_attention_weights=True)
        of_edges = weights[(edges[1] * NODES + edges[0]).argsort(stable=True)]
        torch.testing.assert_close((out, alpha), (want, of_edges))


@pytest.mark.parametrize("make", [GATConv, GATv2Conv])
def test_values_are_edge_features_of_attention(make: Any, edge_index: Tensor) -> None:
    x, features = torch.randn(NODES, WIDTH), torch.rand(EDGES, FEATURES)
    layer = make(WIDTH, 4, heads=2, add_self_loops=False, edge_dim=FEATURES)
    for model in models(layer, x, edge_index, features):
        want = model(x, edge_index, features)
        torch.testing.assert_close(model(x, sparse(edge_index, features)), want)
        torch.testing.assert_close(model(x, sparse(edge_index), features), want)


@pytest.mark.parametrize("make", [GATConv, GATv2Conv])
def test_features_of_added_self_loops_are_refused(make: Any, edge_index: Tensor) -> None:
    x, features = torch.randn(NODES, WIDTH), torch.rand(EDGES, FEATURES)
    for model in models(make(WIDTH, 4, heads=2, edge_dim=FEATURES), x, edge_index, features):
        with pytest.raises(ValueError, match=r"edge_dim=3.*pass an edge_index, or add_self_loops=False"):
            model(x, sparse(edge_index, features))
    for model in models(make(WIDTH, 4, heads=2), x, edge_index):
        with pytest.raises(ValueError, match=r"got 'edge_attr'.*pass an edge_index, or add_self_loops=False"):
            model(x, sparse(edge_index), features)


def test_improved_loops_of_a_matrix_that_has_some(edge_index: Tensor) -> None:
    """Loops of weight 2 take the place of those that are there (``fill_diag``)."""
    layer, x = GCNConv(WIDTH, 8, improved=True), torch.randn(NODES, WIDTH)
    plain = edge_index[:, edge_index[0] != edge_index[1]]
    for model in models(layer, x, plain, torch.ones(plain.size(1))):
        torch.testing.assert_close(model(x, sparse(edge_index)), model(x, plain, torch.ones(plain.size(1))))


def test_watched_layers_propagate_by_it(edge_index: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a ``SparseTensor``, ``gcn_norm`` returns the matrix alone."""
    weight = torch.rand(EDGES)
    operator = torch.zeros(NODES, NODES).index_put((edge_index[1], edge_index[0]), weight, accumulate=True)
    monkeypatch.setattr("qgnn_plugin.layers.watched.gcn_norm", lambda *args, **kwargs: sparse(edge_index, weight))
    monkeypatch.setattr("torch_geometric.nn.conv.sg_conv.spmm", lambda adj, x, reduce: operator @ x)
    x, seen = torch.randn(NODES, WIDTH), []
    for model in models(SGConv(WIDTH, 8, K=2, bias=False), x, edge_index):
        model.register_propagate_forward_hook(lambda layer, args, out: seen.append((args[-1]["x"], out)))
        model(x, sparse(edge_index))
    assert len(seen) == 4
    for sent, out in seen:
        torch.testing.assert_close(out, operator @ sent)
