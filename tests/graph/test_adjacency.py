"""Graphs read from every adjacency format, against what PyG's own layers compute on the same format."""

import pytest
import torch
from graphs import GRAPHS, Graph, erdos_renyi
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv, GINConv, SAGEConv

from qgnn_plugin.graph.adjacency import (
    NormalizedGraph,
    edges_of,
    gcn_graph,
    looped_plan,
    mean_graph,
    plain_graph,
)
from qgnn_plugin.kernels.plan import plan_cache

FORMATS = ("edge_index", "EdgeIndex", "csr", "coo")
WIDTH = 5


def adjacency(edge_index: Tensor, num_nodes: int, fmt: str, weight: Tensor | None) -> object:
    """A graph without parallel edges in one of PyG's formats; sparse ones carry the weights."""
    if fmt == "edge_index":
        return edge_index
    if fmt == "EdgeIndex":
        return EdgeIndex(edge_index, sparse_size=(num_nodes, num_nodes))
    values = torch.ones(edge_index.size(1)) if weight is None else weight
    coo = torch.sparse_coo_tensor(edge_index.flip(0), values, (num_nodes, num_nodes)).coalesce()
    return coo if fmt == "coo" else coo.to_sparse_csr()


def simple(graph: Graph, self_loops: bool) -> tuple[Tensor, int]:
    edge_index = torch.unique(graph.edge_index, dim=1)
    if not self_loops:
        edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    order = torch.randperm(edge_index.size(1))
    return edge_index[:, order], graph.num_nodes


def identity(conv: GCNConv | SAGEConv) -> None:
    lin = conv.lin if isinstance(conv, GCNConv) else conv.lin_l
    with torch.no_grad():
        lin.weight.copy_(torch.eye(WIDTH))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"improved": True},
        {"add_self_loops": False},
        {"normalize": False, "add_self_loops": False},
        {"flow": "target_to_source"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")
def test_gcn_operator_is_pygs(
    fmt: str, weighted: bool, self_loops: bool, options: dict[str, object]
) -> None:
    edge_index, num_nodes = simple(erdos_renyi(20, 60), self_loops)
    weight = torch.rand(edge_index.size(1)) + 0.1 if weighted else None
    adj = adjacency(edge_index, num_nodes, fmt, weight)
    given = weight if fmt in ("edge_index", "EdgeIndex") else None
    x = torch.randn(num_nodes, WIDTH)
    conv = GCNConv(WIDTH, WIDTH, bias=False, **options)
    identity(conv)
    if fmt in ("csr", "coo") and options.get("flow"):
        with pytest.raises(ValueError, match=r"source_to_target.*adj_t\.t\(\)"):
            gcn_graph(adj, None, num_nodes, flow="target_to_source")
        return
    names = {"improved", "add_self_loops", "normalize", "flow"} & set(options)
    graph = gcn_graph(adj, given, num_nodes, **{name: options[name] for name in names})
    torch.testing.assert_close(graph.apply(x), conv(x, adj, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")
def test_mean_and_sum_are_pygs(fmt: str, weighted: bool) -> None:
    edge_index, num_nodes = simple(erdos_renyi(20, 60), True)
    weight = torch.rand(edge_index.size(1)) + 0.1 if weighted else None
    adj = adjacency(edge_index, num_nodes, fmt, weight)
    x = torch.randn(num_nodes, WIDTH)
    mean = SAGEConv(WIDTH, WIDTH, root_weight=False, bias=False)
    identity(mean)
    size = (num_nodes, num_nodes)
    actual = mean_graph(adj, size, "source_to_target").apply(x)
    torch.testing.assert_close(actual, mean(x, adj), rtol=1e-5, atol=1e-6)
    total = GINConv(torch.nn.Identity(), eps=-1.0)
    actual = plain_graph(adj, size, "source_to_target").apply(x)
    torch.testing.assert_close(actual, total(x, adj), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in GRAPHS if n != "star"])
def test_gcn_operator_on_every_graph(name: str) -> None:
    graph = GRAPHS[name]()
    x = torch.randn(graph.num_nodes, WIDTH)
    conv = GCNConv(WIDTH, WIDTH, bias=False)
    identity(conv)
    operator = gcn_graph(graph.edge_index, None, graph.num_nodes)
    torch.testing.assert_close(operator.apply(x), conv(x, graph.edge_index), rtol=1e-5, atol=1e-5)
    assert operator.weight is None  # parallel edges stay integers
    if graph.num_nodes:
        assert operator.plan.degree.min() >= 1


class FakeSparseTensor:
    """The interface of ``torch_sparse.SparseTensor``, which has no wheel here."""

    def __init__(self, row: Tensor, col: Tensor, value: Tensor | None) -> None:
        self.parts = row, col, value

    def coo(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.parts


def test_sparse_tensor_replaces_the_diagonal_and_keeps_values_from_unweighted_layers() -> None:
    row, col = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    adj = FakeSparseTensor(row, col, torch.tensor([5.0, 2.0, 3.0]))
    dense = torch.tensor([[1.0, 2, 0], [0, 1, 3], [0, 0, 1]])  # fill_diag(adj_t, 1)
    factor = dense.sum(1).rsqrt()
    expected = factor.view(-1, 1) * dense * factor
    torch.testing.assert_close(gcn_graph(adj, None, 3).apply(torch.eye(3)), expected)
    ones = torch.tensor([[1.0, 1, 0], [0, 0, 1], [0, 0, 0]])
    plain = plain_graph(adj, (3, 3), "source_to_target")
    assert torch.equal(plain.apply(torch.eye(3)), ones)


@pytest.mark.parametrize("fmt", FORMATS)
def test_formats_give_one_attention_plan(fmt: str) -> None:
    edge_index, num_nodes = simple(erdos_renyi(20, 60), True)
    adj = adjacency(edge_index, num_nodes, fmt, torch.rand(edge_index.size(1)))
    plan = looped_plan(adj, (num_nodes, num_nodes), "source_to_target")
    dense = torch.zeros(num_nodes, num_nodes).index_put((plan.dst, plan.col.long()), torch.ones(()))
    expected = torch.eye(num_nodes).index_put((edge_index[1], edge_index[0]), torch.ones(()))
    assert torch.equal(dense, expected)
    assert plan.num_edges == int(expected.sum())


def test_attention_plan_of_a_bipartite_graph_loops_over_the_smaller_side() -> None:
    plan = looped_plan(torch.tensor([[4, 1], [0, 1]]), (5, 3), "source_to_target")
    pairs = sorted(zip(plan.col.tolist(), plan.dst.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 1), (2, 2), (4, 0)]


def test_edge_index_objects_do_not_share_plans() -> None:
    """They wrap their memory; their own address is zero."""
    first, second = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2, 2], [0, 1]])
    for edge_index in (first, second, first):
        graph = plain_graph(EdgeIndex(edge_index), (3, 3), "source_to_target")
        dense = torch.zeros(3, 3).index_put((edge_index[1], edge_index[0]), torch.ones(()))
        assert torch.equal(graph.apply(torch.eye(3)), dense)


