"""What a new op takes: one folder, with a reference from which its schema follows, and a module per backend."""

import subprocess
import sys
from pathlib import Path

INIT = '''
from __future__ import annotations

from torch import Tensor

from qgnn_plugin.kernels.library import register


def scaled_reference(x: Tensor, factor: float, shift: Tensor | None = None, twice: bool = False) -> Tensor:
    y = x * factor * (1 + twice)
    return y if shift is None else y + shift


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _check(x: Tensor, shift: Tensor | None) -> None:
    if shift is not None and shift.shape != x.shape:
        raise ValueError(f"Expected 'shift' of shape {list(x.shape)} (got {list(shift.shape)})")


register(scaled_reference, _fake, _check)
'''
CPU = '''
calls = []


def scaled(twice, x, factor, shift):
    calls.append(twice)
    y = x * factor * (1 + twice)
    return y if shift is None else y + shift
'''
RUN = '''
import sys

import torch
from scaled import cpu, scaled_reference

assert "scaled.triton" not in sys.modules
from qgnn_plugin.kernels.backend import use_backend

op, x = torch.ops.qgnn.scaled.default, torch.randn(3, 2)
print(op._schema)
for options in ({}, {"shift": x}, {"twice": True, "shift": x}):
    cpu.calls.clear()
    with use_backend("cpu"):
        found = op(x, 0.5, **options)
    assert cpu.calls.pop() is options.get("twice", False)
    assert torch.equal(found, scaled_reference(x, 0.5, **options))
    with use_backend("torch"):
        assert torch.equal(op(x, 0.5, **options), found)
    assert not cpu.calls
    torch.library.opcheck(op, (x, 0.5), options)
try:
    op(x, 0.5, x[:1])
except ValueError as error:
    print(error)
'''


def test_an_op_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "scaled"
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT)
    (folder / "cpu.py").write_text(CPU)
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    schema, message = done.stdout.splitlines()
    assert schema == "qgnn::scaled(Tensor x, float factor, Tensor? shift=None, bool twice=False) -> Tensor"
    assert message == "Expected 'shift' of shape [3, 2] (got [1, 2])"
