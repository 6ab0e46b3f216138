"""Maps of gathered features in row blocks: once for each node, as long as that gives what each block would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packing.layers_of_pyg import NODES, OUT, WIDTH, graph, x
from packing.row_block_support import ROWS, assert_same, pair, runs
from torch import Tensor, nn
from torch_geometric.nn import DNAConv, MessagePassing

from qgnn_plugin.packing.lazy import of_nodes
from qgnn_plugin.packing.lazy.of_nodes import CHECKED, SUBSETS, OfNodes

pytestmark = pytest.mark.filterwarnings("ignore:Only .* of the weights", "ignore:Layers that never ran")
MODES = (torch.no_grad, torch.inference_mode)


class Layer(MessagePassing):
    """Whatever a test's message does with two linear maps and a matrix of its own."""

    def __init__(self, message: Callable[..., Tensor]) -> None:
        super().__init__(aggr="mean", node_dim=0)
        self.first, self.second = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)
        self.third = nn.Linear(WIDTH // 2, OUT)
        self.run = message

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        return self.run(self, x_i, x_j)


class Matrices(MessagePassing):
    """Two matrices of one parameter, and another parameter that is read as values."""

    def __init__(self) -> None:
        super().__init__(aggr="add", node_dim=0)
        self.weight = nn.Parameter(torch.randn(2, WIDTH, OUT))
        self.one = nn.Parameter(torch.randn(1, WIDTH, OUT))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor) -> Tensor:
        mixed = x_j @ self.weight[0] - 2 * (x_j @ self.weight[1])
        return mixed + torch.matmul(x_j, self.one.squeeze(0)) - torch.matmul(x_j, self.one.squeeze(0)[:, :1])


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch, tiny: list[int]) -> list[int]:
    """How many rows each map had that was computed for all nodes, those that were compared aside."""
    sizes: list[int] = []
    compute = OfNodes._of_all

    def counted(self: Any, function: Any, *rest: Any) -> Any:
        out = compute(self, lambda rows: sizes.append(len(rows)) or function(rows), *rest)
        sizes.append(-1 if out is None else len(out))
        return out

    monkeypatch.setattr(OfNodes, "_of_all", counted)
    return sizes


def written_over(layer: Any, x_i: Tensor, x_j: Tensor) -> Tensor:
    before = layer.first(x_j)
    x_j.mul_(2)
    return before + layer.first(x_j)


def view_written_over(layer: Any, x_i: Tensor, x_j: Tensor) -> Tensor:
    x_j[:, 1].add_(1)
    return layer.third(x_j[:, : WIDTH // 2])


# Messages, and how many maps of all nodes each makes with and without records of views.
MESSAGES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "of sources": (lambda layer, x_i, x_j: layer.first(x_j), 1),
    "of both ends": (lambda layer, x_i, x_j: layer.first(x_j) - layer.first(x_i) * layer.second(x_i), 2),
    "of some columns": (
        lambda layer, x_i, x_j: layer.third(x_j[:, : WIDTH // 2]) - layer.third(x_j[:, WIDTH // 2 :]), 2,
    ),
    "written over": (written_over, 1),
    "of a view written over": (view_written_over, 0),
    "of mixed features": (lambda layer, x_i, x_j: layer.first(x_i - x_j), 0),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MESSAGES)
def test_results_are_those_of_the_converted_layer(name: str, mode: Any, maps: list[int], tiny: list[int]) -> None:
    message, count = MESSAGES[name]
    torch.manual_seed(1)
    qmodel, packed = pair(lambda: Layer(message), (x(), graph()))
    with mode():
        assert_same(packed(x(), graph()), qmodel(x(), graph()))
    assert ROWS in runs(packed)
    assert len(tiny) > 10
    every = [size for size in maps if size in (NODES, -1)][1::2]
    assert -1 not in every
    views_are_known = mode is torch.no_grad or "columns" not in name
    assert len(every) == (count if views_are_known else 0)
    assert all(size in (NODES, SUBSETS, CHECKED) for size in maps)


@pytest.mark.parametrize("mode", MODES)
def test_matrices_of_a_layer_are_told_apart(mode: Any, maps: list[int]) -> None:
    qmodel, packed = pair(Matrices, (x(), graph()))
    with mode():
        assert_same(packed(x(), graph()), qmodel(x(), graph()))
    assert maps.count(NODES) == 2 * 4


def test_features_that_change_between_calls_are_mapped_again(maps: list[int]) -> None:
    qmodel, packed = pair(lambda: Layer(MESSAGES["of both ends"][0]), (x(), graph()))
    with torch.no_grad():
        features = x()
        for _ in range(3):
            assert_same(packed(features, graph()), qmodel(features, graph()))
            features.neg_()


def test_a_layer_that_looks_across_rows_is_applied_to_blocks(maps: list[int]) -> None:
    """Each of its blocks is told, in tests as for messages as a whole, by a few rows that are computed apart."""
    found = OfNodes()
    features, nodes = x(), torch.arange(NODES)
    with found.block():
        for compute in (lambda rows: rows / rows.abs().max(), lambda rows: rows - rows.mean(0), lambda rows: rows[:3]):
            rows = found.take("x", x, features.clone(), nodes)
            assert found.mapped(id(compute), rows, compute, 0.0) is None
        rows = found.take("x", x, features.clone(), nodes)
        assert torch.equal(found.mapped("a", rows, torch.exp, 0.0), rows.exp())
    assert not found.taken
    assert of_nodes._of_nodes.get() is None


def test_dna_maps_nodes(maps: list[int]) -> None:
    """Query, key and value of three layers of features, of which the query takes the last."""
    features = torch.stack([x(), x() + 0.5, x() - 0.5], dim=1)
    for groups in (1, 2):
        maps.clear()
        qmodel, packed = pair(lambda groups=groups: DNAConv(WIDTH, heads=2, groups=groups), (features, graph()))
        with torch.no_grad():
            assert_same(packed(features, graph()), qmodel(features, graph()))
        assert maps.count(NODES) == (6 if groups == 1 else 0)  # with groups, features are turned before they are mapped


def test_few_edges_are_mapped_themselves(maps: list[int]) -> None:
    qmodel, packed = pair(lambda: Layer(MESSAGES["of sources"][0]), (x(), graph()))
    edges = graph()[:, : NODES + NODES // 2]
    with torch.no_grad():
        assert_same(packed(x(), edges), qmodel(x(), edges))
    assert not maps
