"""Deferred results: what packed layers hand each other inside a packed model."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_support import threads
from graphs import erdos_renyi
from packing.cases import ATTENTION, CLASSES, FEATURES, HIDDEN, MODELS, features, quantized
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import GAT, GCN, GCNConv, GraphSAGE

import qgnn_plugin
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.cpu.parallel import num_threads
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.packing import deferred, direct, producers
from qgnn_plugin.packing.deferred import DeferredTensor, is_deferring
from qgnn_plugin.packing.producers import Producer

ROWS, WIDTH = 150, 7
RANGE = {"out_scale": torch.tensor(0.3), "out_offset": torch.tensor(-1.0), "out_bits": 4}


class Counted:
    """A producer of ``value`` that counts its runs."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.runs, self.repeats = value, 0, 0
        self.inner = Producer.of(value)

    def run(self, start: int, stop: int, **out: Any) -> Tensor:
        self.runs += 1
        return self.inner.run(start, stop, **out)

    def tensor(self) -> DeferredTensor:
        producer = Producer(*self.value.shape, self.value.device, self.run)
        return DeferredTensor(producer, self._repeat)

    def _repeat(self) -> None:
        self.repeats += 1


@pytest.fixture
def source() -> Counted:
    return Counted(torch.randn(ROWS, WIDTH))


def codes(value: Tensor) -> Tensor:
    return quantize_pack(value, *RANGE.values())  # type: ignore[arg-type]


NOTED: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda x: x,
    "torch.relu": torch.relu,
    "F.relu": F.relu,
    "method": lambda x: x.relu(),
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "dropout": lambda x: F.dropout(x.relu(), 0.5, training=False),
    "dropout module": nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).eval(),
    "elu": F.elu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "relu twice": lambda x: F.elu(x.relu()).relu(),
    "batch norm": nn.BatchNorm1d(WIDTH, affine=True).eval(),
    "norm and relu": nn.Sequential(nn.BatchNorm1d(WIDTH).eval(), nn.ReLU()).eval(),
    "views": lambda x: x.view(-1, WIDTH).reshape(ROWS, WIDTH).flatten(1).contiguous().float(),
    "detach": lambda x: x.detach().relu(),
    "by a number": lambda x: 0.3 * (2 * x.relu()) / 7,
}


