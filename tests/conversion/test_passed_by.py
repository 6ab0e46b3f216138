"""Code that would pass converted layers by is warned of, refused, or led to the layers of the copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from core.support import OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

import qgnn_plugin as qgnn


class Walk(nn.Module):
    """Calls of its layers those that it finds by their class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GCNConv(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)])

    def is_conv(self, layer: nn.Module) -> bool:
        return isinstance(layer, GCNConv)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for layer in self.layers:
            if self.is_conv(layer):
                x = layer(x, edge_index)
            elif isinstance(layer, (nn.ReLU, nn.Linear)):
                x = layer(x)
        return x


class WalkIs(Walk):
    def is_conv(self, layer: nn.Module) -> bool:
        return type(layer) is GCNConv


class WalkIn(Walk):
    def is_conv(self, layer: nn.Module) -> bool:
        return layer.__class__ in (GCNConv, nn.Conv1d)


class WalkTable(Walk):
    KINDS: ClassVar = {GCNConv: True}

    def is_conv(self, layer: nn.Module) -> bool:
        return self.KINDS.get(type(layer), False)


def is_gcn(layer: nn.Module) -> bool:
    return type(layer) is GCNConv


class WalkHelped(Walk):
    def is_conv(self, layer: nn.Module) -> bool:
        return is_gcn(layer)


@pytest.mark.parametrize("cls", [WalkIs, WalkIn, WalkTable, WalkHelped])
def test_classes_that_are_compared_are_told(cls: type[Walk]) -> None:
    with pytest.warns(UserWarning, match=rf"in ({cls.__name__}\.is_conv|is_gcn) does not find"):
        qmodel = qgnn.quantize_model(cls(), bits=8)
    state = {name: value.clone() for name, value in qmodel.state_dict().items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=r"'layers\.0' \(GCNConv\) passed by\).*use isinstance"):
        qgnn.calibrate(qmodel, (features(), graph()))
    assert type(qmodel.layers[0]).__name__ == "GCNConv"
    assert hasattr(type(qmodel.layers[0]), "mixin")
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in state.items())


def test_isinstance_is_no_comparison() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qgnn.calibrate(qgnn.quantize_model(Walk(), bits=8), (features(), graph()))


class Chosen(nn.Module):
    """Runs what it is told to, with a memory that each call is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = GCNConv(WIDTH, OUT), nn.Linear(WIDTH, OUT)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, edge_index: Tensor, which: str) -> Tensor:
        self.calls += 1
        if which == "none":
            return x
        return self.a(x, edge_index) if which == "a" else self.b(x)


def test_layers_that_the_float_model_leaves_out_too_are_no_error() -> None:
    qmodel: Any = qgnn.quantize_model(Chosen(), bits=8)
    qgnn.calibrate(qmodel, (features(), graph(), "a"))
    assert float(qmodel.calls) == 1
    assert not qmodel.b.input_quantizer.is_set


def test_layers_that_get_rows_of_nothing_are_no_error() -> None:
    qgnn.calibrate(qgnn.quantize_model(Chosen(), bits=8), [(features()[:0], graph(), "b"), (features(), graph(), "a")])


def test_data_that_come_to_no_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected data to come to a converted layer \(got none at 'a', 'a.lin', 'b'"):
        qgnn.calibrate(qgnn.quantize_model(Chosen(), bits=8), (features(), graph(), "none"))


class Holds(nn.Module):
    def __init__(self, hold: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(WIDTH, WIDTH), nn.Linear(WIDTH, OUT)
        self.run = hold(self)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.run(x, edge_index)


def _closed(model: Any) -> Any:
    return lambda x, edge_index: model.head(model.conv(x, edge_index).relu())


def _nested(model: Any) -> Any:
    layers = [model.conv, torch.relu]

    def first(x: Tensor, edge_index: Tensor) -> Tensor:
        return layers[1](layers[0](x, edge_index))

    return lambda x, edge_index, head=model.head: head(first(x, edge_index))


def _partial(model: Any) -> Any:
    return partial(lambda run, x, edge_index: run(x, edge_index), _closed(model))


def _weight(model: Any) -> Any:
    weight = model.head.weight
    return lambda x, edge_index: model.conv(x, edge_index) @ weight.t()


@pytest.mark.parametrize("hold", [_closed, _nested, _partial, _weight])
def test_functions_that_a_model_holds_call_the_layers_of_its_copies(hold: Callable[[Any], Any]) -> None:
    x, edge_index = features(), graph()
    model = Holds(hold)
    expected = model(x, edge_index)
    qmodel: Any = qgnn.quantize_model(model, bits=8)
    qmodel(x, edge_index).sum().backward()
    assert qmodel.conv.lin.weight.grad is not None
    assert model.conv.lin.weight.grad is None
    qgnn.calibrate(qmodel, (x, edge_index)).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        found = qmodel(x, edge_index)
        torch.testing.assert_close(packed(x, edge_index), found)
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    assert torch.equal(qgnn.restore_model(qmodel)(x, edge_index), expected)
    assert torch.equal(model(x, edge_index), expected)


def test_functions_of_nothing_in_the_model_are_shared() -> None:
    seen: list[Tensor] = []
    model = Holds(_closed)
    model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    qmodel = qgnn.quantize_model(model, bits=8)
    qmodel(features(), graph())
    assert len(seen) == 1


def test_a_held_forward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'conv', a GCNConv, to be kept as a layer \(got its method 'forward'"):
        qgnn.quantize_model(Holds(lambda model: [model.conv.forward]), bits=8)
    model = Holds(lambda model: [model.conv.forward])
    assert type(qgnn.quantize_model(model, bits=8, exclude="conv").conv) is GCNConv
