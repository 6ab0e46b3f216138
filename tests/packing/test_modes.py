"""Models whose modules compute something as they leave training mode, as PyG's ``TGNMemory`` stores its messages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qgnn_plugin as qgnn

NODES, WIDTH = 12, 8


class _Memory(nn.Module):
    """Holds what came last back from its memory until training is over, or the next batch comes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("memory", torch.zeros(NODES, WIDTH))
        self.waiting: Tensor | None = None

    def store(self) -> None:
        if self.waiting is not None:
            self.memory = self.memory + self.lin(self.waiting.detach()).detach()
        self.waiting = None

    def train(self, mode: bool = True) -> _Memory:
        if self.training and not mode:
            self.store()
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.store()
        self.waiting = x
        return self.lin(x) + self.memory


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = _Memory(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x).relu())


def batches(count: int) -> list[Tensor]:
    return [torch.randn(NODES, WIDTH) for _ in range(count)]


@pytest.fixture
def qmodel() -> Any:
    torch.manual_seed(0)
    model = qgnn.calibrate(qgnn.quantize_model(_Net()), [(x,) for x in batches(4)]).train()
    for x in batches(2):
        model(x)
    return model


def test_a_model_in_training_mode_packs_as_it_is_in_eval_mode(qmodel: Any) -> None:
    waiting, memory = qmodel.memory.waiting.clone(), qmodel.memory.memory.clone()
    packed = qgnn.pack_model(qmodel)
    assert torch.equal(qmodel.memory.waiting, waiting)
    assert torch.equal(qmodel.memory.memory, memory)
    expected = copy.deepcopy(qmodel).eval()
    assert not torch.equal(packed.memory.memory, memory)
    with torch.no_grad():
        for x in batches(3):
            torch.testing.assert_close(packed(x), expected(x))


def test_what_is_loaded_is_what_was_saved(qmodel: Any, tmp_path: Path) -> None:
    packed = qgnn.pack_model(qmodel)
    qgnn.save_packed(packed, tmp_path / "model.safetensors")
    loaded = qgnn.load_packed(tmp_path / "model.safetensors", _Net().train())
    assert torch.equal(loaded.memory.memory, packed.memory.memory)
    for x in batches(2):
        assert torch.equal(loaded(x), packed(x))


def test_a_packed_model_leaves_training_mode(qmodel: Any) -> None:
    packed, (first, second) = qgnn.pack_model(qmodel), batches(2)
    expected = copy.deepcopy(packed)
    for model in (packed, expected):
        model(first)
    assert torch.equal(packed.train().eval()(second), expected(second))
