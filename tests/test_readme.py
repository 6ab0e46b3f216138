"""The README's Python blocks run as printed, one after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.headline import headline
from benchmarks.pictures import RESULTS

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_code_blocks_run_as_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the code writes a file
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_the_table_is_made_of_the_results() -> None:
    accuracy, cpu = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("accuracy", "cpu"))
    assert headline(accuracy, cpu) in README.read_text(), "Expected the table that 'make pictures' prints"
