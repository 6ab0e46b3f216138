"""Modules and parameters with two names stay one in every form."""

from __future__ import annotations

from typing import Any

import torch
from packing.forms import FORMS, NODES, WIDTH, forms_of, inputs
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import GCNConv


class Listed(nn.Module):
    """Edge networks in a list besides the convolutions that use them, and one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU()) for _ in range(2)])
        self.convs = nn.ModuleList([pyg.EdgeConv(network) for network in self.networks])
        self.shared = GCNConv(WIDTH, WIDTH)
        self.again = nn.ModuleList([self.shared, self.shared])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in (*self.convs, *self.again):
            x = conv(x, edge_index)
        return x


@torch.no_grad()
def test_a_module_of_two_names_stays_one() -> None:
    args = inputs()
    forms = forms_of(Listed(), args)
    for form in FORMS:
        model: Any = forms[form]
        assert model.convs[0].nn is model.networks[0]
        assert model.again[0] is model.again[1] is model.shared
        assert torch.equal(model(*args), forms["converted"](*args))


class Tied(nn.Module):
    """A weight that two maps share, and a table with it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(NODES, WIDTH)
        self.first, self.second, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, NODES)
        self.second.weight, self.out.weight = self.first.weight, self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.table(index)).relu()))


@torch.no_grad()
def test_tied_weights() -> None:
    index = torch.arange(NODES)
    forms = forms_of(Tied(), (index,))
    converted: Any = forms["converted"]
    assert converted.first.weight is converted.second.weight
    assert converted.out.weight is converted.table.weight
    rows = converted.table(index)  # the shared floats, each as its own site has them
    for form in FORMS:
        model: Any = forms[form]
        assert torch.equal(model(index), converted(index))
        assert torch.equal(model.table(index), rows)
        assert model.table.weight.shape == converted.table.weight.shape
