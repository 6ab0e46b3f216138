"""How time and memory of a GCN grow with the graph, at a fixed mean degree."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .cpu_paths import FAST_PATH
from .cpu_probe import Job, probe
from .cpu_report import Target, table

MODEL = "GCN"
DEGREE = 12
BITS = (2, 4)

NOTES = f"""\
{MODEL} inference on generated power-law graphs of mean degree {DEGREE}, a process for every size.  `slope` is that of a
straight line through the logarithms, from 100,000 nodes on where there are enough sizes: 1 is linear.
"""
SLOPE_FROM = 100_000
LINEAR = 1.1  # the largest slope that still passes for linear


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"sizes": args.growth_sizes, "widths": args.widths, "threads": max(args.threads), "rounds": args.rounds}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of ``log y`` over ``log x``."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for nodes in args.growth_sizes:
        label = FAST_PATH[MODEL]
        options = {"pyg": (label,), "bits": BITS, "rounds": args.rounds, "slow_rounds": 1}
        found = probe(Job(MODEL, nodes, DEGREE * nodes, args.widths, max(args.threads), **options))
        for side, figures in found.items():
            rows.append({"nodes": nodes, "side": side, "ms": figures["ms"], "MB": figures["bytes"] / 1e6})
    return {"rows": rows, "slopes": _slopes(rows)}


def _slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    slopes = []
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side and row["MB"] > 0]
        large = [row for row in own if row["nodes"] >= SLOPE_FROM]
        own = large if len(large) >= 2 else own
        if len(own) >= 2:
            sizes = [row["nodes"] for row in own]
            figures = {key: slope(sizes, [row[key] for row in own]) for key in ("ms", "MB")}
            slopes.append({"side": side, "slope of time": figures["ms"], "slope of memory": figures["MB"]})
    return slopes


def markdown(section: Mapping[str, Any]) -> list[str]:
    data, threads = section["data"], section["settings"]["threads"]
    wide: dict[int, dict[str, Any]] = {}
    for row in data["rows"]:
        figures = wide.setdefault(row["nodes"], {"nodes": f"{row['nodes']:,}"})
        figures |= {f"{row['side']} ms": row["ms"], f"{row['side']} MB": row["MB"]}
    columns = list(dict.fromkeys(key for row in wide.values() for key in row))
    lines = [f"## Growth, threads: {threads}", "", NOTES, *table(columns, wide.values())]
    return lines + (table(list(data["slopes"][0]), data["slopes"]) if data["slopes"] else [])


def targets(data: Mapping[str, Any]) -> list[Target]:
    return [
        Target(f"growth, {row['side']}, {kind} over nodes (logarithms)", LINEAR, {"": row[kind]}, at_most=True)
        for row in data["slopes"]
        for kind in ("slope of time", "slope of memory")
        if row["side"].startswith("INT")
    ]
