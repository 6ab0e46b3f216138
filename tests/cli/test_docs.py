"""The commands of the documentation run as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qgnn_plugin.cli import main
from qgnn_plugin.data import datasets, load_dataset

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"
SHORT = {"train": ["--epochs", "2", "--bits", "4", "2", "--hidden", "8"], "bench": ["--seconds", "0.01"]}


@pytest.mark.filterwarnings("ignore")
def test_commands_run_as_printed(graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a graph that is smaller than the demo's."""
    monkeypatch.chdir(tmp_path)
    small = load_dataset(str(graph))
    monkeypatch.setattr(datasets, "load_demo_cora", lambda: small)
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) > 5
    for line in lines:
        program, command, *rest = shlex.split(line, comments=True)
        assert program == "qgnn"
        assert main([command, *rest, *SHORT.get(command, [])]) == 0, line
