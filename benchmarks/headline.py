"""The README's table, from result files: ``python -m benchmarks.headline``, or ``make pictures``.

Accuracy is the mean over the data sets of ``accuracy.json``, speed, memory and files are those of ``cpu.json``; both
are of the default configuration.  Nothing is measured here, and a test holds the README to what this prints.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .peers import OVER_PEERS
from .pictures import DISTILLED, RESULTS, SHAPES

__all__ = ["headline", "main"]

MODELS = {"GCN": "GCN-64", "GraphSAGE": "GraphSAGE", "GAT": "GAT-8x8"}  # their names in the two files
WIDTHS = ("INT8", "INT4", "INT2")
HEAD = ("", "", "accuracy, %", "speed, 1 and 2 threads", "peak memory", "model file")
Rows = Sequence[Mapping[str, Any]]


def headline(accuracy: Mapping[str, Any], cpu: Mapping[str, Any]) -> str:
    """The table, in Markdown: a row per model and width, over the float model in the first of them."""
    inference, memory, files = (cpu[section]["data"]["rows"] for section in ("inference", "memory", "files"))
    lines = [_line(HEAD), _line(("---",) * len(HEAD))]
    for model, name in MODELS.items():
        lines.append(_line((model, "FP32", _accuracy(accuracy["runs"], name, DISTILLED), "1", "1", "1")))
        for width in WIDTHS:
            sides = {"model": model, "side": width}
            speeds = [_only(inference, {**sides, "threads": threads}, OVER_PEERS) for threads in (1, 2)]
            smaller = (
                _only(memory, sides, "PyG's over this"),
                _only(files, {"model": model, "file": width}, "float over this"),
            )
            cells = (", ".join(f"{speed:.1f}x" for speed in speeds), *(f"1/{ratio:.1f}" for ratio in smaller))
            lines.append(_line(("", width, _accuracy(accuracy["runs"], name, width), *cells)))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _accuracy(runs: Rows, model: str, width: str) -> str:
    """Mean over data sets of the mean over seeds."""
    means = []
    for dataset in SHAPES:
        found = [run["results"][width]["test"] for run in runs if (run["dataset"], run["model"]) == (dataset, model)]
        means.append(100 * statistics.mean(found))
    return f"{statistics.mean(means):.1f}"


def _only(rows: Rows, wanted: Mapping[str, Any], figure: str) -> float:
    (found,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return float(found[figure])


def main() -> None:
    print(headline(*(json.loads((Path(RESULTS) / f"{name}.json").read_text()) for name in ("accuracy", "cpu"))))


if __name__ == "__main__":
    main()
