"""The scope in which layers of a packed model defer their results ends with the call, however that ends."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from core.support import OUT, WIDTH, Plain, features, graph, quantized
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv, GraphConv, ResGatedGraphConv, TransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin.packing.lazy import deferred, sizes
from qgnn_plugin.packing.lazy.calls import is_deferring


class _Interrupted(nn.Module):
    """Raises inside a packed model's call, once."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return x


class _Between(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.stop, self.head = make(), _Interrupted(), nn.Linear(OUT, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.conv(x, edge_index)
        self.seen = h
        return self.head(self.stop(h))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError, MemoryError])
def test_an_interrupted_call_leaves_no_scope(error: type[BaseException]) -> None:
    x, edge_index = features(), graph()
    model = qgnn.pack_model(quantized(_Between(lambda: GCNConv(WIDTH, OUT)), x, edge_index))
    expected = model(x, edge_index)
    model.stop.error = error()
    with pytest.raises(error):
        model(x, edge_index)
    assert not is_deferring()
    assert type(model.conv(x, edge_index)) is Tensor
    assert torch.equal(model(x, edge_index), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_the_user_that_raises_leaves_no_scope(when: str) -> None:
    x, edge_index = features(), graph()
    model = qgnn.pack_model(quantized(_Between(lambda: GCNConv(WIDTH, OUT)), x, edge_index))

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop) if when == "before" else model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(x, edge_index)
    handle.remove()
    assert not is_deferring()


def test_what_a_model_keeps_of_a_call_is_computed_before_its_inputs_may_change() -> None:
    x, edge_index = features(), graph()
    model = qgnn.pack_model(quantized(_Between(lambda: GCNConv(WIDTH, OUT)), x, edge_index))
    expected = model.conv(x.clone(), edge_index)
    model(x, edge_index)
    x.zero_()
    assert torch.equal(model.seen.clone(), expected)


class _Keeps(nn.Module):
    """Returns its results in an object that nothing looks into, and keeps what follows from them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(WIDTH, OUT), nn.Linear(OUT, 2 * OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Data:
        h = self.conv(x, edge_index)
        self.stacked = torch.stack([self.conv(x, edge_index), self.conv(x, edge_index)])
        self.kept = [h.view(h.size(0), 2, -1), h.relu(), *self.head(h).chunk(2, -1)]
        return Data(x=self.head(h), h=h)


def test_what_is_left_of_a_call_is_made_of_ordinary_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "FEW_RESULTS", 0)
    x, edge_index = features(), graph()
    converted = quantized(_Keeps(), x, edge_index)
    model = qgnn.pack_model(converted)
    expected, found = converted(x, edge_index), model(x.clone(), edge_index)
    pairs = [(found.x, expected.x), (found.h, expected.h), (model.stacked, converted.stacked)]
    for left, wanted in [*pairs, *zip(model.kept, converted.kept, strict=True)]:
        assert type(left) is Tensor
        assert torch.equal(left, wanted)
    found.h.zero_()
    assert not model.kept[0].any()  # a view of it still


def test_a_packed_model_inside_another_and_in_another_thread() -> None:
    x, edge_index = features(), graph()
    inner = qgnn.pack_model(quantized(_Between(lambda: GCNConv(WIDTH, OUT)), x, edge_index))
    expected = inner(x, edge_index)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lin = inner, nn.Linear(OUT, OUT)

        def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, bool]:
            out = self.inner(x, edge_index)
            assert type(out) is Tensor
            return out, is_deferring()

    assert torch.equal(Outer()(x, edge_index)[0], expected)
    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(lambda _: inner(x, edge_index), range(4)):
            assert torch.equal(out, expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_defer_as_well_and_go_by_the_models_name(how: str) -> None:
    x, edge_index = features(), graph()
    model = qgnn.pack_model(quantized(Plain(), x, edge_index))
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert isinstance(copied, Plain)
    assert type(copied) is type(model)
    assert type(copied).__name__ == "Plain"
    assert torch.equal(copied(x, edge_index), model(x, edge_index))


def test_a_pickle_with_hooks_for_the_scope_changes_at_its_first_call() -> None:
    x, edge_index = features(), graph()
    model = qgnn.pack_model(quantized(Plain(), x, edge_index))
    expected = model(x, edge_index)
    model.__class__ = Plain
    model.register_forward_pre_hook(deferred._enter, prepend=True)
    model.register_forward_hook(deferred._leave, prepend=True, always_call=True)
    old = pickle.loads(pickle.dumps(model))
    for _ in range(2):
        assert torch.equal(old(x, edge_index), expected)
        assert "inner_class" in vars(type(old))
        assert not old._forward_hooks


LAYERS_ALONE = {
    "GCNConv": lambda: GCNConv(8, 8),
    "GraphConv": lambda: GraphConv(8, 8),
    "ResGatedGraphConv": lambda: ResGatedGraphConv(8, 8),
    "TransformerConv": lambda: TransformerConv(8, 4, heads=2),
}


@pytest.mark.parametrize("name", LAYERS_ALONE)
def test_layers_that_are_the_model_stay_quantized(name: str) -> None:
    """PyG writes a ``propagate`` onto classes without one when an instance is copied or unpickled."""
    x, edge_index = torch.randn(20, 8), torch.randint(0, 20, (2, 60))
    for _ in range(2):  # the second meets the class as the copies of the first have left it
        layer = LAYERS_ALONE[name]()
        qlayer = qgnn.calibrate(qgnn.quantize_model(layer, bits=2), (x, edge_index), steps=5).eval()
        packed = qgnn.pack_model(qlayer)
        for model in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed):
            assert not torch.allclose(model(x, edge_index), layer(x, edge_index), atol=1e-3)
            torch.testing.assert_close(model(x, edge_index), qlayer(x, edge_index))


def test_traced_models_are_copied() -> None:
    """The class of a ``GraphModule`` looks for itself among the bases of its instances."""
    x = torch.randn(5, 8)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    packed = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(traced, bits=4), [(x,)]))
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


def test_traced_models_defer_after_they_were_pickled_and_copied() -> None:
    """Pickling one has it recompile, which writes ``forward`` and ``__call__`` onto its class."""
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    x = torch.randn(5, 8)
    packed = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(traced, bits=4), [(x,)]))
    expected = packed(x)
    loaded = pickle.loads(pickle.dumps(packed))
    for model in (packed, loaded, copy.deepcopy(packed), pickle.loads(pickle.dumps(loaded)), loaded):
        scopes: list[bool] = []
        handle = model.get_submodule("1").register_forward_hook(lambda *_, seen=scopes: seen.append(is_deferring()))
        assert torch.equal(model(x), expected)
        assert scopes == [True]
        handle.remove()
