"""Models that keep what they computed are copied, converted, packed and restored."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GCNConv, SGConv, SuperGATConv

import qgnn_plugin as qgnn
from qgnn_plugin.conversion.copying import copy_model


@dataclass
class Box:
    value: Any


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Row(tuple[Any, ...]):
    """As e3nn's ``Irrep``: a tuple that will not be gone through."""

    __slots__ = ()

    def __iter__(self) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class Fields(dict[str, Any]):
    """Whose keys are found by other ways than a dictionary's."""

    def __iter__(self) -> Any:
        return iter(())

    def keys(self) -> Any:
        raise NotImplementedError

    def values(self) -> Any:
        raise NotImplementedError


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda h: h,
    "list": lambda h: [h, 2 * h],
    "nested": lambda h: {"layers": [(h, {"again": h})]},
    "object": Box,
    "slots": Slotted,
    "tuple that cannot be iterated": lambda h: Row([h, Row([2 * h])]),
    "dictionary that hides": lambda h: Fields(h=h),
    "partial": lambda h: partial(torch.add, h),
    "view": lambda h: h[:3],
    "sparse": lambda h: h.to_sparse(),
}


class Keeps(nn.Module):
    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.keep, self.kept = GCNConv(WIDTH, 8), nn.Linear(8, OUT), keep, None

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.conv(x, edge_index)
        self.kept = self.keep(h)
        return self.head(h)


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_model_keeps_is_detached_in_copies(kind: str) -> None:
    x, edge_index = features(), graph()
    model = Keeps(KEPT[kind])
    model(x, edge_index).sum().backward()
    expected = model.eval()(x, edge_index)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    before = model.kept
    qmodel = qgnn.calibrate(qgnn.quantize_model(model), (x, edge_index))
    assert model.kept is before
    qmodel.train()(x, edge_index).sum().backward()
    packed = qgnn.pack_model(qmodel.eval())
    assert torch.equal(packed(x, edge_index), qmodel(x, edge_index))
    qmodel(x, edge_index)
    assert torch.equal(qgnn.restore_model(qmodel)(x, edge_index), expected)
    qgnn.error_report(qmodel, (x, edge_index))


@pytest.mark.parametrize("conv", [SuperGATConv(WIDTH, OUT, is_undirected=True), GCNConv(WIDTH, OUT, cached=True),
                                  SGConv(WIDTH, OUT, cached=True), APPNP(2, 0.1, cached=True)])  # fmt: skip
def test_layers_that_keep_tensors(conv: nn.Module) -> None:
    x, edge_index = features().requires_grad_(), graph()
    conv.train()(x, edge_index).sum().backward()
    qmodel = qgnn.quantize_model(conv)
    qgnn.calibrate(qmodel, (x, edge_index)).train()(x, edge_index).sum().backward()
    qgnn.restore_model(qmodel)
    qgnn.pack_model(qmodel.eval())


def test_copies_share_nothing_and_keep_what_is_shared() -> None:
    model = Keeps(lambda h: [h, h])
    model(features(), graph())
    copied: Any = copy_model(model)
    assert copied.kept[0] is copied.kept[1] is not model.kept[0]
    assert torch.equal(copied.kept[0], model.kept[0])
    assert not copied.kept[0].requires_grad
    assert model.kept[0].requires_grad
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in copied.parameters())


def test_gradients_that_are_results_themselves() -> None:
    """After ``backward(create_graph=True)``."""
    model = nn.Linear(3, 3)
    model(torch.randn(2, 3)).square().sum().backward(create_graph=True)
    copied = copy_model(model)
    assert torch.equal(copied.weight.grad, model.weight.grad)  # type: ignore[arg-type]
    assert copied.weight.requires_grad
    assert copied.weight.is_leaf


def test_scripted_parts_stay_trainable() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))
    model[0][0].bias.requires_grad_(False)
    copied = copy_model(model)
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.is_leaf for p in copied.parameters())
    torch.optim.Adam(p for p in copied.parameters() if p.requires_grad)
    x = torch.randn(5, 4)
    assert torch.equal(copied(x), model(x))


def test_cycles_and_methods() -> None:
    model: Any = Keeps(lambda h: h)
    model.parents, model.bound = [model], model.eval
    model(features(), graph())
    copied: Any = copy_model(model)
    assert copied.bound.__self__ is copied
    assert copied.kept.size(0) == NODES


class Writer:
    """Of logs: it holds what cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.lines = threading.Lock(), [""]


class Helper:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.lock = model, threading.Lock()


class Attached(nn.Module):
    """With things around it that are no part of what it computes, and a part that knows the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(WIDTH, 8), nn.Linear(8, OUT)
        self.writer, self.helper, self.library = Writer(), Helper(self), math
        self.locks = [threading.Lock(), self.head]
        self.conv.whole = weakref.ref(self)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        whole: Any = self.conv
        with self.writer.lock:
            return whole.whole().head(self.conv(x, edge_index))


def test_what_cannot_be_copied_is_shared_and_parts_are_those_of_the_copy() -> None:
    model, args = Attached(), (features(), graph())
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), args).eval()
    for copied in (qmodel, qgnn.restore_model(qmodel), qgnn.pack_model(qmodel)):
        whole: Any = copied
        assert whole.writer is model.writer
        assert whole.locks[0] is model.locks[0]
        assert whole.locks[1] is whole.head is not model.head
        assert whole.helper.model is whole.conv.whole() is whole
    assert torch.equal(qgnn.pack_model(qmodel)(*args), qmodel(*args))


def test_hooks_on_gradients_of_parameters_are_kept() -> None:
    """Such as masks of weights that are not to be trained."""
    model = Keeps(lambda h: None)
    mask = torch.arange(8) % 2
    model.conv.bias.register_hook(lambda gradient: gradient * mask)
    model.head.weight.register_hook(lambda gradient: gradient * model.head.bias.detach()[:, None] * 0)
    for copied in (qgnn.quantize_model(model), qgnn.restore_model(qgnn.quantize_model(model))):
        copied.train()(features(), graph()).sum().backward()
        assert copied.conv.bias.grad is not None
        assert torch.equal(copied.conv.bias.grad != 0, mask.bool())
        assert copied.head.weight.grad is not None
        assert not copied.head.weight.grad.any()
        assert model.conv.bias.grad is None
