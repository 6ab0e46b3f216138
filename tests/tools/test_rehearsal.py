"""Every op and model goes the whole way of a launch on a card that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qgnn_plugin.kernels.backend import available_backends
from tools.rehearsal import _touched_bytes, rehearse

ROOT = Path(__file__).parents[2]
OPS = {
    "quantize_pack", "unpack_dequantize", "fake_quantize", "fake_quantize_backward", "linear", "aggregate", "hub",
    "peak", "hub_peak", "attention", "attention_hub", "float_sum", "float_sum_hub", "update", "correct", "head_dots",
}  # fmt: skip
REGISTERS = 65536  # of a processor


def rehearsed(target: str, *arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("rehearsed.py")), target, *arguments]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(document: dict[str, Any]) -> None:
    first, second = document["launches"]
    assert {kernel.removesuffix("_kernel") for kernel in first} == OPS
    assert first == second
    assert document["new"] == [], "a graph of another size made new binaries"
    for entry in document["ops"] + document["models"]:
        if "registers" in entry:
            assert entry["spills"] == entry["local_bytes"] == 0, entry
            assert entry["registers"] * entry["threads"] <= REGISTERS, entry


def test_every_launch_on_a_hopper_card() -> None:
    check(rehearsed("sm_90", "4", "--models", "GCN", "GAT"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_launch(target: str) -> None:
    check(rehearsed(target, "2", "4", "8"))


def test_not_under_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), rehearse("sm_90"):
        pass
    with pytest.raises(ValueError, match="sm_80"), rehearse("sm_12"):
        pass
    assert "triton" not in available_backends("cpu")


def test_second_stages_touch_the_rows_of_hubs() -> None:
    """All partial results, and of results as many rows as there are hubs."""
    partial, out, one = torch.empty(40, 8), torch.empty(1000, 8), torch.empty(1)
    for kernel in ("hub_kernel", "attention_hub_kernel", "hub_peak_kernel", "float_sum_hub_kernel"):
        assert _touched_bytes(kernel, "partial", partial, 3) == partial.nbytes
        assert _touched_bytes(kernel, "out", out, 3) == 3 * 8 * 4
        assert _touched_bytes(kernel, "scale", one, 3) == one.nbytes
        assert _touched_bytes(kernel, "out", out[:0], 3) == 0
    assert _touched_bytes("aggregate_kernel", "out", out, 3) == out.nbytes
