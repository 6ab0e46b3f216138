"""``warmup``: kernels are compiled ahead of time, and what is compiled on a first call is said once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCN, GraphSAGE

import qgnn_plugin as qgnn

ARGS = (torch.randn(20, 12), torch.randint(20, (2, 60)))


def packed(model: nn.Module) -> nn.Module:
    return qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(model, bits=4), ARGS))


@pytest.mark.parametrize("make", [GCN, GraphSAGE])
def test_inputs_are_found_or_asked_for(make: type[nn.Module]) -> None:
    model = packed(make(12, 8, 2, 3))
    assert qgnn.warmup(model, progress=False) >= 0
    assert qgnn.warmup(model, *ARGS, progress=False) == 0


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = GCN(12, 8, 2, 3)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, more: int) -> torch.Tensor:
        return self.net(x, edge_index) + more


def test_what_is_not_known_is_asked_for() -> None:
    qmodel = qgnn.calibrate(qgnn.quantize_model(Other(), bits=4), (*ARGS, 1))
    with pytest.raises(ValueError, match=r"warmup\(packed, x, edge_index"):
        qgnn.warmup(qgnn.pack_model(qmodel))
    with pytest.raises(ValueError, match=r"Expected a packed model .got a GCN.; pack it"):
        qgnn.warmup(GCN(12, 8, 2, 3))


@pytest.mark.slow
def test_a_new_machine_is_told(tmp_path: Path) -> None:
    """In a process without compiled kernels: by default a call says so once, ``warmup`` shows a line instead."""
    file = tmp_path / "model.safetensors"
    qgnn.save_packed(packed(GCN(12, 8, 2, 3)), file)
    code = """
        import sys, torch, qgnn_plugin as qgnn
        from torch_geometric.nn import GCN
        model = qgnn.load_packed(sys.argv[2], GCN(12, 8, 2, 3))
        if sys.argv[1] == "warm":
            print(qgnn.warmup(model) > 0)
        model(torch.zeros(20, 12), torch.zeros(2, 60).long())
    """
    for way, cache in (("cold", "one"), ("warm", "two"), ("cold", "two")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), way, str(file)],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / cache)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert ("qgnn_plugin.warmup(packed)" in done.stderr) == (cache == "one")
        assert ("Compiling kernels" in done.stderr) == (cache == "one" or way == "warm")
        assert done.stdout.strip() == ("True" if way == "warm" else "")
