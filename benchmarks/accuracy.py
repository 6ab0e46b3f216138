"""Accuracy at every width: ``make bench-accuracy``, resumable.

For each data set, model and seed: the float model, the float model distilled from itself, and the model converted from
that at 8, 4 and 2 bits, all by the default :class:`qgnn_plugin.recipe.Recipe`.  Reported is the test accuracy of the
best validation epoch.  ``--again INT2`` runs that column of the finished table anew, after a change of the recipe that
concerns no other.  Runs with ``--one-bit`` have a table of their own, and so have those with
``--calibrated``: the same float models after :func:`qgnn_plugin.calibrate` alone, by its default method.  Finished runs
are kept one file each: an interrupted table goes on where it stopped.
What is known about the rows, written by hand in ``accuracy-notes.md``, follows the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch

from qgnn_plugin import QuantConfig, calibrate, quantize_model
from qgnn_plugin.data import load_dataset, to_sparse_features
from qgnn_plugin.inputs import run_model
from qgnn_plugin.recipe import Recipe, StageResult, born_again, fit_float, fit_quantized

from .environment import compact_json, environment, write_atomically
from .jobs import run_jobs
from .models import MODELS, build_model

DATASETS = ("Cora", "PubMed", "Photo", "CS")
FLOATS = ("FP32", "FP32 self-distilled")
BITS = {"INT8": 8, "INT4": 4, "INT2": 2}
ONE_BIT = {"INT1": 1}
RUNS, ONE_BIT_RUNS, CALIBRATED_RUNS = "accuracy-runs", "one-bit-runs", "calibrated-runs"
SPARSE_BELOW = 0.5
# Points of accuracy that a width may lose, and against which column.
AIMS = {"INT8": ("FP32", 0.3), "INT4": ("FP32", 0.3), "INT2": ("FP32 self-distilled", 0.7), "INT1": ("FP32", 2.0)}

CALIBRATED_AIMS = {"INT8": ("FP32", 0.1), "INT4": ("FP32", 0.5), "INT2": ("FP32", 2.0)}

NOTES = """\
Test accuracy in percent at the best validation epoch (that of the highest accuracy, at two bits of the lowest loss),
mean and standard deviation over seeds.  Inputs, weights, activations, messages and attention coefficients are at the
stated width (0/1 inputs, also with one scale per row, are exact in one bit).  Wider, in float32: biases, attention
vectors and logits, code sums and their affine step, the state of a propagation between its steps, ranges, and the
logits that the model returns.
Data sets without a public split use a random one per seed, 20 / 30 / rest per class.  One recipe serves every row; its
settings were chosen on validation accuracy.
"""
CALIBRATED_NOTES = """\
The same float models after `calibrate(quantize_model(model, bits), data)`: no training and no labels.  Processor time
is that of one thread, in seconds, mean over seeds.
"""


def _float_model(dataset: str, model_name: str, seed: int, root: str) -> tuple[Any, StageResult]:
    """A data set and the float model trained on it."""
    torch.set_num_threads(1)
    # Adam with weight decay drives unused weights into denormal numbers, a hundred times slower on a CPU.
    torch.set_flush_denormal(True)
    data = to_sparse_features(load_dataset(dataset, root, seed=seed), max_density=SPARSE_BELOW)
    torch.manual_seed(seed)
    model = build_model(model_name, data.x.size(1), int(data.y.max()) + 1)
    return data, fit_float(model, data)


def run_calibrated(dataset: str, model_name: str, seed: int, root: str) -> dict[str, Any]:
    """One data set, model and seed after calibration alone: validation and test accuracy, seconds of the processor."""
    data, trained = _float_model(dataset, model_name, seed, root)
    results: dict[str, Any] = {"FP32": {"val": trained.val_accuracy, "test": trained.test_accuracy}}
    for column, bits in BITS.items():
        qmodel = quantize_model(trained.model, bits)
        start = time.process_time()
        calibrate(qmodel, data)
        seconds = time.process_time() - start
        with torch.no_grad():
            right = run_model(qmodel.eval(), data).argmax(-1) == data.y
        scores = {
            "val": float(right[data.val_mask].float().mean()),
            "test": float(right[data.test_mask].float().mean()),
        }
        results[column] = {**scores, "seconds": round(seconds, 2)}
    return {"dataset": dataset, "model": model_name, "seed": seed, "results": results}


def run_cell(
    dataset: str,
    model_name: str,
    seed: int,
    root: str,
    widths: Mapping[str, int] = BITS,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every column of one data set, model and seed: validation and test accuracy, best epoch and seconds.

    Columns that are ``kept`` from an earlier run are not run again where its float models come out the same.
    """
    results: dict[str, Any] = {}

    def record(column: str, start: float, result: Any) -> None:
        results[column] = {
            "val": result.val_accuracy,
            "test": result.test_accuracy,
            "epoch": result.epoch,
            "seconds": round(time.perf_counter() - start, 2),
        }

    start = time.perf_counter()
    data, trained = _float_model(dataset, model_name, seed, root)
    record("FP32", start, trained)
    torch.manual_seed(seed)
    start = time.perf_counter()
    distilled = born_again(trained, data)
    record("FP32 self-distilled", start, distilled)
    same = all(kept and results[column]["test"] == kept[column]["test"] for column in FLOATS)
    for column, bits in widths.items():
        if kept and same and column in kept:
            results[column] = kept[column]
            continue
        torch.manual_seed(seed)
        start = time.perf_counter()
        record(column, start, fit_quantized(distilled.model, data, bits))
    return {"dataset": dataset, "model": model_name, "seed": seed, "results": results}


