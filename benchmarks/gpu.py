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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUDGET_SECONDS = 7.5 * 60
GRAPHS = {"power-law 170k/2M": (170_000, 2_000_000), "power-law 2M/100M": (2_000_000, 100_000_000)}
FEATURES = (64, 128, 256, 512)


def _graphs(dry_run: bool, device: Any, files: list[str]) -> Iterator[tuple[str, Any]]:
    import numpy as np
    import torch

    from qgnn_plugin.kernels.plan import GraphPlan
    from qgnn_plugin.kernels.triton.autotune import power_law_plan

    if dry_run:
        yield "power-law tiny", power_law_plan(24, 60, device)
    else:
        for name, sizes in GRAPHS.items():
            yield name, power_law_plan(*sizes, device)
    for file in files:
        name, path = file.split("=", 1)
        edges = torch.from_numpy(np.load(path)).long().to(device)
        nodes = int(edges.max()) + 1
        yield name, GraphPlan.from_edges(edges[0], edges[1], nodes, nodes)


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
        f"{len(document['checks'])} checks against the references, {len(failed)} failed. Copy "
        f"bandwidth {document['copy_bandwidth'] / 1e9:.0f} GB/s. Medians; `vs` is the time of "
        "cuSPARSE fp32 (or PyG edge_index fp32) over this one.",
        "",
    ]
    graph = ("graph", "features", "name", "ms", "vs", "of_copy", "peak_bytes", "error")
    model = ("model", "name", "ms", "vs", "peak_bytes", "error")
    lines += _table("aggregate", document["aggregate"], graph)
    lines += _table("Inference", document["inference"], model)
    lines += _table("Training step", document["training"], model)
    return "\n".join(lines)


def _ratios(rows: list[dict[str, Any]], keys: tuple[str, ...], baseline: str) -> None:
    """Add ``vs``, the baseline's time over each row's, among rows that agree on ``keys``."""
    base = {tuple(row[k] for k in keys): row["ms"] for row in rows if row["name"] == baseline and "ms" in row}
    for row in rows:
        reference = base.get(tuple(row[k] for k in keys))
        if reference and "ms" in row:
            row["vs"] = reference / row["ms"]


def measure(dry_run: bool, device: Any, backend: str, files: list[str]) -> dict[str, Any]:
    """All timings; sections past the time budget are named in ``skipped``."""
    from benchmarks.gpu_models import WIDTHS, inference_rows, training_rows
    from benchmarks.gpu_timing import aggregate_rows, copy_bandwidth
    from qgnn_plugin.kernels.backend import use_backend

    started = time.perf_counter()
    repeats = 1 if dry_run else 20
    widths = (8, 8, 8, 4) if dry_run else WIDTHS
    document: dict[str, Any] = {"aggregate": [], "inference": [], "training": [], "skipped": []}
    document["copy_bandwidth"] = copy_bandwidth(device, 1 << (16 if dry_run else 30))
    with use_backend(backend):
        for index, (name, plan) in enumerate(_graphs(dry_run, device, files)):
            for features in (8,) if dry_run else FEATURES:
                if time.perf_counter() - started > BUDGET_SECONDS:
                    document["skipped"].append(f"{name}, {features} features")
                    continue
                rows = list(aggregate_rows(plan, name, features, repeats))
                document["aggregate"] += rows
                for row in rows:
                    print(json.dumps(row), flush=True)
            if index == 0:
                document["inference"] = list(inference_rows(plan, widths, repeats))
                document["training"] = list(training_rows(plan, widths, repeats))
    _ratios(document["aggregate"], ("graph", "features"), "cuSPARSE fp32")
    _ratios(document["inference"], ("model",), "PyG edge_index fp32")
    _ratios(document["training"], ("model",), "fp32 training step")
    for row in document["aggregate"]:
        if "bytes_once" in row and "ms" in row:
            seconds = 1e-3 * row["ms"]
            row["of_copy"] = row["bytes_once"] / seconds / document["copy_bandwidth"]
    return document


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--results", type=Path, help="folder of the JSON and Markdown files")
    parser.add_argument(
        "--graph", action="append", default=[], metavar="NAME=FILE.npy",
        help="also time this graph, an edge list [2, E] (ego-Twitter, COLLAB)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    import torch

    from benchmarks.environment import environment, write_atomically
    from benchmarks.gpu_checks import run_checks
    from qgnn_plugin.kernels.triton.autotune import power_law_plan

    if not options.dry_run and not torch.cuda.is_available():
        print("Expected a GPU (got none); '--dry-run' works without one", file=sys.stderr)
        return 1
    device = torch.device("cpu" if options.dry_run else "cuda")
    backend = "interpret" if options.dry_run else "triton"
    torch.manual_seed(int(time.time()))
    sizes = [(24, 60, 8, 2)] if options.dry_run else [(5000, 80_000, 256, 4), (3000, 40_000, 40, 4)]
    checks = []
    for nodes, edges, features, heads in sizes:
        checks += run_checks(power_law_plan(nodes, edges, device), features, heads, backend)
    if any(row["error"] for row in checks):
        print("Expected every op to match its reference; no timings are taken", file=sys.stderr)
        return 1
    name = "dry run" if options.dry_run else torch.cuda.get_device_name(device)
    document = {
        "device": name, "environment": environment(torch.get_num_threads()), "checks": checks,
        **measure(options.dry_run, device, backend, options.graph),
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
