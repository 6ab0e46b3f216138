"""Deferred results in whole packed models."""

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
from qgnn_plugin.packing.lazy import deferred, sizes
from qgnn_plugin.packing.lazy.calls import is_deferring
from qgnn_plugin.packing.lazy.deferred import DeferredTensor
from qgnn_plugin.packing.lazy.producers import Producer


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
    monkeypatch.setattr(sizes, "FEW_RESULTS", 0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of many blocks."""
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 1)


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


class Exporting(nn.Module):
    """Hands memory on to code in C++."""

    foreign: Callable[[Tensor], Any]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(torch.from_dlpack(self.foreign(self.conv(x, edge_index).detach())))


class ExportingByName(Exporting):
    def foreign(self, h: Tensor) -> Any:
        return torch.utils.dlpack.to_dlpack(h)


unseen = torch.utils.dlpack.to_dlpack


class ExportingUnseen(Exporting):
    """By a function of another name, as those of extensions are."""

    def foreign(self, h: Tensor) -> Any:
        return unseen(h)


def test_memory_that_is_read_past_python() -> None:
    qmodel, packed, args = pair(ExportingByName())
    with torch.no_grad():
        assert torch.equal(packed(*args), qmodel(*args))
    _, packed, args = pair(ExportingUnseen())
    with pytest.raises(TypeError, match=r"read past Python .* \.clone\(\)"):
        packed(*args)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(packed.head.weight)
