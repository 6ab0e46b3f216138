"""The GPU benchmark without a GPU: its tables, its deadlines, and a dry run in one piece."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import gpu


def test_ratios_are_to_the_fastest_baseline_of_a_group() -> None:
    rows: list[dict[str, Any]] = [
        {"model": "GCN", "name": "slow", "ms": 8.0},
        {"model": "GCN", "name": "fast", "ms": 4.0},
        {"model": "GCN", "name": "ours", "ms": 1.0},
        {"model": "GCN", "name": "failed", "error": "no"},
        {"model": "GAT", "name": "ours", "ms": 1.0},
    ]
    gpu._ratios(rows, ("model",), ("slow", "fast"))
    assert [row.get("vs") for row in rows] == [0.5, 1.0, 4.0, None, None]


def test_a_section_ends_at_its_deadline_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = gpu.Clock()
    rows = [{"name": name} for name in "abc"]
    assert list(clock.within("training", rows, "graph")) == rows
    assert clock.skipped == []
    monkeypatch.setitem(gpu.DEADLINES, "training", 0)
    assert list(clock.within("training", rows, "graph")) == rows[:1]
    assert clock.skipped == ["training: graph after 'a'"]


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    document = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert not [row for row in document["checks"] if row["error"]]
    assert {row["check"] for row in document["checks"]} >= {"GCN int2", "GraphSAGE int4", "GAT int4", "linear int8"}
    failed = {row["name"] for section in ("aggregate", "inference", "training") for row in document[section]
              if "error" in row}  # fmt: skip
    assert failed <= {"cuSPARSE fp16"}  # MKL has none
    assert "## Inference" in (tmp_path / "gpu-dry-run.md").read_text()
