"""Layers of the user's own by blocks of rows: edge updates, tuples, pairs, flows, samples, ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
import torch_geometric.nn.conv as pyg
from core.support import Summed
from packing.layers_of_pyg import NODES, OUT, TARGETS, WIDTH, graph, per_edge, x
from packing.row_block_support import ROWS, assert_same, pair, runs
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, TransformerConv
from torch_geometric.utils import softmax

import qgnn_plugin as qgnn


class Own(MessagePassing):
    """Several features at both ends, an edge update with a softmax, a tuple as a message, another update."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.value, self.key = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        key = self.key(x)
        alpha = self.edge_updater(edge_index, key=key)
        value, spread = self.propagate(edge_index, value=self.value(x), key=key, alpha=alpha, scale=2.0)
        return torch.cat([value, spread], -1)

    def edge_update(self, key_j: Tensor, key_i: Tensor, index: Tensor, size_i: Optional[int]) -> Tensor:  # noqa: UP045
        return softmax((key_i * key_j).sum(-1, keepdim=True), index, num_nodes=size_i)

    def message(self, value_j: Tensor, key_i: Tensor, key_j: Tensor, alpha: Tensor, scale: float) -> Any:
        return alpha * value_j * scale, (key_j - key_i).abs()

    def aggregate(self, inputs: Any, index: Tensor, dim_size: Optional[int] = None) -> Any:  # noqa: UP045
        return tuple(self.aggr_module(part, index, dim_size=dim_size, dim=self.node_dim) for part in inputs)

    def update(self, inputs: Any, key: Tensor) -> Any:
        return inputs[0] + key, inputs[1]


class Keeps(MessagePassing):
    """Stores its attention on itself, as many layers of PyG do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.last = nn.Linear(WIDTH, OUT), None

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.propagate(edge_index, x=self.lin(x)), self.last

    def message(self, x_i: Tensor, x_j: Tensor, index: Tensor) -> Tensor:
        self.last = softmax((x_i * x_j).sum(-1), index)
        return x_j * self.last.unsqueeze(-1)


@pytest.mark.parametrize("make", [Own, Keeps])
def test_own_layers(make: Callable[[], nn.Module], tiny: list[int]) -> None:
    qmodel, packed = pair(make, (x(), graph()))
    with torch.no_grad():
        assert_same(packed(x(), graph()), qmodel(x(), graph()))
    assert ROWS in runs(packed)
    assert len(tiny) > 10


def test_attention_comes_in_the_callers_order_of_edges(tiny: list[int]) -> None:
    args = (x(), graph())
    qmodel, packed = pair(lambda: TransformerConv(WIDTH, OUT, heads=2), args)
    with torch.no_grad():
        out, (edges, alpha) = packed(*args, return_attention_weights=True)
        expected, (_, weights) = qmodel(*args, return_attention_weights=True)
        assert torch.equal(edges, graph())
        assert_same((out, alpha), (expected, weights))
        assert packed._alpha is None
    assert len(tiny) > 10


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_flows(flow: str, tiny: list[int]) -> None:
    args = (x(), graph(), per_edge())
    qmodel, packed = pair(lambda: Summed(WIDTH, OUT, flow=flow), args)
    with torch.no_grad():
        assert_same(packed(*args), qmodel(*args))
    assert len(tiny) > 10


def test_two_sides(tiny: list[int]) -> None:
    edges = graph(NODES, TARGETS)
    for make, args in (
        (lambda: Summed((WIDTH, 5), OUT), ((x(), x(TARGETS, 5)), edges)),
        (lambda: TransformerConv((WIDTH, 5), OUT), ((x(), x(TARGETS, 5)), edges)),
        (lambda: pyg.SimpleConv("max"), ((x(), None), edges, None, (NODES, TARGETS))),
    ):
        qmodel, packed = pair(make, args)
        with torch.no_grad():
            out = packed(*args)
            assert out.size(0) == TARGETS
            assert_same(out, qmodel(*args))
    assert len(tiny) > 10


def test_features_of_several_samples(tiny: list[int]) -> None:
    batch = torch.stack([x(), x() * 0.5, x() - 1])
    qmodel, packed = pair(lambda: Summed(WIDTH, OUT), (batch, graph(), per_edge()))
    with torch.no_grad():
        assert_same(packed(batch, graph(), per_edge()), qmodel(batch, graph(), per_edge()))
    assert ROWS in runs(packed)
    assert len(tiny) > 10


@pytest.mark.parametrize("granularity", ["tensor", "node", "row"])
@pytest.mark.parametrize("bits", [2, 8])
def test_ranges(bits: int, granularity: str, tiny: list[int]) -> None:
    config = qgnn.QuantConfig(bits=bits, granularity=granularity)
    for make in (lambda: Summed(WIDTH, OUT), lambda: TransformerConv(WIDTH, OUT, heads=2)):
        qmodel = qgnn.quantize_model(make().eval(), config=config)
        qgnn.calibrate(qmodel, [(x(), graph())], method="ranges").eval()
        with torch.no_grad():
            assert_same(qgnn.pack_model(qmodel)(x(), graph()), qmodel(x(), graph()))
    assert len(tiny) > 10