@pytest.mark.parametrize("name", NOTED)
def test_noted_operations_run_nothing_until_codes_are_asked_for(name: str, source: Counted) -> None:
    with torch.no_grad():
        out = NOTED[name](source.tensor())
        assert source.runs == 0
        assert isinstance(out, DeferredTensor)
        assert (out.shape, out.dtype, out.dim(), len(out)) == ((ROWS, WIDTH), torch.float32, 2, ROWS)
        expected = NOTED[name](source.value.clone())
        assert torch.equal(out.pending.packed(**RANGE), codes(expected))
        assert torch.equal(out + 0, expected)


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda x: (x + 2) * x,
    "product": lambda x: x @ torch.ones(WIDTH, 2),
    "index": lambda x: x[3:5],
    "mask": lambda x: x[x > 0],
    "cat": lambda x: torch.cat([x, x], dim=-1),
    "reduction": lambda x: x.sum(),
    "other view": lambda x: x.view(-1),
    "clone": lambda x: x.clone(),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "item": lambda x: torch.tensor(x[0, 0].item()),
    "double": lambda x: x.double(),
    "dropout": lambda x: F.dropout(x, 1.0, training=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "text": lambda x: torch.tensor([ord(c) for c in repr(x)]),
    "dlpack": lambda x: torch.utils.dlpack.from_dlpack(x),
    "module": nn.Linear(WIDTH, 3),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_anything_else_finds_an_ordinary_tensor(name: str, source: Counted) -> None:
    out = TOUCHES[name](source.tensor())
    assert type(out) is Tensor
    assert torch.equal(out, TOUCHES[name](source.value))
    assert source.runs == 1


def test_a_value_is_computed_once(source: Counted) -> None:
    x = source.tensor()
    assert torch.equal(x + 1, source.value + 1)
    assert torch.equal(x.pending.packed(**RANGE), codes(source.value))
    assert torch.equal(x.relu(), source.value.relu())
    assert (source.runs, source.repeats) == (1, 0)


def test_two_consumers_get_what_each_needs(source: Counted) -> None:
    x = source.tensor()
    y = x.relu()
    assert torch.equal(y.pending.packed(**RANGE), codes(source.value.relu()))
    assert source.repeats == 0
    assert torch.equal(x - 1, source.value - 1)  # the residual connection around the next layer
    assert torch.equal(y.pending.packed(**RANGE), codes(source.value.relu()))
    assert source.repeats > 0


def test_changes_in_place(source: Counted) -> None:
    x = source.tensor()
    alias = x.view(ROWS, WIDTH)
    before = x.relu()
    assert x.relu_() is x
    x.mul_(2)
    x[0] = 5.0
    expected = source.value.relu() * 2
    expected[0] = 5.0
    assert torch.equal(alias + 0, expected)
    assert torch.equal(x.pending.packed(**RANGE), codes(expected))
    assert torch.equal(before + 0, source.value.relu())


def test_sums_and_steps_of_producers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "BLOCK_FLOATS", 64 * WIDTH)
    first, second = Counted(torch.randn(ROWS, WIDTH)), Counted(torch.randn(ROWS, WIDTH))
    total = Producer.plus(Producer.of(first.value), Producer(ROWS, WIDTH, torch.device("cpu"), second.run))
    expected = first.value + second.value
    assert torch.equal(DeferredTensor(total).pending.packed(**RANGE), codes(expected))
    assert second.runs == 3  # blocks of 64 rows
    assert torch.equal(DeferredTensor(total).relu() + 0, expected.relu())
    assert torch.equal(DeferredTensor(total.then(F.softplus)).pending.packed(**RANGE), codes(F.softplus(expected)))


def test_empty_matrix() -> None:
    x = Counted(torch.empty(0, WIDTH)).tensor()
    assert x.relu().pending.packed(**RANGE).shape == (0, 1)
    assert Producer.plus(Producer.of(torch.empty(0, 3)), Producer.of(torch.empty(0, 3)))().shape == (0, 3)


# In models ############################################################################################################


