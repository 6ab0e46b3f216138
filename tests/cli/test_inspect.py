"""What a file says of itself, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch

import qgnn_plugin as qgnn

Run = Callable[..., tuple[int, str, str]]


def test_layers_bits_bytes_and_ranges(trained: Path, run: Run) -> None:
    path = trained / "GCN-4bit.safetensors"
    code, out, _ = run("inspect", path)
    assert code == 0
    assert f"packed GCN, {path.stat().st_size:,} bytes" in out
    assert "in_channels=12, hidden_channels=8" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("convs")}
    assert list(rows) == ["convs.0", "convs.0.lin", "convs.1", "convs.1.lin"]
    assert "weight:4" in rows["convs.0.lin"]
    assert "message:[" in rows["convs.1"]
    counts = re.search(r"(\d+) of (\d+) checksums match", out)
    assert counts is not None
    with safetensors.safe_open(path, "pt") as file:
        assert counts[1] == counts[2] == str(len(file.keys()))


def test_damaged_files_are_found(trained: Path, run: Run, tmp_path: Path) -> None:
    content = bytearray((trained / "GCN-4bit.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(content)
    code, out, err = run("inspect", tmp_path / "damaged.safetensors")
    assert (code, out) == (1, "")
    assert "checksum of tensor" in err


def test_embeddings(run: Run, tmp_path: Path) -> None:
    qgnn.PackedEmbeddings.from_float(torch.randn(20, 6), bits=4).save(tmp_path / "e.safetensors")
    code, out, _ = run("inspect", tmp_path / "e.safetensors")
    assert code == 0
    assert "20 x 6 in 4 bits" in out
