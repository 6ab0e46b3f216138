"""Correctness, then timings, of the Triton backend on a GPU: ``make bench-gpu``.

``--dry-run`` exercises everything on tiny graphs under Triton's interpreter; its times mean nothing
and nothing is written unless ``--results`` says where.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GRAPHS = {"power-law 170k/2M": (170_000, 2_000_000), "power-law 2M/100M": (2_000_000, 100_000_000)}
TINY = {"power-law tiny": (24, 60), "power-law tiny, dense": (12, 90)}
FEATURES = (64, 128, 256, 512)

# Seconds after the start, correctness included, at which each section gives way to the next; what it did not reach is
# named.
DEADLINES = {"aggregate": 240, "inference": 320, "training": 350, "large graphs": 440}


class Clock:
    """Hands out the rows of a section until its deadline."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.skipped: list[str] = []
        self.seconds: dict[str, float] = {}

    def within(self, section: str, rows: Iterable[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
        for row in rows:
            yield row
            self.seconds[section] = time.perf_counter() - self.started
            if self.seconds[section] > DEADLINES[section]:
                self.skipped.append(f"{section}: {what} after {row.get('name', row.get('check'))!r}")
                return


def _graphs(sizes: dict[str, tuple[int, int]], device: Any) -> Iterator[tuple[str, Any]]:
    from qgnn_plugin.kernels.triton.autotune import power_law_plan

    for name, size in sizes.items():
        yield name, power_law_plan(*size, device)


def _files(files: list[str], device: Any) -> Iterator[tuple[str, Any]]:
    """Graphs ``NAME=FILE.npz`` with arrays ``rowptr`` and ``col``."""
    import numpy as np
    import torch

    from qgnn_plugin.kernels.plan import GraphPlan

    for file in files:
        name, path = file.split("=", 1)
        arrays = np.load(path)
        rowptr = torch.from_numpy(arrays["rowptr"].astype(np.int64))
        col = torch.from_numpy(arrays["col"].astype(np.int32))
        yield name, GraphPlan(rowptr.to(device), col.to(device), rowptr.numel() - 1)


def _table(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column, "")
            cells.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        lines.append("| " + " | ".join(cell.replace("|", "/")[:120] for cell in cells) + " |")
    return [*lines, ""]


def markdown(document: dict[str, Any]) -> str:
    failed = [row for row in document["checks"] if row["error"]]
    lines = [
        f"# GPU benchmark: {document['device']}",
        "",
        f"{len(document['checks'])} checks of ops and models against the references, {len(failed)} failed. Copy "
        f"bandwidth {document['copy_bandwidth'] / 1e9:.0f} GB/s. Medians; `vs` is the time of cuSPARSE fp32 (models: "
        "of PyG's best fp32 path) over this one; `of_copy` the share of the copy bandwidth at which the bytes moved "
        "that must move once.",
        "",
    ]
    if document["skipped"]:
        lines += ["Out of time: " + "; ".join(document["skipped"]) + ".", ""]
    graph = ("graph", "features", "name", "ms", "vs", "of_copy", "peak_bytes", "error")
    model = ("model", "name", "ms", "vs", "peak_bytes", "error")
    lines += _table("aggregate", document["aggregate"], graph)
    lines += _table("Inference", document["inference"], model)
    lines += _table("Training step", document["training"], model)
    return "\n".join(lines)


def _ratios(rows: list[dict[str, Any]], keys: tuple[str, ...], baselines: tuple[str, ...]) -> None:
    """Add ``vs``, the fastest baseline's time over each row's, among rows that agree on ``keys``."""
    base: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["name"] in baselines and "ms" in row:
            group = tuple(row[k] for k in keys)
            base[group] = min(row["ms"], base.get(group, row["ms"]))
    for row in rows:
        reference = base.get(tuple(row[k] for k in keys))
        if reference and "ms" in row:
            row["vs"] = reference / row["ms"]


def measure(dry_run: bool, device: Any, backend: str, files: list[str], clock: Clock) -> dict[str, Any]:
    """All timings, section by section, each until its deadline."""
    from benchmarks.gpu_models import inference_rows, training_rows
    from benchmarks.gpu_timing import aggregate_rows, copy_bandwidth
    from benchmarks.stacks import WIDTHS
    from qgnn_plugin.kernels.backend import use_backend

    repeats = 1 if dry_run else 20
    widths = (8, 8, 8, 4) if dry_run else WIDTHS
    features = (8,) if dry_run else FEATURES
    document: dict[str, Any] = {"aggregate": [], "inference": [], "training": []}
    document["copy_bandwidth"] = copy_bandwidth(device, 1 << (16 if dry_run else 30))

    def aggregate(section: str, name: str, plan: Any) -> None:
        for width in features:
            rows = aggregate_rows(plan, name, width, repeats)
            for row in clock.within(section, rows, f"{name}, {width} features"):
                document["aggregate"].append(row)
                print(json.dumps(row), flush=True)

    with use_backend(backend):
        graphs = _graphs(TINY if dry_run else GRAPHS, device)
        name, plan = next(graphs)
        aggregate("aggregate", name, plan)
        for graph in _files(files, device):
            aggregate("aggregate", *graph)
        for section, rows in (("inference", inference_rows), ("training", training_rows)):
            for row in clock.within(section, rows(plan, widths, repeats), name):
                document[section].append(row)
                print(json.dumps(row), flush=True)
        for graph in graphs:
            aggregate("large graphs", *graph)
    _ratios(document["aggregate"], ("graph", "features"), ("cuSPARSE fp32",))
    fastest = ("PyG edge_index fp32", "PyG CSR fp32")
    _ratios(document["inference"], ("model",), (*fastest, *(f"{name}, CUDA graph" for name in fastest)))
    _ratios(document["training"], ("model",), ("fp32 training step",))
    for row in document["aggregate"]:
        if "bytes_once" in row and "ms" in row:
            seconds = 1e-3 * row["ms"]
            row["of_copy"] = row["bytes_once"] / seconds / document["copy_bandwidth"]
    return document


def _checks(dry_run: bool, device: Any, backend: str, clock: Clock) -> list[dict[str, Any]]:
    """Every op, then every model, with fresh random inputs."""
    from benchmarks.gpu_checks import model_checks, run_checks
    from benchmarks.stacks import WIDTHS
    from qgnn_plugin.kernels.triton.autotune import power_law_plan

    sizes = [(24, 60, 8, 2)] if dry_run else [(5000, 80_000, 256, 4), (3000, 40_000, 40, 4)]
    rows = []
    for nodes, edges, features, heads in sizes:
        rows += run_checks(power_law_plan(nodes, edges, device), features, heads, backend)
    plan = power_law_plan(*sizes[-1][:2], device)
    rows += model_checks(plan, (8, 8, 8, 4) if dry_run else WIDTHS, backend)
    clock.seconds["checks"] = time.perf_counter() - clock.started
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--results", type=Path, help="folder of the JSON and Markdown files")
    parser.add_argument(
        "--csr", action="append", default=[], metavar="NAME=FILE.npz",
        help="also time this graph, arrays 'rowptr' and 'col' (ego-Twitter, COLLAB)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    import torch

    from benchmarks.environment import environment, write_atomically

    if not options.dry_run and not torch.cuda.is_available():
        print("Expected a GPU (got none); '--dry-run' works without one", file=sys.stderr)
        return 1
    device = torch.device("cpu" if options.dry_run else "cuda")
    backend = "interpret" if options.dry_run else "triton"
    torch.manual_seed(int(time.time()))
    clock = Clock()
    checks = _checks(options.dry_run, device, backend, clock)
    if any(row["error"] for row in checks):
        print("Expected every op and model to match its reference; no timings are taken", file=sys.stderr)
        return 1
    name = "dry run" if options.dry_run else torch.cuda.get_device_name(device)
    document = {
        "device": name, "environment": environment(torch.get_num_threads()), "checks": checks,
        **measure(options.dry_run, device, backend, options.csr, clock), "skipped": clock.skipped,
        "seconds": clock.seconds,
    }  # fmt: skip
    results = options.results or (None if options.dry_run else RESULTS)
    if results is not None:
        stem = "gpu-" + "".join(c if c.isalnum() else "-" for c in name.lower())
        write_atomically(results / f"{stem}.json", json.dumps(document, indent=1) + "\n")
        write_atomically(results / f"{stem}.md", markdown(document))
    print(markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