class FloatMatrices(TorchDispatchMode):
    """Lists the operations that write a float matrix of ``rows`` rows and at least ``width`` columns."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows, self.width, self.found = rows, width, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and not isinstance(t, DeferredTensor) and self._is_wide(t):
                self.found.append(str(func))
        return out

    def _is_wide(self, t: Tensor) -> bool:
        return t.is_floating_point() and t.dim() == 2 and t.size(0) == self.rows and t.size(1) >= self.width


class Elu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(FEATURES, HIDDEN), GCNConv(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return self.conv2(F.dropout(F.elu(self.conv1(x, edge_index)), training=self.training), edge_index)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(FEATURES, HIDDEN), GCNConv(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.conv1(x, edge_index).relu()
        return x + self.conv2(x, edge_index)


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "gcn": lambda: GCN(FEATURES, HIDDEN, 3, CLASSES),
    "gcn with batch norm": lambda: GCN(FEATURES, HIDDEN, 3, CLASSES, norm="batch_norm"),
    "gcn with elu": Elu,
    "sage": lambda: GraphSAGE(FEATURES, HIDDEN, 3, CLASSES),
    "wide sage": lambda: GraphSAGE(FEATURES, 2 * FEATURES, 2, CLASSES, aggr="sum"),
    "gin": MODELS["gin"],
    "gat": lambda: GAT(FEATURES, HIDDEN, 3, CLASSES, heads=3),
    "gatv2": ATTENTION["gatv2"],
}


@pytest.fixture(autouse=True)
def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs here are as large ones: of more than few rows."""
    monkeypatch.setattr(direct, "FEW_RESULTS", 0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of many blocks."""
    monkeypatch.setattr(producers, "BLOCK_FLOATS", 1)


def pair(model: nn.Module, nodes: int = 200, **config: Any) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    graph = erdos_renyi(nodes, 5 * nodes)
    args = features("dense", nodes), graph.edge_index
    qmodel = quantized(model, *args, **{"bits": 4, **config})
    return qmodel, qgnn_plugin.pack_model(qmodel), args


@pytest.mark.parametrize("name", ["sage", "wide sage"])
def test_blocks_are_shared_out_among_threads(
    name: str, small_blocks: None, poison_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is one thread's, every block is done once, and the result is that of a single thread."""
    _, packed, args = pair(CHAINS[name](), nodes=2000)
    done: list[tuple[int, int]] = []
    shared_out = Producer._shared_out

    def noted(self: Producer, **epilogue: Any) -> Tensor:
        def run(start: int, stop: int, **out: Any) -> Tensor:
            done.append((start, num_threads()))
            return self.run(start, stop, **out)

        return shared_out(dataclasses.replace(self, run=run), **epilogue)

    monkeypatch.setattr(Producer, "_shared_out", noted)
    outs = []
    for count in (1, 3):
        done.clear()
        with threads(count), use_backend("cpu"):
            outs.append(packed(*args))
        starts = [start for start, _ in done]
        assert len(starts) == starts.count(0) * 32  # of 64 rows
        assert sorted(starts) == sorted(list(range(0, 2000, 64)) * starts.count(0))
        assert all(used == (count if start == 0 else 1) for start, used in done)
    assert torch.equal(*outs)


@pytest.mark.parametrize("granularity", ["tensor", "node", "row"])
@pytest.mark.parametrize("name", CHAINS)
def test_no_float_matrix_between_packed_layers(
    name: str, granularity: str, small_blocks: None, poison_empty: None
) -> None:
    qmodel, packed, args = pair(CHAINS[name](), granularity=granularity)
    with FloatMatrices(200, CLASSES + 1) as matrices, torch.no_grad():
        out = packed(*args)
    assert not matrices.found
    assert type(out) is Tensor
    with torch.no_grad():
        expected = qmodel(*args)
    if "gat" in name:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(out, expected)


def test_results_that_are_needed_twice_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel, packed, args = pair(Residual())
    runs = []
    run = deferred.Pending.materialize
    monkeypatch.setattr(deferred.Pending, "materialize", lambda self: (runs.append(self.value is None), run(self))[1])
    with torch.no_grad():
        expected = qmodel(*args)
        assert torch.equal(packed(*args), expected)
        assert not packed.conv1._packed.defers
        assert packed.conv2._packed.defers
        runs.clear()
        assert torch.equal(packed(*args), expected)
    assert sum(runs) == 1  # of the last layer


@pytest.mark.parametrize("jk", ["cat", "max", "lstm"])
def test_jumping_knowledge(jk: str) -> None:
    qmodel, packed, args = pair(GCN(FEATURES, 8, 3, CLASSES, jk=jk))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(packed(*args), qmodel(*args), rtol=1e-6, atol=1e-6)


def test_hooks_see_plain_tensors() -> None:
    qmodel, packed, args = pair(CHAINS["gcn"]())
    seen: list[Any] = []

    def hook(module: Any, inputs: Any, output: Any = None) -> None:
        seen.extend(t for t in (*inputs, output) if t is not None)

    expected = packed(*args)
    packed.convs[1].register_forward_hook(hook)
    packed.convs[2].register_forward_pre_hook(hook)
    packed.register_forward_hook(hook)
    assert torch.equal(packed(*args), expected)
    assert len(seen) == 3 + 2 + 3
    assert all(type(t) is Tensor for t in seen)
    float_outputs: list[Tensor] = []
    qmodel.convs[1].register_forward_hook(lambda m, i, o: float_outputs.append(o))
    with torch.no_grad():
        qmodel(*args)
    assert torch.equal(seen[2], float_outputs[0])


def test_hooks_on_inner_layers_still_run() -> None:
    _, packed, args = pair(CHAINS["gcn"]())
    seen: list[Any] = []
    expected = packed(*args)
    packed.convs[1].lin.register_forward_hook(lambda m, i, o: seen.append((*i, o)))
    assert torch.equal(packed(*args), expected)
    assert len(seen) == 1
    assert all(type(t) is Tensor for t in seen[0])


def test_outside_a_packed_model_layers_compute_at_once() -> None:
    _, packed, args = pair(CHAINS["gcn"]())
    assert type(packed.convs[0](*args)) is Tensor
    assert type(packed.forward(*args)) is Tensor
    with pytest.raises(Exception, match=r"edge_index|tensor"):
        packed(args[0], "no graph")
    assert not is_deferring()
    outer = nn.Sequential()
    outer.inner = packed
    assert type(outer.inner(*args)) is Tensor


def test_inference_mode_and_gradients_switched_on() -> None:
    qmodel, packed, args = pair(CHAINS["gcn with batch norm"]())
    with torch.no_grad():
        expected = qmodel(*args)
    with torch.inference_mode():
        assert torch.equal(packed(*args), expected)
    with torch.enable_grad():
        out = packed(*args)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_nested_outputs_are_plain() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = GCNConv(FEATURES, 8), GCNConv(8, 8)

        def forward(self, x: Tensor, edge_index: Any) -> dict[str, Any]:
            h = self.conv1(x, edge_index)
            return {"all": [h, (self.conv2(h.relu(), edge_index), None)]}

    _, packed, args = pair(Two())
    first, (second, _) = packed(*args)["all"]
    assert type(first) is Tensor
    assert type(second) is Tensor


def test_copies_and_files_defer_as_well(tmp_path: Any) -> None:
    _, packed, args = pair(CHAINS["gcn"]())
    expected = packed(*args)
    qgnn_plugin.save_packed(packed, tmp_path / "gcn.safetensors")
    loaded = qgnn_plugin.load_packed(tmp_path / "gcn.safetensors", CHAINS["gcn"]())
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), loaded):
        with FloatMatrices(200, CLASSES + 1) as matrices:
            out = other(*args)
        assert not matrices.found
        assert torch.equal(out, expected)


