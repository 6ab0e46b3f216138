"""Result files: one line per run, and the same data."""

import json

from benchmarks.environment import compact_json


def test_a_run_is_a_line() -> None:
    runs = [{"seed": seed, "curves": {"loss": [1.0, 0.5]}, "rows": [{"a": 1}]} for seed in range(3)]
    document = {"environment": {"cores": 2}, "section": {"settings": [1, 2], "data": {"runs": runs}}, "empty": []}
    text = compact_json(document)
    assert json.loads(text) == document
    lines = text.splitlines()
    assert sum('"seed"' in line for line in lines) == 3
    assert len(lines) == 3 + 11
