"""Result files: one line per run, and the same data."""

import json

import pytest

from benchmarks.environment import compact_json, environment


def test_a_run_is_a_line() -> None:
    runs = [{"seed": seed, "curves": {"loss": [1.0, 0.5]}, "rows": [{"a": 1}]} for seed in range(3)]
    document = {"environment": {"cores": 2}, "section": {"settings": [1, 2], "data": {"runs": runs}}, "empty": []}
    text = compact_json(document)
    assert json.loads(text) == document
    lines = text.splitlines()
    assert sum('"seed"' in line for line in lines) == 3
    assert len(lines) == 3 + 11


def test_figures_of_another_processor_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    own = environment(threads=1)
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    changed = {key: (own[key], value) for key, value in environment(threads=1).items() if value != own[key]}
    assert [after.removeprefix(before) for before, after in changed.values()] == [", kernels compiled for haswell"]