def test_compiled_models_write_floats() -> None:
    _, packed, args = pair(CHAINS["gcn"]())
    expected = packed(*args)
    with torch.no_grad():
        compiled = torch.compile(packed, backend="eager")
        assert torch.equal(compiled(*args), expected)
    assert torch.equal(packed(*args), expected)


class Asking(nn.Module):
    """Whose code asks for the class of tensors itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.conv(x, edge_index)
        return self.head(2 * h if self.is_plain(h) else h)

    def is_plain(self, h: Any) -> bool:
        raise NotImplementedError


class AskingIs(Asking):
    def is_plain(self, h: Any) -> bool:
        return type(h) is Tensor


class AskingIn(Asking):
    def is_plain(self, h: Any) -> bool:
        return h.__class__ in (list, Tensor)


class AskingName(Asking):
    def is_plain(self, h: Any) -> bool:
        return type(h).__name__ == "Tensor"


def is_tensor(h: Any) -> bool:
    return type(h) == Tensor  # noqa: E721 - as users write it


class AskingElsewhere(Asking):
    def is_plain(self, h: Any) -> bool:
        return is_tensor(h)


@pytest.mark.parametrize("cls", [AskingIs, AskingIn, AskingName, AskingElsewhere])
def test_code_that_asks_for_the_class_of_tensors_is_given_tensors(cls: type[Asking]) -> None:
    qmodel, packed, args = pair(cls())
    assert torch.equal(packed(*args), qmodel(*args))
    assert torch.equal(copy.deepcopy(packed)(*args), qmodel(*args))