def run_one_bit(dataset: str, model_name: str, seed: int, root: str) -> dict[str, Any]:
    """As :func:`run_cell`, at one bit."""
    return run_cell(dataset, model_name, seed, root, ONE_BIT)


def _work(task: tuple[str, str, int, str, Path, dict[str, Any]]) -> str:
    dataset, model, seed, root, path, kept = task
    if path.exists():  # another process has done it meanwhile
        return f"{dataset} {model} seed {seed}: done elsewhere"
    start = time.perf_counter()
    run = RUN_BY_FOLDER[path.parent.name]
    cell = run(dataset, model, seed, root, kept=kept) if kept else run(dataset, model, seed, root)
    write_atomically(path, json.dumps(cell))
    scores = "  ".join(f"{column} {100 * r['test']:.1f}" for column, r in cell["results"].items())
    return f"{dataset} {model} seed {seed}: {scores}  ({time.perf_counter() - start:.0f} s)"


RUN_BY_FOLDER = {RUNS: run_cell, ONE_BIT_RUNS: run_one_bit, CALIBRATED_RUNS: run_calibrated}
Groups = dict[tuple[str, str], list[dict[str, Any]]]


def _groups(cells: list[dict[str, Any]]) -> Groups:
    groups: Groups = {}
    for cell in cells:
        groups.setdefault((cell["dataset"], cell["model"]), []).append(cell)
    return groups


def calibrated_markdown(cells: list[dict[str, Any]]) -> str:
    """The table of calibration alone, with the rows that miss an aim listed below it."""
    columns = ("FP32", *BITS)
    lines = [CALIBRATED_NOTES, "| data set | model | seeds | " + " | ".join((*columns, "INT2, s")) + " |"]
    lines.append("| --- " * (len(columns) + 4) + "|")
    missed = []
    for (dataset, model), group in _groups(cells).items():
        means = {c: 100 * statistics.mean(cell["results"][c]["test"] for cell in group) for c in columns}
        seconds = statistics.mean(cell["results"]["INT2"]["seconds"] for cell in group)
        scores = " | ".join(f"{means[c]:.1f}" for c in columns)
        lines.append(f"| {dataset} | {model} | {len(group)} | {scores} | {seconds:.1f} |")
        missed += _misses(f"{dataset}, {model}", means, CALIBRATED_AIMS)
    listed = ["Rows that miss the aim:", "", *missed] if missed else ["Every row meets the aim."]
    return (
        "\n".join([*lines, "", "Aim: INT8 within 0.1 points of FP32, INT4 0.5, INT2 2.  " + listed[0], *listed[1:]])
        + "\n"
    )


def _misses(row: str, means: dict[str, float], aims: dict[str, tuple[str, float]]) -> list[str]:
    losses = {
        column: (means[against] - means[column], against, points)
        for column, (against, points) in aims.items()
        if column in means
    }
    return [
        f"- {row}, {column}: {loss:.1f} points under {against} (aim {points})"
        for column, (loss, against, points) in losses.items()
        if loss > points
    ]


