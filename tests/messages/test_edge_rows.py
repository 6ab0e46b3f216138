"""What a network gives for every edge, computed with the rows that read it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.support import quantized
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, PointTransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin.messages.traced import TracedMessage
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.lazy.deferred import Pending

NODES, EDGES, WIDTH, OUT = 40, 20_000, 8, 16


class Filtered(MessagePassing):
    """Messages weighted by a network of what edges have, as those of SchNet; with ``branches``, not traced."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__(aggr="add")
        self.lin, self.branches = nn.Linear(WIDTH, OUT), branches
        self.net = nn.Sequential(nn.Linear(3, OUT), nn.Softplus(), nn.Linear(OUT, OUT))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        weight = self.net(edge_attr) * edge_attr[:, :1]
        return self.propagate(edge_index, x=self.lin(x), weight=weight, scale=edge_attr[:, 1:2])

    def message(self, x_j: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        if self.branches and bool((scale > 1e9).any()):
            return x_j
        return x_j * weight + scale


class Holding(nn.Module):
    """A model of one layer: results wait inside of models, not where the layer is all there is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.layer(*args)
        return out


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("branches", [False, True])
def test_weights_of_edges_are_computed_with_their_rows(
    branches: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "MOST_EDGES", 1 << 10)
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 1 << 12)
    monkeypatch.setattr(sizes, "FEW_RESULTS", 0)
    written, own = list[torch.Size](), Pending.materialize

    def materialize(self: Any) -> Tensor:
        written.append(torch.Size([self.producer.num_rows, self.producer.num_features]))
        return own(self)

    monkeypatch.setattr(Pending, "materialize", materialize)
    edge_index = torch.randint(NODES, (2, EDGES))
    edge_index = edge_index[:, edge_index[1].argsort()] if ordered else edge_index  # by target, as kernels take them
    graph = torch.randn(NODES, WIDTH), edge_index, torch.randn(EDGES, 3)
    qmodel = quantized(Holding(Filtered(branches)), *graph).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        expected = qmodel(*graph)
        packed(*graph)  # compares a few rows of a kernel that is new with what the layer gives
        written.clear()
        found = packed(*graph)
    assert (torch.equal if not branches else torch.allclose)(found, expected)
    assert not [shape for shape in written if shape.numel() >= EDGES * OUT]
    layer = next(layer for layer in qgnn.summary(packed).layers if layer.type == "Filtered")
    assert layer.runs == ("packed: row blocks" if branches else "packed: generated kernel")


def test_blocks_that_give_other_numbers_than_the_layer_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What networks give is there when a message is traced: results by blocks are compared when they come first."""
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 1 << 12)
    monkeypatch.setattr(sizes, "FEW_RESULTS", 0)
    own, wrong = TracedMessage._by_blocks, list[int]()

    def shifted(self: Any, *args: Any) -> list[Tensor]:
        wrong.append(1)
        return [out.roll(1, 0) for out in own(self, *args)]

    monkeypatch.setattr(TracedMessage, "_by_blocks", shifted)
    graph = torch.randn(NODES, WIDTH), torch.randint(NODES, (2, EDGES)), torch.randn(EDGES, 3)
    qmodel = quantized(Holding(Filtered()), *graph).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        expected = qmodel(*graph)
        for _ in range(3):
            torch.testing.assert_close(packed(*graph), expected)
    assert wrong


def test_sources_that_a_network_gives_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the result is made by blocks of targets: any of these reads any source."""
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 1 << 9)
    monkeypatch.setattr(sizes, "FEW_RESULTS", 0)
    torch.manual_seed(0)
    layer = PointTransformerConv(WIDTH, OUT, pos_nn=_mlp(3), attn_nn=_mlp(OUT))
    points = torch.randn(400, WIDTH), torch.rand(400, 3), torch.randint(400, (2, 4_000))
    qmodel = quantized(Holding(layer), *points).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        expected = qmodel(*points)
        for _ in range(2):
            torch.testing.assert_close(packed(*points), expected)
    assert "packed: generated kernel" in [layer.runs for layer in qgnn.summary(packed).layers]


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, OUT), nn.ReLU(), nn.Linear(OUT, OUT))
