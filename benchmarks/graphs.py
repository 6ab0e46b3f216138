"""Graph-level tasks at every width: ``make bench-graphs``, resumable.

For each data set and fold (or seed): the float model, and the converted model in its default configuration at 8, 4 and
2 bits, calibrated and trained on with the float model as teacher.  Reported is the test score of the epoch with the
best validation score, which may be that before any training.  Finished runs are kept one file each: an interrupted
table goes on where it stopped.

    python -m benchmarks.graphs --root data                              # everything
    python -m benchmarks.graphs --root data --tasks CSL MUTAG --runs 3   # three folds of two
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.loader import DataLoader

import qgnn_plugin as qgnn
from qgnn_plugin.freezing import OscillationFreezing

from .environment import compact_json, environment, write_atomically
from .graph_tasks import TASKS, Split, Task
from .jobs import run_jobs

COLUMNS = ("FP32", "INT8", "INT4", "INT2")
FLOAT_RATE, RATE = 0.01, 0.003
# As in qgnn_plugin.recipe: of so many bits codes that oscillate are frozen, the lowest loss decides, and a second try
# trains without dropout for so many times the epochs.
FEWEST, RETRY = 2, 4
EVALUATE_EVERY = 2
# What a width may lose: points of accuracy, and percent of the error of a regression.
AIMS = {"CSL": ("INT2", 1.0), "ESOL": ("INT4", 2.0)}

NOTES = """\
Accuracy in percent (higher is better), or root mean squared error in the units of the data (ESOL: log mol/l, lower is
better), on the test part at the epoch of the best validation score: mean and standard deviation over folds or seeds;
`runs` says how many were run.  Folds are stratified: one to test, one to stop on, the rest to train; ESOL has random
splits of 80, 10 and 10 %.  The default configuration; a converted model starts as `calibrate` leaves it and learns from
the float model's outputs, as in `qgnn_plugin.recipe`: at two bits the lowest loss decides, of two tries.  CSL are
circular skip links with 20 Laplacian eigenvectors as positions, whose signs are drawn anew in training.  REDDIT-BINARY
has one-hot degrees as features.
"""


def _outputs(model: nn.Module, batch: Any) -> Tensor:
    edge_attr = (batch.edge_attr,) if batch.get("edge_attr") is not None and _takes_edges(model) else ()
    return model(batch.x, batch.edge_index, *edge_attr, batch.batch, batch.num_graphs)


def _takes_edges(model: nn.Module) -> bool:
    return hasattr(model, "convs")


class Run:
    """One fold or seed: its data in batches, and how models are trained and scored on it."""

    def __init__(self, task: Task, split: Split, seed: int) -> None:
        self.task = task
        generator = torch.Generator().manual_seed(seed)
        self.train = DataLoader(
            split.train, task.batch_size, shuffle=True, drop_last=len(split.train) >= task.batch_size,
            generator=generator,
        )  # fmt: skip
        self.val, self.test = (list(DataLoader(part, 128)) for part in (split.val, split.test))
        y = torch.cat([graph.y.view(-1) for graph in split.train])
        self.mean, self.scale = (y.mean(), y.std()) if task.regression else (torch.zeros(()), torch.ones(()))

    def _batch(self, batch: Any) -> Any:
        if self.task.flips:  # of the graph's eigenvectors, each as likely as its opposite
            signs = torch.randint(2, (batch.num_graphs, batch.x.size(1))).float() * 2 - 1
            batch.x = batch.x * signs[batch.batch]
        return batch

    def loss(self, out: Tensor, batch: Any, soft: Tensor | None) -> Tensor:
        if self.task.regression:
            return F.mse_loss(out, (batch.y.view(-1) - self.mean) / self.scale if soft is None else soft)
        return F.cross_entropy(out, batch.y.view(-1)) if soft is None else qgnn.training.distillation_loss(out, soft)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: list[Any]) -> tuple[float, float]:
        """Accuracy, or minus the error; and minus the loss."""
        model.eval()
        out = torch.cat([_outputs(model, batch) for batch in batches])
        y = torch.cat([batch.y.view(-1) for batch in batches])
        if self.task.regression:
            error = float((out * self.scale + self.mean - y).square().mean().sqrt())
            return -error, -error
        return float((out.argmax(1) == y).float().mean()), -float(F.cross_entropy(out, y))

    def fit(
        self, model: nn.Module, epochs: int, lr: float, teacher: nn.Module | None = None, few: bool = False,
        dropout: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Train ``model`` in place to its best validation epoch; ``few`` levels are frozen and judged by the loss."""
        start, best, best_key = time.perf_counter(), None, None
        optimizer = torch.optim.Adam(qgnn.training.parameter_groups(model, lr))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        freezing = OscillationFreezing(model, epochs * len(self.train)) if few else None
        for epoch in range(epochs + 1):
            if epoch:
                self._train(model.train(dropout), optimizer, teacher, freezing)
                schedule.step()
            if epoch % EVALUATE_EVERY and epoch != epochs:
                continue
            score, loss = self.score(model, self.val)
            key = (loss, score) if few else (score, loss)
            if best_key is None or key > best_key:
                best_key, best = key, copy.deepcopy(model.state_dict())
                found = {"val": abs(score), "val_loss": -loss, "epoch": epoch}
                found["test"] = abs(self.score(model, self.test)[0])
        model.load_state_dict(best)
        model.eval()
        return {**found, "seconds": round(time.perf_counter() - start, 1)}

    def fit_quantized(self, model: nn.Module, bits: int, epochs: int) -> dict[str, Any]:
        """The converted ``model`` at its best: of few bits, of two tries."""
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=bits), self.train, forward=_outputs)
        if bits > FEWEST:
            return self.fit(qmodel, epochs, RATE, model)
        again = copy.deepcopy(qmodel)
        tries = (
            self.fit(qmodel, epochs, RATE, model, few=True),
            self.fit(again, RETRY * epochs, RATE, model, few=True, dropout=False),
        )
        return min(tries, key=lambda result: result["val_loss"])

    def _train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, teacher: nn.Module | None,
        freezing: OscillationFreezing | None,
    ) -> None:  # fmt: skip
        """One pass over the training graphs."""
        for batch in map(self._batch, self.train):
            with torch.no_grad():
                soft = None if teacher is None else _outputs(teacher, batch)
            optimizer.zero_grad()
            self.loss(_outputs(model, batch), batch, soft).backward()
            optimizer.step()
            if freezing is not None:
                freezing.step()
            qgnn.differential_multiplier_step(model)


