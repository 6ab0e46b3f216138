"""Accuracy at every width: ``make bench-accuracy``, resumable.

For each data set, model and seed: the float model, the float model distilled from itself, and the converted model at
8, 4 and 2 bits, all by the default :class:`qgnn_plugin.recipe.Recipe`.  Reported is the test accuracy of the epoch with
the best validation accuracy.  Finished runs are kept one file each: an interrupted table goes on where it stopped.
What is known about the rows, written by hand in ``accuracy-notes.md``, follows the table.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch

from qgnn_plugin import QuantConfig
from qgnn_plugin.data import load_dataset, to_sparse_features
from qgnn_plugin.recipe import Recipe, distil, fit_float, fit_quantized

from .environment import compact_json, environment, write_atomically
from .models import MODELS, build_model

DATASETS = ("Cora", "PubMed", "Photo", "CS")
COLUMNS = ("FP32", "FP32 self-distilled", "INT8", "INT4", "INT2")
BITS = {"INT8": 8, "INT4": 4, "INT2": 2}
SPARSE_BELOW = 0.5
# Points of accuracy that a width may lose, and against which column.
AIMS = {"INT8": ("FP32", 0.3), "INT4": ("FP32", 0.3), "INT2": ("FP32 self-distilled", 0.7)}

NOTES = """\
Test accuracy in percent at the best validation epoch, mean and standard deviation over seeds.  Inputs, weights,
activations, messages and attention coefficients are at the stated width (0/1 inputs, also with one scale per row, are
exact in one bit).  Wider, in float32: biases, attention vectors and logits, code sums and their affine step, the state
of a propagation between its steps, ranges, and the logits that the model returns.
Data sets without a public split use a random one per seed, 20 / 30 / rest per class.  One recipe serves every row; its
settings were chosen on validation accuracy.
"""


def run_cell(dataset: str, model_name: str, seed: int, root: str) -> dict[str, Any]:
    """Every column of one data set, model and seed: validation and test accuracy, best epoch and seconds."""
    torch.set_num_threads(1)
    # Adam with weight decay drives unused weights into denormal numbers, a hundred times slower on a CPU.
    torch.set_flush_denormal(True)
    data = to_sparse_features(load_dataset(dataset, root, seed=seed), max_density=SPARSE_BELOW)
    torch.manual_seed(seed)
    model = build_model(model_name, data.x.size(1), int(data.y.max()) + 1)
    results: dict[str, Any] = {}

    def record(column: str, start: float, result: Any) -> None:
        results[column] = {
            "val": result.val_accuracy,
            "test": result.test_accuracy,
            "epoch": result.epoch,
            "seconds": round(time.perf_counter() - start, 2),
        }

    start = time.perf_counter()
    record("FP32", start, fit_float(model, data))
    torch.manual_seed(seed)
    start = time.perf_counter()
    record("FP32 self-distilled", start, distil(copy.deepcopy(model), model, data))
    for column, bits in BITS.items():
        torch.manual_seed(seed)
        start = time.perf_counter()
        record(column, start, fit_quantized(model, data, bits))
    return {"dataset": dataset, "model": model_name, "seed": seed, "results": results}


def _work(task: tuple[str, str, int, str, Path]) -> str:
    dataset, model, seed, root, path = task
    if path.exists():  # another process has done it meanwhile
        return f"{dataset} {model} seed {seed}: done elsewhere"
    start = time.perf_counter()
    cell = run_cell(dataset, model, seed, root)
    write_atomically(path, json.dumps(cell))
    scores = "  ".join(f"{column} {100 * r['test']:.1f}" for column, r in cell["results"].items())
    return f"{dataset} {model} seed {seed}: {scores}  ({time.perf_counter() - start:.0f} s)"


def markdown(cells: list[dict[str, Any]]) -> str:
    """The table, one row per data set and model, with the rows that miss an aim listed below it."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["dataset"], cell["model"]), []).append(cell)
    lines = [NOTES, "| data set | model | seeds | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 3) + "|"]
    missed = []
    for (dataset, model), group in groups.items():
        scores = {c: [100 * cell["results"][c]["test"] for cell in group] for c in COLUMNS}
        means = {c: statistics.mean(values) for c, values in scores.items()}
        spread = {c: statistics.stdev(values) if len(values) > 1 else math.nan for c, values in scores.items()}
        several = len(group) > 1
        cells_text = " | ".join(f"{means[c]:.1f}" + (f" ± {spread[c]:.1f}" if several else "") for c in COLUMNS)
        lines.append(f"| {dataset} | {model} | {len(group)} | {cells_text} |")
        for column, (against, points) in AIMS.items():
            loss = means[against] - means[column]
            if loss > points:
                missed.append(f"{dataset}, {model}, {column}: {loss:.1f} points under {against} (aim {points})")
    lines.append("")
    if missed:
        lines += ["Rows that miss the aim:", "", *(f"- {line}" for line in missed)]
    else:
        lines.append(
            "Every row meets the aim: INT8 and INT4 within 0.3 points of FP32, INT2 within 0.7 of FP32 self-distilled."
        )
    return "\n".join(lines) + "\n"


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    names = list(MODELS)
    position = DATASETS.index(cell["dataset"]) if cell["dataset"] in DATASETS else len(DATASETS)
    return position, cell["dataset"], names.index(cell["model"]), cell["seed"]


def _file_name(dataset: str, model: str, seed: int) -> str:
    return f"{dataset.replace('/', '-')}--{model}--{seed}.json"


def unpack_report(out: Path) -> None:
    """Put the runs of an earlier ``accuracy.json`` back as files, if made by today's recipe and configuration."""
    path = out / "accuracy.json"
    if not path.exists():
        return
    earlier = json.loads(path.read_text())
    if (earlier["recipe"], earlier.get("config")) != (dataclasses.asdict(Recipe()), QuantConfig().to_dict()):
        return
    for cell in earlier["runs"]:
        target = out / "accuracy-runs" / _file_name(cell["dataset"], cell["model"], cell["seed"])
        if not target.exists():
            write_atomically(target, json.dumps(cell))


def report(out: Path) -> str:
    """Collect the finished runs under ``out`` into ``accuracy.json`` and ``accuracy.md``."""
    files = sorted((out / "accuracy-runs").glob("*.json"))
    cells = sorted((json.loads(path.read_text()) for path in files), key=_order)
    table = markdown(cells)
    settings = dataclasses.asdict(Recipe())
    text = {"environment": environment(threads=1), "recipe": settings, "config": QuantConfig().to_dict(), "runs": cells}
    write_atomically(out / "accuracy.json", compact_json(text) + "\n")
    notes = out / "accuracy-notes.md"
    explained = f"\n{notes.read_text()}" if notes.exists() else ""
    write_atomically(out / "accuracy.md", f"# Accuracy\n\n{table}{explained}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", action="store_true", help="only rewrite the table from finished runs")
    args = parser.parse_args()
    runs = args.out / "accuracy-runs"
    runs.mkdir(parents=True, exist_ok=True)
    unpack_report(args.out)
    if not args.report:
        tasks = [
            (dataset, model, seed, args.root, runs / _file_name(dataset, model, seed))
            for seed in range(args.seeds)
            for dataset in args.datasets
            for model in args.models
        ]
        tasks = [task for task in tasks if not task[-1].exists()]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for count, line in enumerate(pool.imap_unordered(_work, tasks), 1):
                print(f"[{count}/{len(tasks)}] {line}", flush=True)
    print(report(args.out))


if __name__ == "__main__":
    main()
