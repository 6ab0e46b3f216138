"""Peak memory of inference beyond its inputs, every side in a process of its own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from statistics import median
from typing import Any

from .cpu_paths import EDGE_INDEX, FAST_PATH
from .cpu_probe import Job, probe
from .cpu_report import Target, table
from .stacks import STACKS

BITS = (2, 4, 8)
PROCESSES = 3
TARGETS = {2: 8.0, 4: 5.0}

NOTES = """\
The largest resident set during one call less the one before it: buffers of torch, numpy and our kernels and the result,
not the features, the weights and the converted graph.  Medians of three fresh processes for every side, as what the C
library keeps of freed memory differs from one to the next; memory that an earlier call left idle is given back first.
"""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "nodes": args.nodes,
        "edges": args.edges,
        "widths": args.widths,
        "threads": max(args.threads),
        "processes": PROCESSES,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in STACKS:
        sides: dict[str, dict[str, Any]] = {label: {"pyg": (label,)} for label in (EDGE_INDEX, FAST_PATH[name])}
        sides |= {f"INT{bits}": {"bits": (bits,)} for bits in BITS}
        samples = {
            side: [
                probe(Job(name, args.nodes, args.edges, args.widths, max(args.threads), **options))[side]["bytes"]
                for _ in range(PROCESSES)
            ]
            for side, options in sides.items()
        }
        found = {side: median(sizes) for side, sizes in samples.items()}
        rows += [
            {
                "model": name,
                "side": side,
                "MB": size / 1e6,
                "least": min(samples[side]) / 1e6,
                "most": max(samples[side]) / 1e6,
                "PyG's over this": found[FAST_PATH[name]] / max(1, size),
                "PyG edge_index's over this": found[EDGE_INDEX] / max(1, size),
            }
            for side, size in found.items()
        ]
    return {"rows": rows}


def markdown(section: Mapping[str, Any]) -> list[str]:
    used, rows = section["settings"], section["data"]["rows"]
    title = f"## Peak memory, {used['nodes']:,} nodes, {used['edges']:,} edges, threads: {used['threads']}"
    return [title, "", NOTES, *table(list(rows[0]), rows)]


def targets(data: Mapping[str, Any]) -> list[Target]:
    return [
        Target(f"peak memory, {row['model']}, PyG's over {row['side']}'s", TARGETS[bits], {"": row["PyG's over this"]})
        for row in data["rows"]
        for bits in TARGETS
        if row["side"] == f"INT{bits}"
    ]