def run_cell(name: str, run: int, root: str) -> dict[str, Any]:
    """Every column of one data set and fold or seed."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    task = TASKS[name]
    graphs = task.load(root)
    setting = Run(task, task.split(graphs, run), run)
    edges = 0 if graphs[0].edge_attr is None else graphs[0].edge_attr.size(1)
    classes = 1 if task.regression else 1 + max(int(graph.y) for graph in graphs)
    torch.manual_seed(run)
    model = task.model(graphs[0].num_features, edges, classes)
    results = {"FP32": setting.fit(model, task.float_epochs, FLOAT_RATE)}
    for column in COLUMNS[1:]:
        torch.manual_seed(run)
        results[column] = setting.fit_quantized(model, int(column.removeprefix("INT")), task.epochs)
    return {"task": name, "run": run, "results": results}


def settings(name: str) -> dict[str, Any]:
    """What a run depends on: a finished one of other settings is run again."""
    plain = {field.name: getattr(TASKS[name], field.name) for field in dataclasses.fields(Task)}
    plain = {key: value for key, value in plain.items() if not isinstance(value, Callable)}  # type: ignore[arg-type]
    recipe = {"rates": [FLOAT_RATE, RATE], "start": "calibrate", "fewest": FEWEST, "retry": RETRY}
    return {**plain, **recipe, "config": qgnn.QuantConfig().to_dict()}


def _work(job: tuple[str, int, str, Path]) -> str:
    name, run, root, path = job
    start = time.perf_counter()
    cell = {**run_cell(name, run, root), "settings": settings(name)}
    write_atomically(path, json.dumps(cell))
    scores = "  ".join(f"{column} {r['test']:.3f}" for column, r in cell["results"].items())
    return f"{name} {run}: {scores}  ({time.perf_counter() - start:.0f} s)"


def markdown(cells: list[dict[str, Any]]) -> str:
    """The table, one row per data set, and which aims are met."""
    lines = [NOTES, "| data set | measure | runs | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 3) + "|"]
    verdicts = []
    for name, task in TASKS.items():
        group = [cell["results"] for cell in cells if cell["task"] == name]
        if not group:
            continue
        factor, digits = (1, 3) if task.regression else (100, 1)
        scores = {column: [factor * results[column]["test"] for results in group] for column in COLUMNS}
        means = {column: statistics.mean(values) for column, values in scores.items()}
        spread = {c: f" ± {statistics.stdev(v):.{digits}f}" if len(v) > 1 else "" for c, v in scores.items()}
        text = " | ".join(f"{means[column]:.{digits}f}{spread[column]}" for column in COLUMNS)
        lines.append(f"| {name} | {'RMSE' if task.regression else 'accuracy'} | {len(group)} of {task.runs} | {text} |")
        if name in AIMS:
            column, most = AIMS[name]
            lost = means["FP32"] - means[column]
            lost, unit = (-100 * lost / means["FP32"], "%") if task.regression else (lost, "points")
            verdict = "met" if lost <= most else "missed"
            verdicts.append(f"- {name}, {column}: loses {lost:.1f} {unit} (aim: at most {most:g}), {verdict}")
    return "\n".join([*lines, "", *verdicts]) + "\n"


def _load(out: Path) -> list[dict[str, Any]]:
    """Finished runs of today's settings: one file each, or of an earlier ``graphs.json``."""
    cells = [json.loads(path.read_text()) for path in sorted((out / "graphs-runs").glob("*.json"))]
    earlier = out / "graphs.json"
    if earlier.exists():
        cells += json.loads(earlier.read_text())["runs"]
    found = {(c["task"], c["run"]): c for c in reversed(cells) if c["settings"] == settings(c["task"])}
    return [found[key] for key in sorted(found, key=lambda key: (list(TASKS).index(key[0]), key[1]))]


def report(out: Path) -> str:
    """Collect the finished runs under ``out`` into ``graphs.json`` and ``graphs.md``."""
    cells = _load(out)
    table = markdown(cells)
    text = {"environment": environment(threads=1), "runs": cells}
    write_atomically(out / "graphs.json", compact_json(text) + "\n")
    write_atomically(out / "graphs.md", f"# Graph-level tasks\n\n{table}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--runs", type=int, help="folds or seeds, the first ones; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", action="store_true", help="only rewrite the table from finished runs")
    args = parser.parse_args()
    folder = args.out / "graphs-runs"
    folder.mkdir(parents=True, exist_ok=True)
    if not args.report:
        done = {(cell["task"], cell["run"]) for cell in _load(args.out)}
        jobs = [
            (name, run, args.root, folder / f"{name}--{run}.json")
            for name in args.tasks
            for run in range(min(args.runs or TASKS[name].runs, TASKS[name].runs))
            if (name, run) not in done
        ]
        run_jobs(_work, jobs, args.jobs)
    print(report(args.out))


if __name__ == "__main__":
    main()
