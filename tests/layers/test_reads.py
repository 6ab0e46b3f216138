"""Weights of layers that code around them reads: in converted and in packed models the values of their codes."""

from __future__ import annotations

import copy
import io
import warnings
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, MessagePassing

import qgnn_plugin as qgnn
from qgnn_plugin.layers.own_weights import QuantizedOwnConv
from qgnn_plugin.layers.reads import Reads, reads_of

IDS = torch.arange(features().size(0))


class Tied(nn.Module):
    """Its decoder is its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.conv = nn.Linear(WIDTH, 6), GCNConv(6, 6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return F.linear(self.conv(self.encoder(x), edge_index), self.encoder.weight.t())


class TiedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders, self.conv = nn.ModuleList([nn.Linear(WIDTH, 8), nn.Linear(8, 6)]), GCNConv(6, 6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for layer in self.encoders:
            x = layer(x)
        x = self.conv(x, edge_index)
        for layer in reversed(self.encoders):
            x = x @ layer.weight
        return x


class Tables(nn.Module):
    """Tables by name, looked up and read."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(len(IDS), 6) for name in "ab"})
        self.conv = GCNConv(6, 6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        rows = {name: table.weight for name, table in self.tables.items()}
        return self.conv(rows["a"] + rows["b"], edge_index) + self.tables["a"](IDS)


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = Tables(), GCNConv(6, 6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(self.inner(x, edge_index), edge_index) @ self.inner.tables["b"].weight.t()


class InMessages(MessagePassing):
    """A convolution whose message reads the weights of layers that it also calls."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.table, self.maps = nn.Embedding(20, WIDTH), nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x, kind=edge_index[0] % 20)

    def message(self, x_j: Tensor, kind: Tensor) -> Tensor:
        for inner in self.maps:
            x_j = inner(x_j) @ inner.weight
        return x_j * self.table.weight[kind] + self.table(kind)


class Adapted(nn.Module):
    """A low-rank adapter whose weight is a property, read from outside as well."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = (nn.Parameter(torch.randn(shape) / 4) for shape in ((3, WIDTH), (WIDTH, 3)))

    @property
    def weight(self) -> Tensor:
        return self.base.weight + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


class OfProperties(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.adapted = Adapted()

    @property
    def decoder(self) -> Tensor:
        return self.encoder.weight.t()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.linear(self.adapted(x), self.adapted.weight)
        return F.linear(self.conv(self.encoder(x), edge_index), self.decoder)


def transposed(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight


def decoded(x: Tensor, *, by: nn.Linear) -> Tensor:
    return transposed(by, x)


class Handed(Tied):
    """Functions, and methods, that are given a layer read its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    @staticmethod
    def applied(x: Tensor, layer: nn.Linear) -> Tensor:
        return layer(x) + F.linear(x, layer.weight)

    def own(self, layer: Any, x: Tensor) -> Tensor:
        return F.linear(layer(x), layer.weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for layer in self.second[:1]:
            x = self.applied(x, layer)
        x = self.own(self.second[1], x)
        return decoded(self.conv(self.encoder(x), edge_index), by=self.encoder)


@pytest.mark.parametrize("cls", [Tied, TiedStack, Tables, Inside, InMessages, OfProperties, Handed])
@pytest.mark.parametrize("bits", [8, 2])
def test_weights_read_elsewhere_are_the_same_in_packed_models(cls: type[nn.Module], bits: int) -> None:
    x, edge_index = features(), graph()
    model = cls()
    expected = model(x, edge_index)
    exact = qgnn.quantize_model(model, bits=32)
    assert torch.equal(exact(x, edge_index), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=bits), (x, edge_index), method="ranges").eval()
        packed = qgnn.pack_model(qmodel)
        with torch.no_grad():
            found = qmodel(x, edge_index)
            for again in (packed, copy.deepcopy(packed)):
                torch.testing.assert_close(again(x, edge_index), found)
    if bits == 8:
        assert float((found - expected).norm() / expected.norm()) < 0.1
    qmodel.train()(x, edge_index).square().sum().backward()
    model(x, edge_index).square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in qmodel.named_parameters():
        if name in theirs:
            assert (parameter.grad is None) == (theirs[name].grad is None)
    assert torch.equal(qgnn.restore_model(qmodel)(x, edge_index), expected)


def test_a_file_of_such_a_model() -> None:
    x, edge_index = features(), graph()
    model = Tied()
    packed = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(model, bits=4), (x, edge_index), method="ranges"))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, edge_index), packed(x, edge_index))


class Hidden(Tied):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        weight: Any = attrgetter("encoder.weight")(self)
        return F.linear(self.conv(self.encoder(x), edge_index), weight.t())


def test_reads_that_conversion_does_not_see_are_told_by_the_packed_model() -> None:
    x, edge_index = features(), graph()
    qmodel = qgnn.quantize_model(Hidden(), bits=8)
    qmodel(x, edge_index)  # in training mode
    packed = qgnn.pack_model(qmodel)
    with pytest.warns(UserWarning, match=r"weight of 'encoder' are read past the packed layer"):
        packed(x, edge_index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed.encoder.weight.sum()  # while the model does not run


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x, x)) * self.cell.weight_hh[:3].t().mean()


def test_what_is_told_to_be_excluded_is_a_layer() -> None:
    """Of one with several weights, not the name of the weight, which is that of no layer."""
    x = features()
    qmodel = qgnn.quantize_model(Cell(), bits=8)
    qmodel(x)  # in training mode
    packed = qgnn.pack_model(qmodel)
    with pytest.warns(UserWarning, match=r"weight of 'cell.weight_hh' are read .* exclude 'cell' from conversion"):
        packed(x)
    qmodel = qgnn.calibrate(qgnn.quantize_model(Cell(), bits=8, exclude=["cell"]), (x,))
    with torch.no_grad():
        torch.testing.assert_close(qgnn.pack_model(qmodel)(x), qmodel.eval()(x))


class About(Tied):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        weight = self.encoder.weight
        x = x.to(self.encoder.weight.device, weight.dtype) + torch.zeros_like(weight).sum() + weight.new_zeros(1)
        return self.conv(self.encoder(x), edge_index)


def test_what_a_weight_is_apart_from_its_values() -> None:
    x, edge_index = features(), graph()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qmodel = qgnn.calibrate(qgnn.quantize_model(About(), bits=8), (x, edge_index)).eval()
        packed = qgnn.pack_model(qmodel)
        torch.testing.assert_close(packed(x, edge_index), qmodel(x, edge_index).detach())
    assert not [spec.reason for spec in packed._packed_specs if spec.reason]  # type: ignore[union-attr]


class Clipped(nn.Module):
    """Writes to the weights that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(len(IDS), WIDTH), nn.Linear(WIDTH, 4)
        self.conv = GCNConv(WIDTH, WIDTH)

    def clip(self) -> None:
        self.table.weight.data.clamp_(-0.125, 0.125)
        with torch.no_grad():
            nn.init.constant_(self.head.weight, 0.25)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        self.clip()
        return self.conv(self.table.weight, edge_index) @ self.head.weight.t()


def test_writes_to_weights_act_on_the_parameters() -> None:
    qmodel: Any = qgnn.quantize_model(Clipped(), bits=8).train()
    qmodel(features(), graph())
    assert float(qmodel.table.weight.detach().abs().max()) <= 0.125
    assert bool((qmodel.head.weight == 0.25).all())


def test_what_pyg_writes_for_a_class_reads_no_weights() -> None:
    """An argument called ``weight`` is one of ``message``, in the code of ``propagate`` that PyG generates as well."""

    class Weighted(MessagePassing):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
            return self.propagate(edge_index, x=self.lin(x), weight=weight)

        def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
            return weight.view(-1, 1) * x_j

    layer = Weighted()
    graph = torch.randn(5, 4), torch.randint(5, (2, 12)), torch.rand(12)
    expected = layer(*graph)
    assert reads_of(Weighted) == Reads()
    converted = qgnn.quantize_model(layer, bits=32)
    assert not isinstance(converted, QuantizedOwnConv)
    assert torch.equal(converted(*graph), expected)


def test_methods_of_no_module_are_read() -> None:
    """Code that is executed from a string, as notebooks and documentation have it, may have no module."""
    names: dict[str, Any] = {"nn": nn}
    exec("class Net(nn.Module):\n    def forward(self, x):\n        return x @ self.weight\n", names)
    names["Net"].forward.__module__ = None
    assert reads_of(names["Net"]) == Reads()  # its source cannot be found