def markdown(cells: list[dict[str, Any]]) -> str:
    """The table, one row per data set and model, with the rows that miss an aim listed below it."""
    groups = _groups(cells)
    columns = list(cells[0]["results"])
    lines = [NOTES, "| data set | model | seeds | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 3) + "|"]
    missed = []
    for (dataset, model), group in groups.items():
        scores = {c: [100 * cell["results"][c]["test"] for cell in group] for c in columns}
        means = {c: statistics.mean(values) for c, values in scores.items()}
        spread = {c: statistics.stdev(values) if len(values) > 1 else math.nan for c, values in scores.items()}
        several = len(group) > 1
        cells_text = " | ".join(f"{means[c]:.1f}" + (f" ± {spread[c]:.1f}" if several else "") for c in columns)
        lines.append(f"| {dataset} | {model} | {len(group)} | {cells_text} |")
        missed += _misses(f"{dataset}, {model}", means, AIMS)
    lines.append("")
    if missed:
        lines += ["Rows that miss the aim:", "", *missed]
    else:
        aims = (f"{c} within {points:g} points of {against}" for c, (against, points) in AIMS.items() if c in columns)
        lines.append(f"Every row meets the aim: {', '.join(aims)}.")
    return "\n".join(lines) + "\n"


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    names = list(MODELS)
    position = DATASETS.index(cell["dataset"]) if cell["dataset"] in DATASETS else len(DATASETS)
    return position, cell["dataset"], names.index(cell["model"]), cell["seed"]


def _file_name(dataset: str, model: str, seed: int) -> str:
    return f"{dataset.replace('/', '-')}--{model}--{seed}.json"


@dataclasses.dataclass(frozen=True)
class Table:
    """Where the runs of a table and its report are, by name below a folder of results."""

    runs: str
    name: str
    title: str
    markdown: Callable[[list[dict[str, Any]]], str]

    def finished(self, out: Path) -> list[dict[str, Any]]:
        return sorted((json.loads(path.read_text()) for path in sorted((out / self.runs).glob("*.json"))), key=_order)


TABLES = (
    Table(RUNS, "accuracy", "Accuracy", markdown),
    Table(ONE_BIT_RUNS, "one-bit", "Accuracy at one bit", markdown),
    Table(CALIBRATED_RUNS, "calibrated", "Accuracy after calibration alone", calibrated_markdown),
)


def _settings() -> dict[str, Any]:
    return {"recipe": dataclasses.asdict(Recipe()), "config": QuantConfig().to_dict()}


def unpack_report(out: Path) -> None:
    """Put the runs of earlier reports back as files, if made by today's recipe and configuration."""
    for table in TABLES:
        path = out / f"{table.name}.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        if {key: earlier.get(key) for key in _settings()} != _settings():
            continue
        for cell in earlier["runs"]:
            target = out / table.runs / _file_name(cell["dataset"], cell["model"], cell["seed"])
            if not target.exists():
                write_atomically(target, json.dumps(cell))


def _kept(out: Path, again: list[str]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Of the runs of the report, whatever recipe made them, the columns that are not to be run ``again``."""
    runs = json.loads((out / f"{TABLES[0].name}.json").read_text())["runs"] if again else []
    return {
        (cell["dataset"], cell["model"], cell["seed"]): {c: r for c, r in cell["results"].items() if c not in again}
        for cell in runs
    }


def report(out: Path) -> str:
    """Collect the finished runs under ``out`` into a ``.json`` and a ``.md`` for each table that has any."""
    texts = []
    for table in TABLES:
        cells = table.finished(out)
        if not cells:
            continue
        text = {"environment": environment(threads=1), **_settings(), "runs": cells}
        write_atomically(out / f"{table.name}.json", compact_json(text) + "\n")
        notes = out / f"{table.name}-notes.md"
        explained = f"\n{notes.read_text()}" if notes.exists() else ""
        texts.append(table.markdown(cells))
        write_atomically(out / f"{table.name}.md", f"# {table.title}\n\n{texts[-1]}{explained}")
    return "\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one-bit", action="store_true", help="run the table of one bit")
    parser.add_argument("--calibrated", action="store_true", help="run the table of calibration alone")
    parser.add_argument("--again", nargs="+", default=[], choices=list(BITS), help="run only these columns anew")
    parser.add_argument("--report", action="store_true", help="only rewrite the table from finished runs")
    args = parser.parse_args()
    if args.again and (args.one_bit or args.calibrated):
        parser.error("--again is of the table of 8, 4 and 2 bits")
    for folder in RUN_BY_FOLDER:
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    runs = args.out / (CALIBRATED_RUNS if args.calibrated else ONE_BIT_RUNS if args.one_bit else RUNS)
    unpack_report(args.out)
    if not args.report:
        kept = _kept(args.out, args.again)
        tasks = [
            (
                dataset, model, seed, args.root, runs / _file_name(dataset, model, seed),
                kept.get((dataset, model, seed), {}),
            )
            for seed in range(args.seeds)
            for dataset in args.datasets
            for model in args.models
        ]  # fmt: skip
        tasks = [task for task in tasks if not task[4].exists()]
        for dataset in sorted({task[0] for task in tasks}):
            load_dataset(dataset, args.root)  # PyG processes its files on the first call; two processes would collide
        run_jobs(_work, tasks, args.jobs)
    print(report(args.out))


if __name__ == "__main__":
    main()