def test_graphs_are_cached_unless_their_weights_are_learned() -> None:
    edge_index, num_nodes = simple(erdos_renyi(), True)
    weight = torch.rand(edge_index.size(1))

    def build(w: Tensor | None) -> NormalizedGraph:
        return gcn_graph(edge_index, w, num_nodes)

    plan_cache.clear()
    assert build(None) is build(None)
    assert build(weight) is build(weight)
    assert build(weight) is not build(None)
    before = build(weight)
    weight.mul_(2)
    assert build(weight) is not before
    learned = weight.clone().requires_grad_()
    assert build(learned) is not build(learned)
    build(learned).apply(torch.randn(num_nodes, 3)).sum().backward()
    assert learned.grad is not None
    assert learned.grad.isfinite().all()


def test_gradient_of_learned_edge_weights_is_pygs() -> None:
    edge_index, num_nodes = simple(erdos_renyi(20, 60), True)
    x = torch.randn(num_nodes, WIDTH)
    conv = GCNConv(WIDTH, WIDTH, bias=False)
    identity(conv)
    weights = [torch.linspace(0.5, 2, edge_index.size(1)).requires_grad_() for _ in range(2)]
    coefficients = torch.randn(num_nodes, WIDTH)
    (gcn_graph(edge_index, weights[0], num_nodes).apply(x) * coefficients).sum().backward()
    (conv(x, edge_index, weights[1]) * coefficients).sum().backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("edge_index", "error", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.long), ValueError, r"shape \[2, E\] \(got \[3, 4\]\)"),
        ([[0], [1]], TypeError, r"a tensor, an EdgeIndex or a SparseTensor \(got list\)"),
    ],
)
def test_other_objects_are_refused(edge_index: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        edges_of(edge_index)


def test_nodes_beyond_the_features_are_refused() -> None:
    with pytest.raises(ValueError, match="belongs to this feature matrix"):
        gcn_graph(torch.tensor([[0, 7], [1, 2]]), None, 5)
