"""Every layer, native or generic, through a file: bitwise the same, with what never ran left out of packing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core.support import CONVS, WIDTH, features, graph
from layers.test_generic_convs import GENERIC
from torch import Tensor, nn

import qgnn_plugin
from qgnn_plugin import QuantConfig

Case = tuple[Callable[[], nn.Module], tuple[Any, ...]]
LAYERS: dict[str, Case] = {**{name: (make, ()) for name, make in CONVS.items()}, **GENERIC}


class Around(nn.Module):
    """A layer that runs, under two names, and one that does not."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.listed = nn.ModuleList([make()])
        self.norm, self.layer, self.idle = nn.LayerNorm(WIDTH), self.listed[0], make()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.layer(self.norm(x), *args)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_survive_their_file(name: str, bits: int, tmp_path: Path) -> None:
    make, more = LAYERS[name]
    args = (features(), graph(), *more)
    torch.manual_seed(0)
    config = QuantConfig(bits=bits, granularity="node" if bits == 4 else "tensor", message_bits=8)
    qmodel = qgnn_plugin.quantize_model(Around(make), config=config).eval()
    qgnn_plugin.calibrate(qmodel, [args], forward=lambda model, batch: model(*batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = qgnn_plugin.pack_model(qmodel)
    path, again = tmp_path / "model", tmp_path / "again"
    qgnn_plugin.save_packed(packed, path)
    torch.manual_seed(1)
    loaded = qgnn_plugin.load_packed(path, Around(make))
    assert torch.equal(loaded(*args), packed(*args))
    assert loaded.layer is loaded.listed[0]
    assert str(qgnn_plugin.summary(loaded)) == str(qgnn_plugin.summary(packed))
    assert str(loaded) == str(packed)
    qgnn_plugin.save_packed(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    state = qmodel.state_dict()
    other = qgnn_plugin.quantize_like(Around(make), state).eval()
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other(*args), qmodel(*args))
