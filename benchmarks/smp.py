"""What smoothness-aware propagation does: ``make bench-smp``, resumable.

Four questions: whether the constraint is met, whether deep stacks train, at which depths and widths the constraint
helps, and what it costs.  Finished runs are kept one file each: an interrupted report goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from qgnn_plugin import QuantConfig

from .environment import compact_json, environment, write_atomically
from .smp_report import markdown, plot
from .smp_runs import run_cell
from .smp_settings import FLOAT_PARTS, PARTS, Settings, cells

Task = tuple[tuple[Any, ...], Settings, str, Path]


def _work(task: Task) -> str:
    cell, settings, root, path = task
    name = " ".join(map(str, cell))
    if path.exists():  # another process has done it meanwhile
        return f"{name}: done elsewhere"
    result = run_cell(cell, settings, root)
    write_atomically(path, json.dumps(result))
    scores = [f"{k} {100 * r['test']:.1f}" for k, r in result["results"].items() if "test" in r]
    return f"{name}: {'  '.join(scores)}  ({result['seconds']:.0f} s)"


def _run(tasks: list[Task], jobs: int) -> Iterator[str]:
    if jobs == 1:
        yield from map(_work, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_work, tasks)


def _file_name(cell: Iterable[Any]) -> str:
    return "--".join(str(value).replace("/", "-") for value in cell) + ".json"


def _settings(settings: Settings) -> dict[str, Any]:
    """What every run depends on: all but which and how many of them there are."""
    fields = dataclasses.asdict(settings)
    which = ("seeds", "steps", "datasets", "plain_steps", "plain_datasets")
    return {k: v for k, v in json.loads(json.dumps(fields)).items() if k not in which}


def unpack_report(out: Path, settings: Settings) -> None:
    """Put the runs of an earlier ``smp.json`` back as files, if made with the same settings and configuration.

    Settings that it does not name are of parts that came later.
    """
    path = out / "smp.json"
    if not path.exists():
        return
    earlier = json.loads(path.read_text())
    today = _settings(settings)
    if any(today.get(name) != value for name, value in earlier["settings"].items()):
        return
    same_config = earlier.get("config") == QuantConfig().to_dict()
    for cell in earlier["runs"]:
        if not same_config and cell["part"] not in FLOAT_PARTS:
            continue
        target = out / "smp-runs" / _file_name((cell["part"], *cell["what"], cell["seed"]))
        if not target.exists():
            write_atomically(target, json.dumps(cell))


def report(out: Path, settings: Settings) -> str:
    """Collect the finished runs under ``out`` into ``smp.json``, ``smp.md`` and plots."""
    runs = [json.loads(path.read_text()) for path in sorted((out / "smp-runs").glob("*.json"))]
    runs.sort(key=lambda cell: (PARTS.index(cell["part"]), list(map(str, cell["what"])), cell["seed"]))
    text = {"environment": environment(threads=1), "settings": _settings(settings), "config": QuantConfig().to_dict()}
    text["runs"] = runs
    table = markdown(runs)
    write_atomically(out / "smp.json", compact_json(text) + "\n")
    write_atomically(out / "smp.md", f"# Smoothness-aware propagation\n\n{table}")
    plot(runs, out)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, help="default 10")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", action="store_true", help="only rewrite the report from finished runs")
    parser.add_argument("--tiny", action="store_true", help="seconds, on a made-up graph, to see that everything runs")
    args = parser.parse_args(arguments)
    settings = Settings.tiny() if args.tiny else Settings()
    if args.seeds is not None:
        settings = dataclasses.replace(settings, seeds=args.seeds)
    runs = args.out / "smp-runs"
    runs.mkdir(parents=True, exist_ok=True)
    unpack_report(args.out, settings)
    if not args.report:
        found = [(cell, settings, args.root, runs / _file_name(cell)) for cell in cells(settings, tuple(args.parts))]
        tasks = [task for task in found if not task[-1].exists()]
        for count, line in enumerate(_run(tasks, args.jobs), 1):
            print(f"[{count}/{len(tasks)}] {line}", flush=True)
    print(report(args.out, settings))


if __name__ == "__main__":
    main()
