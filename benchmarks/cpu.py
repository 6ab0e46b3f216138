"""CPU benchmark, ``make bench-cpu``: every side interleaved in one run, medians of ratios.

Real graphs are read from files: ``--csr ego-Twitter=PATH.npz`` with arrays ``rowptr`` and ``col``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .cpu_graphs import graphs
from .cpu_kernels import aggregate_rows
from .environment import environment, write_atomically
from .timing import copy_bandwidth

RESULTS = Path(__file__).parent / "results"
FEATURES = 256
COLUMNS = (
    "graph", "threads", "side", "ms", "over torch.sparse", "over own float32", "GB/s",
    "processor ms",
)  # fmt: skip

NOTES = """\
Medians over interleaved rounds; a ratio is the median of the rounds' own ratios.  `torch.sparse` is
the faster of its CSR products with int64 and int32 indices, `own float32` the fastest of our vector
kernels with prefetching and streaming stores.  `GB/s` are bytes that must move over the time taken:
rows that stay in a cache are counted as often as they are read, so it can pass the copy bandwidth.
"""


def markdown(document: dict[str, Any]) -> str:
    machine = document["environment"]
    lines = [
        "# CPU benchmark",
        "",
        f"{machine['processor']}, {machine['cores']} cores.  Copy bandwidth "
        + ", ".join(f"{v / 1e9:.1f} GB/s on {k} threads" for k, v in document["copy"].items())
        + ".",
        "",
        NOTES,
        f"## `aggregate`, {FEATURES} features",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in document["aggregate"]:
        cells = (row[name] for name in COLUMNS)
        text = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(text) + " |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.cpu")
    parser.add_argument("--csr", action="append", default=[], metavar="NAME=FILE.npz")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    document: dict[str, Any] = {"environment": environment(max(args.threads)), "copy": {}}
    document["aggregate"] = []
    for count in args.threads:
        torch.set_num_threads(count)
        document["copy"][str(count)] = copy_bandwidth()
    for name, plan in graphs(args.csr):
        for count in args.threads:
            torch.set_num_threads(count)
            rows = aggregate_rows(name, plan, FEATURES, args.rounds, count)
            document["aggregate"] += rows
            for row in rows:
                print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()})
            write_atomically(args.results / "cpu.json", json.dumps(document, indent=1) + "\n")
            write_atomically(args.results / "cpu.md", markdown(document))


if __name__ == "__main__":
    main()
