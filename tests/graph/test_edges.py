"""Edges and their weights as PyG takes them, and what is said where they are wrong, on converted and packed layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import APPNP, GATConv, GCNConv, GINConv, MessagePassing, SAGEConv, SGConv, SSGConv, TAGConv

import qgnn_plugin as qgnn

NODES, EDGES, FEATURES = 30, 150, 8

WEIGHTED: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: GCNConv(FEATURES, 4),
    "GCN without loops": lambda: GCNConv(FEATURES, 4, add_self_loops=False),
    "GCN as it is": lambda: GCNConv(FEATURES, 4, add_self_loops=False, normalize=False),
    "GCN improved": lambda: GCNConv(FEATURES, 4, improved=True),
    "APPNP": lambda: APPNP(2, 0.1),
    "SG": lambda: SGConv(FEATURES, 4, K=2),
    "SSG": lambda: SSGConv(FEATURES, 4, alpha=0.1, K=2),
    "TAG": lambda: TAGConv(FEATURES, 4, K=2),
}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "SAGE": lambda: SAGEConv(FEATURES, 4),
    "GIN": lambda: GINConv(nn.Linear(FEATURES, 4)),
    "GAT": lambda: GATConv(FEATURES, 4),
}
LAYERS = {**WEIGHTED, **PLAIN}


def graph(nodes: int = NODES, num_edges: int = EDGES) -> Tensor:
    return torch.randint(nodes, (2, num_edges))


def forms(layer: nn.Module, *args: Any) -> list[nn.Module]:
    qmodel = qgnn.calibrate(qgnn.quantize_model(layer, bits=8), args).eval()
    return [qmodel, qgnn.pack_model(qmodel)]


@cache
def prepared(name: str) -> list[nn.Module]:
    """Converted and packed, with ranges from a graph without weights."""
    return forms(LAYERS[name](), torch.randn(NODES, FEATURES), graph())


@pytest.mark.parametrize("name", WEIGHTED)
@torch.no_grad()
def test_weights_as_a_column_are_weights(name: str) -> None:
    x, edge_index, weight = torch.randn(NODES, FEATURES), graph(), torch.rand(EDGES) + 0.1
    layer = WEIGHTED[name]()
    expected = layer(x, edge_index, weight.view(-1, 1))
    for model in forms(layer, x, edge_index, weight.view(-1, 1)):
        out = model(x, edge_index, weight.view(-1, 1))
        assert torch.equal(out, model(x, edge_index, weight))
        assert float((out - expected).norm() / expected.norm()) < 0.1
        for same in (weight.double(), weight.clone().requires_grad_(), nn.Parameter(weight.view(-1, 1))):
            assert torch.equal(model(x, edge_index, same), out)


@pytest.mark.parametrize("name", WEIGHTED)
@torch.no_grad()
def test_whole_and_boolean_weights_are_numbers(name: str) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), graph()
    for weight in (torch.randint(1, 4, (EDGES,)), torch.rand(EDGES) < 0.9):
        for model in forms(WEIGHTED[name](), x, edge_index, weight.float()):
            assert torch.equal(model(x, edge_index, weight), model(x, edge_index, weight.float()))


WRONG_WEIGHTS: dict[str, tuple[Any, str]] = {
    "short": (torch.rand(EDGES - 1), rf"shape \[{EDGES}\] or \[{EDGES}, 1\], one per edge \(got \[{EDGES - 1}\]\)"),
    "long": (torch.rand(EDGES + 1), r"one per edge"),
    "wide": (torch.rand(EDGES, 2), rf"one per edge \(got \[{EDGES}, 2\]\)"),
    "row": (torch.rand(1, EDGES), r"one per edge"),
    "scalar": (torch.tensor(1.0), r"one per edge \(got \[\]\)"),
    "list": ([1.0] * EDGES, r"dense tensor of real numbers \(got list\); use torch\.as_tensor"),
    "array": (np.ones(EDGES), r"dense tensor of real numbers \(got ndarray\)"),
    "complex": (torch.ones(EDGES, dtype=torch.complex64), r"real numbers \(got torch\.complex64"),
    "NaN": (torch.full((EDGES,), torch.nan), r"[Ff]inite 'edge_weight'"),
    "infinity": (torch.full((EDGES,), torch.inf), r"[Ff]inite 'edge_weight'"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
@pytest.mark.parametrize("name", ["GCN", "GCN as it is", "APPNP", "TAG"])
def test_wrong_weights_are_refused(name: str, wrong: str) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), graph()
    weight, message = WRONG_WEIGHTS[wrong]
    for model in prepared(name):
        with pytest.raises((ValueError, TypeError), match=message):
            model(x, edge_index, weight)


@pytest.mark.parametrize("learned", [False, True])
def test_weights_whose_sum_has_no_root_are_refused(learned: bool) -> None:
    x, edge_index, weight = torch.randn(NODES, FEATURES), graph(), torch.rand(EDGES)
    weight[edge_index[1] == 3] = -5.0
    edge_index[1, 0], weight[0] = 3, -5.0
    for model in forms(GCNConv(FEATURES, 4), x, edge_index)[: 1 if learned else 2]:  # a packed one learns nothing
        with pytest.raises(ValueError, match=r"sum of at least 0 into every node.*at node 3\).*normalize=False"):
            model(x, edge_index, weight.requires_grad_(learned))
    for model in forms(GCNConv(FEATURES, 4, normalize=False, add_self_loops=False), x, edge_index, weight.detach()):
        assert model(x, edge_index, weight.detach()).isfinite().all()


WRONG_EDGES: dict[str, tuple[Any, str]] = {
    "floats": (torch.zeros(2, 5), r"integer type \(got torch\.float32\)"),
    "no edges, of floats": (torch.tensor([[], []]), r"integer type \(got torch\.float32\)"),
    "booleans": (torch.ones(2, 5, dtype=torch.bool), r"integer type \(got torch\.bool\)"),
    "three rows": (torch.zeros(3, 5, dtype=torch.long), r"shape \[2, E\] \(got \[3, 5\]\)"),
    "transposed": (torch.zeros(5, 2, dtype=torch.long), r"shape \[2, E\] \(got \[5, 2\]\)"),
    "one dimension": (torch.zeros(10, dtype=torch.long), r"shape \[2, E\] \(got \[10\]\)"),
    "list": ([[0, 1], [1, 0]], r"a tensor, an EdgeIndex or a SparseTensor \(got list\)"),
    "array": (np.zeros((2, 5), np.int64), r"a tensor, an EdgeIndex or a SparseTensor \(got ndarray\)"),
    "nothing": (None, r"a tensor, an EdgeIndex or a SparseTensor \(got NoneType\)"),
    "too large": (torch.tensor([[0, NODES], [1, 2]]), r"in the interval \[0, 30\) \(got 0 to 30\)"),
    "a loop too large": (torch.tensor([[0, NODES], [1, NODES]]), r"in the interval \[0, 30\)"),
    "negative": (torch.tensor([[0, 1], [-1, 2]]), r"in the interval \[0, 30\) \(got -1"),
    "beyond 32 bits": (torch.tensor([[0, 2**32 + 1], [1, 2]]), r"in the interval \[0, 30\)"),
}


@pytest.mark.parametrize("wrong", WRONG_EDGES)
@pytest.mark.parametrize("name", ["GCN", "GCN as it is", "TAG", *PLAIN])
def test_wrong_edges_are_refused(name: str, wrong: str) -> None:
    x = torch.randn(NODES, FEATURES)
    edge_index, message = WRONG_EDGES[wrong]
    if (name, wrong) == ("GAT", "a loop too large"):
        return  # replaced by loops that exist, as in PyG
    for model in prepared(name):
        with pytest.raises((ValueError, TypeError), match=message):
            model(x, edge_index)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_integers_of_any_width_are_edges(name: str) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), graph()
    for model in prepared(name):
        expected = model(x, edge_index)
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
            assert torch.equal(model(x, edge_index.to(dtype)), expected)


def matrix(edge_index: Tensor, layout: str, shape: tuple[int, int], values: Tensor | None = None) -> Tensor:
    values = torch.ones(edge_index.size(1)) if values is None else values
    coo = torch.sparse_coo_tensor(edge_index.flip(0), values, shape)
    return {"coo": coo, "csr": coo.coalesce().to_sparse_csr(), "csc": coo.coalesce().to_sparse_csc()}[layout]


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_of_another_size_is_refused(name: str, layout: str) -> None:
    x = torch.randn(NODES, FEATURES)
    for model in prepared(name):
        for size in (NODES - 2, NODES + 2):
            with pytest.raises(ValueError, match=rf"(?s)(?=.*(targets|source|target))(?=.*\b{size}\b)"):
                model(x, matrix(graph(NODES - 2), layout, (size, size)))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")
def test_repeated_entries_of_a_matrix_add_up(name: str) -> None:
    """As in PyG, which coalesces; attention knows no values."""
    x, edge_index, values = torch.randn(NODES, FEATURES), graph(), torch.rand(EDGES)
    edge_index[:, 1] = edge_index[:, 0]
    adj = matrix(edge_index, "coo", (NODES, NODES), values)
    assert not adj.is_coalesced()
    for model in prepared(name):
        expected = model(x, adj.coalesce())
        assert torch.equal(model(x, adj), expected)
        assert torch.equal(model(x, adj.coalesce().to_sparse_csr()), expected)
        assert torch.equal(model(x, adj.coalesce().to_sparse_csc()), expected)


@pytest.mark.parametrize("sort_order", [None, "row", "col"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_edge_index_objects_of_any_order(name: str, sort_order: str | None) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), graph()
    if sort_order is not None:
        edge_index = edge_index[:, edge_index[0 if sort_order == "row" else 1].argsort(stable=True)]
    given = EdgeIndex(edge_index, sparse_size=(NODES, NODES), sort_order=sort_order)
    for model in prepared(name):
        assert torch.equal(model(x, given), model(x, edge_index))


@pytest.mark.parametrize("fmt", ["edge_index", "EdgeIndex", "coo", "csr"])
@pytest.mark.parametrize("nodes", [0, 3])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")
def test_graphs_without_edges_or_nodes(name: str, nodes: int, fmt: str) -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    edge_index: Any = {
        "edge_index": empty,
        "EdgeIndex": EdgeIndex(empty, sparse_size=(nodes, nodes)),
    }.get(fmt)
    if edge_index is None:
        edge_index = (
            matrix(empty, fmt, (nodes, nodes)).coalesce() if fmt == "coo" else matrix(empty, fmt, (nodes, nodes))
        )
    x = torch.randn(NODES, FEATURES)
    converted, packed = (model(x[:nodes], edge_index) for model in prepared(name))
    assert packed.shape == LAYERS[name]()(x[:nodes], empty).shape
    assert packed.isfinite().all()
    assert torch.equal(packed, converted)


class Product(MessagePassing):
    """Its adjacency is kept for the backward pass, at the version it had."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        out: Tensor = self.propagate(adjacency, x=x)
        return out

    def message(self, x_j: Tensor) -> Tensor:
        return x_j

    def message_and_aggregate(self, adjacency: Tensor, x: Tensor) -> Tensor:
        return adjacency @ x


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_matrix_of_the_caller_is_only_read(layout: torch.layout) -> None:
    matrix = torch.rand(NODES, NODES).to_sparse(layout=layout)
    for bits in (4, 32):
        x = torch.randn(NODES, FEATURES, requires_grad=True)
        qgnn.quantize_model(Product(), bits=bits).train()(x, matrix).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, matrix.to_dense().sum(0)[:, None].expand_as(x))
    assert matrix._version == 0
