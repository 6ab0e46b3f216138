"""Layers of a user's own that put something before or after ``super().forward``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import WIDTH, features, graph, quantized, relative, through_pickle
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, GINConv

import qgnn_plugin as qgnn
from qgnn_plugin.conversion.coverage import coverage

STEPS = 4


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(self.before(x).to(self.weight.dtype))

    def before(self, x: Tensor) -> Tensor:
        return x.tanh()


class Twice(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() + 1


class Adapter(nn.Linear):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Parameter(torch.randn(args[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.down(x).unsqueeze(1) * self.up).sum(-1)


class Cell(nn.GRUCell):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, super().forward(x)) * 2


class Memory(nn.LSTMCell):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0] * 2


class LastStep(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, STEPS, WIDTH))[0][:, -1]


class Steps(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, STEPS, WIDTH))[0] + 1


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x.view(-1, STEPS, WIDTH).transpose(1, 2), (2, 0)))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.view(-1, STEPS, WIDTH)
        return super().forward(x, x, x, need_weights=False)[0] + x


class Same(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x).sigmoid()


class Hashed(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs().argmax(-1)) * 5


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Scaled": lambda: Scaled(WIDTH, 6),
    "Twice": lambda: Twice(WIDTH, 6),
    "Adapter": lambda: Adapter(WIDTH, 6),
    "Cell": lambda: Cell(WIDTH, WIDTH),
    "Memory": lambda: Memory(WIDTH, 6),
    "LastStep": lambda: LastStep(WIDTH, 6, batch_first=True),
    "Steps": lambda: Steps(WIDTH, 6, batch_first=True),
    "Causal": lambda: Causal(WIDTH, 6, 3),
    "SelfAttention": lambda: SelfAttention(WIDTH, 2, batch_first=True),
    "Same": lambda: Same(WIDTH, WIDTH, 6),
    "Hashed": lambda: Hashed(WIDTH, 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_is_quantized_as_its_base(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(MODELS[name]()).eval(), features()
    qmodel = quantized(model, x)
    expected, found = model(x), qmodel(x)
    assert 0 < relative(found, expected) < 0.1
    assert type(qmodel[0]).__name__ == name
    assert isinstance(qmodel[0], type(model[0]))
    share = coverage(qmodel)
    assert [part.name for part in share.parts] == (["0"] if name == "Adapter" else [])
    assert share.quantized > 0.7 * share.total
    if name == "Adapter":  # said of its own weight
        assert share.parts[0].weights == 12
        assert "of its own" in share.parts[0].reason
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        result = packed(x)
        torch.testing.assert_close(result, found, rtol=1e-6, atol=1e-6)
        qgnn.save_packed(packed, tmp_path / "packed.safetensors")
        loaded = qgnn.load_packed(tmp_path / "packed.safetensors", model)
        for one in (loaded, copy.deepcopy(packed), through_pickle(packed)):
            assert torch.equal(one(x), result)
    assert not [spec.reason for spec in packed._packed_specs if spec.reason]
    again = qgnn.quantize_like(model, qmodel.state_dict()).eval()
    again.load_state_dict(qmodel.state_dict())
    for one in (again, copy.deepcopy(qmodel), through_pickle(qmodel)):
        assert torch.equal(one(x), found)
    restored = qgnn.restore_model(qmodel)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(restored(x), expected)
    assert torch.equal(qgnn.quantize_model(model, 32)(x), expected)
    qmodel.train()
    qmodel(x).square().sum().backward()
    assert all(p.grad is not None for key, p in qmodel.named_parameters() if name == "Adapter" or "bias_hh" not in key)


def test_results_of_the_model_are_those_of_its_codes() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Twice(WIDTH, 6)), features()
    qmodel = quantized(model, x, config=qgnn.QuantConfig(bits=8, output_bits=4))
    values = (qmodel(x) - 1) / 3
    assert len(values.unique()) <= 16
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        assert torch.equal(packed(x), qmodel(x))


def _gcn() -> GCNConv:
    conv = GCNConv(WIDTH, 6)
    conv.lin = Twice(WIDTH, 6, bias=False)
    return conv


def _gin() -> GINConv:
    return GINConv(nn.Sequential(Scaled(WIDTH, 8), nn.ReLU(), Twice(8, 6)))


@pytest.mark.parametrize("make", [_gcn, _gin])
def test_convolutions_run_the_forward_of_maps_inside(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, args = make().eval(), (features(), graph())
    qmodel = quantized(model, *args)
    assert relative(qmodel(*args), model(*args)) < 0.1
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        torch.testing.assert_close(packed(*args), qmodel(*args), rtol=1e-6, atol=1e-6)


class Unbound(nn.GRUCell):
    def forward(self, x: Tensor) -> Tensor:
        return nn.GRUCell.forward(self, x) * 2


class Handed(nn.GRUCell):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + _norm(self)


def _norm(layer: Any) -> Tensor:
    return layer.weight_hh.norm()


class Inherited(nn.GRUCell):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.penalty

    @property
    def penalty(self) -> Tensor:
        return self.weight_hh.norm()


@pytest.mark.parametrize("make", [Unbound, Handed, Inherited])
def test_code_that_reads_weights_is_as_it_is_and_said(make: Any) -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), make(WIDTH, 6)), features()
    qmodel = quantized(model, x)
    assert [part.name for part in coverage(qmodel).parts] == ["2"]
    assert relative(qmodel(x), model(x)) < 0.1
