"""What the compiled Triton kernels look like, on any machine: ``make kernel-report``.

Compiles every kernel ahead of time, reads the binaries and writes
``benchmarks/results/kernel-report.{json,md}``: registers, spills, shared memory, load widths, the
instruction mix of the inner loop, occupancy and the time that bytes and instructions predict.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import compact_json, environment, write_atomically
from benchmarks.kernel_predictions import CARDS, CUBLAS, CUSPARSE, EFFICIENCY, GAP_MS, issue_ms, linear_ms, memory_ms

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]  # where the tools are
TARGETS = ("sm_80", "sm_90", "gfx942")

NODES, EDGES = 170_000, 2_000_000
REGISTER_GRANULE = 8
SCHEDULE_BYTES = 24  # that a program reads per row
RESERVED_SHARED = 1024  # bytes per program that the driver keeps


def compiled(arguments: list[str]) -> list[dict[str, Any]]:
    """Compile in a process of its own, with the interpreter off."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "aot.json"
        command = [sys.executable, "-m", "tools.aot", "--json", str(file)]
        subprocess.run([*command, *arguments], check=True, env=variables, cwd=ROOT)
        return json.loads(file.read_text())


def occupancy(row: dict[str, Any]) -> float:
    """Predicted share of a processor's threads that registers and shared memory admit."""
    card = CARDS[row["target"]]
    threads = row["num_warps"] * int(card["warp"])
    registers = -(-max(1, row["registers"]) // REGISTER_GRANULE) * REGISTER_GRANULE * threads
    programs = min(card["threads"] // threads, card["registers"] // registers)
    if row["shared_bytes"]:
        programs = min(programs, card["shared"] // (row["shared_bytes"] + RESERVED_SHARED))
    return programs * threads / card["threads"]


def predict(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds on the reference graph, from bytes and instructions; of edges: bytes against the least.

    The memory time of a gather counts every row as a trip to memory; the cache makes it shorter.
    """
    if row["codes_per_iteration"] and "row_bytes" in row:
        return _predict_gather(row, CARDS[row["target"]])
    if row["op"] == "linear":
        return linear_ms(row, NODES)
    if "row_traffic" in row:
        memory = memory_ms(NODES * row["row_traffic"], row["target"])
        return {"memory_ms": memory, "predicted_ms": memory}
    return {}


def _predict_gather(row: dict[str, Any], card: dict[str, float]) -> dict[str, float]:
    instructions = sum(row["loop"].values()) / row["codes_per_iteration"]
    outside = row["outside"] / (row["codes_per_iteration"] / row["unroll"])
    work = row["features"] * (EDGES * instructions + NODES * outside)
    issued = issue_ms(work / card["warp"], row["target"])
    least = row["features"] * row["bits"] / 8 + 4
    sectors = -(-row["row_bytes"] // 32) * 32 + 4
    traffic = EDGES * sectors + NODES * (row.get("out_bytes", row["features"] * 4) + SCHEDULE_BYTES)
    memory = traffic / (card["tbs"] * 1e9)
    return {
        "instructions_per_code": instructions,
        "outside_per_code": outside,
        "integer_per_code": row["integer_instructions"] / row["codes_per_iteration"],
        "bytes_per_edge": sectors,
        "least_bytes_per_edge": least,
        "slots_ms": issued * EFFICIENCY,
        "issue_ms": issued,
        "memory_ms": memory,
        "predicted_ms": max(issued, memory),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Kernel report",
        "",
        "Read from ahead-of-time binaries by `make kernel-report`; no GPU took part. Times are predictions for "
        f"{NODES:,} nodes and {EDGES:,} edges from published clocks and bandwidths (A100, H100 SXM, MI300X): the "
        "larger of instructions issued and bytes moved, every gather counted as a trip to memory and every instruction "
        "outside the inner loop as executed once per row (`outside`, per code of a row). `slots ms` are all issue "
        f"slots filled, `issue ms` {EFFICIENCY:.0%} of them. `linear` has 256 outputs; its whole way is counted, the "
        "loop over blocks of rows with unpacking, products, arithmetic and packing in it, and its slowest pipe and the "
        "L2 cache as well; of rows too long to keep the weights there is no prediction. Instructions per code are "
        "those of the inner loop; `integer` are integer, logic, move and predicate ones, of AMD's the vector ones. "
        "Kernels without a prediction are second stages of hubs and passes over logits.",
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        lines += ["", f"## {target}", "", *_table([row for row in rows if row["target"] == target])]
    return "\n".join(lines) + "\n"


HEADER = (
    "op", "case", "registers", "spills", "local", "shared", "occupancy", "widest load", "in loop", "per code",
    "integer", "outside", "per row", "bytes per edge (least)", "slots ms", "issue ms", "pipe ms", "L2 ms", "memory ms",
    "predicted ms",
)  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for row in rows:
        figures = row["predicted"]

        def number(name: str, form: str, figures: dict[str, float] = figures) -> str:
            return format(figures[name], form) if name in figures else ""

        edge = f"{number('bytes_per_edge', '.0f')} ({number('least_bytes_per_edge', '.0f')})"
        cells = [
            row["op"], row["case"], row["registers"], row["spills"], row["local_bytes"], row["shared_bytes"],
            f"{row['occupancy']:.0%}", row["widest_load"], max(row["loop_loads"], default=""),
            number("instructions_per_code", ".2f"), number("integer_per_code", ".2f"),
            number("outside_per_code", ".1f"), number("instructions_per_row", ".0f"),
            edge if "bytes_per_edge" in figures else "",
            *(number(f"{name}_ms", ".3f") for name in ("slots", "issue", "pipe", "l2", "memory", "predicted")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def predicted_models(models: list[str]) -> list[dict[str, Any]]:
    """Whole models at 2 and 4 bits on a Hopper card, in a process of its own."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "models.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_predictions", "--json", str(file)]
        command += [argument for model in models for argument in ("--model", model)]
        subprocess.run([*command, "--bits", "2", "--bits", "4"], check=True, env=variables)
        return json.loads(file.read_text())


def models_markdown(rows: list[dict[str, Any]]) -> str:
    """Predictions of models: theirs and ours, and where ours go."""
    if not rows:
        return ""
    lines = [
        "", f"## Models on {rows[0]['target']}", "",
        f"Predicted, not measured: a forward pass of the three-layer models (128-256-256-40) at {NODES:,} nodes and "
        f"{EDGES:,} edges, launch by launch as a rehearsal makes them, every program's whole way and a gap of "
        f"{1e3 * GAP_MS:.0f} us after each; torch's own small operations are left out. PyG in fp32 by the same rates: "
        f"cuSPARSE at {CUSPARSE:.0%} of the memory's bandwidth, cuBLAS at {CUBLAS:.0%} of the fp32 rate.", "",
        "| model | bits | launches | ours, ms | PyG fp32, ms | times as fast | linear | aggregation | rest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        shares = {"linear": 0.0, "aggregation": 0.0, "rest": 0.0}
        for step in row["launches"]:
            gather = any(word in step["kernel"] for word in ("aggregate", "attention", "hub", "peak", "float_sum"))
            part = "linear" if step["kernel"] == "linear_kernel" else "aggregation" if gather else "rest"
            shares[part] += step["predicted_ms"]
        cells = [
            row["model"], row["bits"], len(row["launches"]), f"{row['predicted_ms']:.3f}", f"{row['float_ms']:.2f}",
            f"{row['times_as_fast']:.1f}", *(f"{value:.3f}" for value in shares.values()),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", choices=("small", "full"), default="small")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--case", action="append", help="only cases that match this shell pattern (see the aot module)")
    parser.add_argument("--model", action="append", help="a model to predict (default: all three)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    arguments = ["--grid", options.grid]
    for pattern in options.case or ():
        arguments += ["--case", pattern]
    for target in options.target or TARGETS:
        arguments += ["--target", target]
    rows = compiled(arguments)
    for row in rows:
        row["occupancy"] = occupancy(row)
        row["predicted"] = predict(row)
    models = predicted_models(options.model or ["GCN", "GraphSAGE", "GAT"])
    document = {"environment": environment(1), "grid": options.grid, "kernels": rows, "models": models}
    write_atomically(options.results / "kernel-report.json", compact_json(document) + "\n")
    write_atomically(options.results / "kernel-report.md", markdown(rows) + models_markdown(models))
    return 0


if __name__ == "__main__":
    sys.exit(main())
