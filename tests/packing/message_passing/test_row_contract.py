"""Layers that look across rows run unblocked, and are named."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch_geometric.nn.conv as pyg
from core.support import Summed
from packing.layers_of_pyg import NODES, OUT, WIDTH, graph, x
from packing.row_block_support import assert_same, pair, runs
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import LSTMAggregation


class Centred(MessagePassing):
    """Looks across rows: a mean over all edges."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor) -> Tensor:
        return x_j - x_j.mean(0)


class Placed(Centred):
    """Goes by the position of an edge among all."""

    def message(self, x_j: Tensor) -> Tensor:
        return x_j * torch.linspace(0, 1, x_j.size(0)).unsqueeze(1)


class Largest(Centred):
    """Scales by the largest of all messages."""

    def message(self, x_j: Tensor) -> Tensor:
        return x_j / x_j.abs().max()


class Indexing(Centred):
    """Reads a table of all nodes by the numbers of targets."""

    def message(self, x_j: Tensor, index: Tensor) -> Tensor:
        return x_j * torch.arange(NODES).float()[index].unsqueeze(1)


class Held(Centred):
    """Reads weights of all edges that it holds itself."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        self.held = torch.linspace(0, 1, edge_index.size(1))
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor) -> Tensor:
        return x_j * self.held.unsqueeze(1)


class OfEdges(Centred):
    """Gives one row per edge."""

    def aggregate(self, inputs: Tensor) -> Tensor:
        return inputs


class Counting(Centred):
    """Keeps a number that depends on all edges."""

    def message(self, x_j: Tensor) -> Tensor:
        self.count = x_j.size(0)
        return x_j


BREAKING = {
    "Centred": (Centred, "look across rows"),
    "Placed": (Placed, "look across rows"),
    "Largest": (Largest, "look across rows"),
    "Indexing": (Indexing, "look across rows"),
    "Held": (Held, "do not take some edges alone"),
    "OfEdges": (OfEdges, "one row per node"),
    "Counting": (Counting, "write 'count'"),
    "LSTM": (lambda: pyg.SimpleConv(LSTMAggregation(WIDTH, WIDTH), combine_root=None), "pads the neighbours"),
}


@pytest.mark.parametrize("name", BREAKING)
def test_what_breaks_the_contract_runs_unblocked_and_is_named(name: str, tiny: list[int]) -> None:
    make, reason = BREAKING[name]
    edges = graph()
    edges = edges[:, edges[1].argsort(stable=True)]  # as the LSTM wants them
    qmodel, packed = pair(make, (x(), edges))
    with torch.no_grad():
        with pytest.warns(UserWarning, match=reason):
            out = packed(x(), edges)
        assert_same(out, qmodel(x(), edges))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            assert_same(packed(x(), edges), qmodel(x(), edges))
    assert any("unblocked" in how and reason in how for how in runs(packed)), runs(packed)


def test_as_many_edges_as_nodes() -> None:
    """Nothing tells what is given per edge: the layer runs unblocked, and is right."""
    edges = graph(edges=NODES)
    weight = torch.rand(NODES)
    qmodel, packed = pair(lambda: Summed(WIDTH, OUT), (x(), edges, weight))
    with torch.no_grad():
        assert_same(packed(x(), edges, weight), qmodel(x(), edges, weight))
