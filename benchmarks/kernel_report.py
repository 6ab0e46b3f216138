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

from benchmarks.environment import environment, write_atomically

RESULTS = Path(__file__).parent / "results"
TARGETS = ("sm_80", "sm_90", "gfx942")

# Published figures: processors, 32-bit lanes per processor and clock, clock in GHz, memory
# bandwidth in TB/s, registers per processor, most threads per processor, shared bytes.
CARDS: dict[str, dict[str, float]] = {
    "sm_80": {"sms": 108, "lanes": 64, "ghz": 1.41, "tbs": 2.04, "registers": 65536,
              "threads": 2048, "shared": 163840},
    "sm_90": {"sms": 132, "lanes": 64, "ghz": 1.76, "tbs": 3.35, "registers": 65536,
              "threads": 2048, "shared": 232448},
}  # fmt: skip
NODES, EDGES = 170_000, 2_000_000
WARP = 32


def compiled(arguments: list[str]) -> list[dict[str, Any]]:
    """Compile in a process of its own, with the interpreter off."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "aot.json"
        command = [sys.executable, "-m", "qgnn_plugin.kernels.triton.aot", "--json", str(file)]
        subprocess.run([*command, *arguments], check=True, env=variables)
        return json.loads(file.read_text())


def occupancy(row: dict[str, Any]) -> float | None:
    """Predicted share of a processor's threads that registers and shared memory admit."""
    card = CARDS.get(row["target"])
    if card is None:
        return None
    threads = row["num_warps"] * WARP
    registers = -(-row["registers"] // 8) * 8 * threads
    programs = min(card["threads"] // threads, card["registers"] // max(1, registers))
    if row["shared_bytes"]:
        programs = min(programs, card["shared"] // (row["shared_bytes"] + 1024))
    return programs * threads / card["threads"]


def predict(row: dict[str, Any]) -> dict[str, float]:
    """Bytes per edge against the least, and milliseconds on the reference graph.

    The memory time counts every gathered row as a trip to memory; the cache makes it shorter.
    """
    card = CARDS.get(row["target"])
    if card is None or not row["codes_per_iteration"] or "row_bytes" not in row:
        return {}
    instructions = sum(row["loop"].values()) / row["codes_per_iteration"]
    issued = EDGES * row["features"] * instructions / (card["sms"] * card["lanes"] * card["ghz"] * 1e6)
    least = row["features"] * row["bits"] / 8 + 4
    sectors = -(-row["row_bytes"] // 32) * 32 + 4
    traffic = EDGES * sectors + NODES * (row["features"] * 4 + 24)
    memory = traffic / (card["tbs"] * 1e9)
    return {
        "instructions_per_code": instructions,
        "integer_per_code": row["integer_instructions"] / row["codes_per_iteration"],
        "bytes_per_edge": sectors,
        "least_bytes_per_edge": least,
        "issue_ms": issued,
        "memory_ms": memory,
        "predicted_ms": max(issued, memory),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Kernel report",
        "",
        "Read from ahead-of-time binaries by `make kernel-report`; no GPU took part, and the times "
        f"are predictions for {NODES:,} nodes and {EDGES:,} edges from published clocks and "
        "bandwidths: the larger of instructions issued and bytes moved (every gather counted as a "
        "trip to memory). Instructions per code are those of the inner loop, all of them and the "
        "integer, logic and predicate ones.",
        "",
        "| target | op | case | registers | spills | shared | occupancy | widest load in loop | "
        "per code | integer per code | bytes per edge (least) | issue ms | memory ms |",
        "|" + " --- |" * 13,
    ]
    for row in rows:
        figures = row["predicted"]
        occupied = f"{row['occupancy']:.0%}" if row["occupancy"] is not None else ""
        cells = [
            row["target"], row["op"], row["case"], row["registers"], row["spills"],
            row["shared_bytes"], occupied, max(row["loop_loads"], default=""),
        ]  # fmt: skip
        if figures:
            cells += [
                f"{figures['instructions_per_code']:.2f}", f"{figures['integer_per_code']:.2f}",
                f"{figures['bytes_per_edge']} ({figures['least_bytes_per_edge']:.0f})",
                f"{figures['issue_ms']:.3f}", f"{figures['memory_ms']:.3f}",
            ]  # fmt: skip
        else:
            cells += [""] * 5
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", choices=("small", "full"), default="small")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--case", default="", help="only cases whose op and label contain this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    arguments = ["--grid", options.grid, "--case", options.case]
    for target in options.target or TARGETS:
        arguments += ["--target", target]
    rows = compiled(arguments)
    for row in rows:
        row["occupancy"] = occupancy(row)
        row["predicted"] = predict(row)
    document = {"environment": environment(1), "grid": options.grid, "kernels": rows}
    write_atomically(options.results / "kernel-report.json", json.dumps(document, indent=1) + "\n")
    write_atomically(options.results / "kernel-report.md", markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
