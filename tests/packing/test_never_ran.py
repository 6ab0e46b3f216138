"""Layers that no data reached stay float, and the others are packed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packing.forms import FORMS, NODES, WIDTH, Model, forms_of, inputs, reloaded
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import GCNConv

import qgnn_plugin as qgnn


class Leftover(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.old = pyg.SAGEConv(WIDTH, WIDTH)
        self.projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor, edge_index: Tensor, project: bool = False) -> Tensor:
        x = self.conv(x, edge_index)
        return self.projection(x) if project else self.head(x)


@torch.no_grad()
def test_layers_that_never_ran_stay_float() -> None:
    args, model = inputs(), Leftover().eval()
    converted = qgnn.calibrate(qgnn.quantize_model(model), args).eval()
    with pytest.warns(UserWarning, match="never ran .*'old', .*'projection.0', 'projection.2'; calibrate"):
        packed: Any = qgnn.pack_model(converted)
    reasons = {layer.name: layer.reason for layer in qgnn.summary(packed).layers}
    assert {name for name, reason in reasons.items() if reason == "never ran"} == {
        "old", "old.lin_l", "old.lin_r", "projection.0", "projection.2"
    }  # fmt: skip
    assert type(packed.projection[0]) is nn.Linear
    assert type(packed.old) is pyg.SAGEConv
    for form in (packed, reloaded(packed, model), copy.deepcopy(packed)):
        assert torch.equal(form(*args), converted(*args))
        hidden = converted.conv(*args)
        assert torch.equal(form(*args, project=True), model.projection(hidden))
        assert torch.equal(form.old.lin_l.weight, model.old.lin_l.weight)


class ByHand(nn.Module):
    """Calls the parts of a layer, never the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = pyg.SAGEConv(WIDTH, WIDTH), GCNConv(WIDTH, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        near = self.conv.propagate(edge_index, x=(x, x))
        return self.head((self.conv.lin_l(near) + self.conv.lin_r(x)).relu(), edge_index)


@torch.no_grad()
def test_maps_that_are_called_by_hand_are_packed() -> None:
    args, model = inputs(), ByHand().eval()
    converted = qgnn.calibrate(qgnn.quantize_model(model, bits=2), args).eval()
    with pytest.warns(UserWarning, match="never ran .*: 'conv'; calibrate"):
        packed = qgnn.pack_model(converted)
    for form in (packed, reloaded(packed, model), copy.deepcopy(packed)):
        assert torch.equal(form(*args), converted(*args))


@torch.no_grad()
def test_what_ran_in_part_is_packed() -> None:
    x, edge_index = inputs()
    relations = [("a", "to", "b"), ("b", "to", "a"), ("a", "with", "a")]
    hetero = pyg.HeteroConv({r: pyg.SAGEConv((WIDTH, WIDTH), WIDTH) for r in relations})
    nodes = {"a": x, "b": torch.randn(NODES, WIDTH)}
    args = (nodes, {relations[0]: edge_index, relations[1]: edge_index.flip(0)})
    forms = forms_of(hetero, args)
    expected = forms["converted"](*args)
    for form in FORMS:
        found = forms[form](*args)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    degrees = forms_of(Model(pyg.MFConv(WIDTH, WIDTH)), (x, edge_index))  # a weight per degree
    assert any(layer.reason == "never ran" for layer in qgnn.summary(degrees["packed"]).layers)
    sources = forms_of(Sources(), (x, edge_index))  # whose map of targets has none
    for form in FORMS:
        assert torch.equal(sources[form](x, edge_index), sources["converted"](x, edge_index))


class Sources(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.SAGEConv((WIDTH, WIDTH), WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv((x, None), edge_index, size=(NODES, NODES))


def test_a_model_that_never_ran_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every range to be set .got none at 'conv.message'"):
        qgnn.pack_model(qgnn.quantize_model(Leftover()))
