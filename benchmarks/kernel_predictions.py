"""Times from binaries, published rates and counted bytes: what a card would take, of one kernel and of whole models.

Of a kernel, the longest of four: issue slots, the slowest pipe, what crosses the L2 cache and what crosses memory.
Nothing here was measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.environment import compact_json

__all__ = ["CARDS", "EFFICIENCY", "float_model_ms", "issue_ms", "launch_ms", "linear_ms", "model_rows", "pipe_ms"]

# Published figures: processors, warp instructions per clock and processor, clock in GHz, memory and (as microbenchmarks
# have it) L2 bandwidth in TB/s, L2 in bytes, threads of a warp, registers and threads per processor, shared bytes.
CARDS: dict[str, dict[str, float]] = {
    "sm_80": {"sms": 108, "slots": 4, "ghz": 1.41, "tbs": 2.04, "l2": 4.5, "l2_bytes": 40 << 20, "warp": 32,
              "registers": 65536, "threads": 2048, "shared": 163840, "flops": 19.5},
    "sm_90": {"sms": 132, "slots": 4, "ghz": 1.76, "tbs": 3.35, "l2": 5.5, "l2_bytes": 50 << 20, "warp": 32,
              "registers": 65536, "threads": 2048, "shared": 232448, "flops": 67},
    "gfx942": {"sms": 304, "slots": 1, "ghz": 2.1, "tbs": 5.3, "l2": 10.0, "l2_bytes": 256 << 20, "warp": 64,
               "registers": 131072, "threads": 2048, "shared": 65536, "flops": 163},
}  # fmt: skip
GAP_MS = 0.001  # between two launches of a replayed CUDA graph
EFFICIENCY = 0.65  # of the issue slots that a kernel fills
SECTOR = 32  # bytes

# Pipes of a processor that are narrower than its issue slots: which opcodes, and lanes per clock.
PIPES: dict[str, tuple[str, int]] = {
    "conversions": (r"(MUFU|F2I|I2F\b|I2F\.|FRND|POPC)", 16),
    "integers": (r"(IADD|LOP|SHF|LEA|SEL|ISETP|IMNMX|VIADD|PRMT|FMNMX|FSETP|FSEL|PLOP|I2FP|MOV|P2R|R2P|VOTE)", 64),
    "shared and global memory": (r"(LD|ST|RED|ATOM)", 32),
}  # fmt: skip


def issue_ms(instructions: float, target: str) -> float:
    """Of so many instructions of warps."""
    card = CARDS[target]
    return instructions / (card["sms"] * card["slots"] * card["ghz"] * 1e6 * EFFICIENCY)


def pipe_ms(mix: Mapping[str, int], times: float, target: str) -> float:
    """The slowest pipe, of a mix that warps execute so many ``times``; on NVIDIA."""
    card = CARDS[target]
    if not target.startswith("sm_"):
        return 0.0
    slowest = 0.0
    for pattern, lanes in PIPES.values():
        count = sum(n for opcode, n in mix.items() if re.match(pattern, opcode))
        slowest = max(slowest, times * count * card["warp"] / (card["sms"] * lanes * card["ghz"] * 1e6))
    return slowest


def memory_ms(num_bytes: float, target: str) -> float:
    return num_bytes / (CARDS[target]["tbs"] * 1e9)


def l2_ms(num_bytes: float, target: str) -> float:
    return num_bytes / (CARDS[target]["l2"] * 1e9)


def linear_ms(row: Mapping[str, Any], rows: int) -> dict[str, float]:
    """``linear`` over ``rows`` rows, its whole way counted: the loop once per block of rows, the rest once per program.

    Of weights that are not kept there is no prediction: how often the compiler's loop turns does not show.
    """
    target = row["target"]
    memory = memory_ms(rows * row["row_traffic"], target)
    if not row["kept"]:
        return {"memory_ms": memory}
    items = -(-rows // row["rows_per_item"]) * row["columns"]
    programs = min(items, CARDS[target]["sms"] * row["programs"])
    turns = items * row["num_warps"]
    instructions = turns * sum(row["loop"].values()) + programs * row["num_warps"] * row["outside"]
    issued, pipe = issue_ms(instructions, target), pipe_ms(row["loop"], turns, target)
    crossing = l2_ms(rows * row["row_traffic"] + programs * row["weight_bytes"], target)
    return {
        "instructions_per_row": instructions / rows, "slots_ms": issued * EFFICIENCY, "issue_ms": issued,
        "pipe_ms": pipe, "l2_ms": crossing, "memory_ms": memory, "predicted_ms": max(issued, pipe, crossing, memory),
    }  # fmt: skip


def launch_ms(launch: Any, binary: Any, lengths: Any, target: str) -> dict[str, float]:
    """One launch of a rehearsed model.

    Args:
        launch: A :class:`tools.rehearsal.Launch`.
        binary: What its binary shows.
        lengths: Edges of the work items of the graph, in the order of programs.
        target: A key of :data:`CARDS`.
    """
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    loop, numbers = sum(binary.loop.values()), launch.numbers
    crossing = launch.tensor_bytes
    if launch.kernel == "linear_kernel":
        turns = numbers["num_items"] * launch.grid[1]
    elif "UNROLL" in numbers and "ROWS" in numbers:  # rows of a program wait for its longest
        longest = lengths[:: int(numbers["ROWS"])].to("cpu")
        turns = int((-(-longest // int(numbers["UNROLL"]))).sum()) * launch.grid[1]
        sectors = -(-4 * numbers.get("W", numbers.get("F", 1)) // SECTOR) * SECTOR
        crossing += int(lengths.sum()) * (sectors + 4)
    else:
        turns = programs
    instructions = launch.num_warps * (turns * loop + programs * binary.outside)
    issued = issue_ms(instructions, target)
    pipe = pipe_ms(binary.loop, turns * launch.num_warps, target)
    crossed, memory = l2_ms(crossing, target), memory_ms(launch.tensor_bytes, target)
    return {
        "issue_ms": issued, "pipe_ms": pipe, "l2_ms": crossed, "memory_ms": memory,
        "predicted_ms": max(issued, pipe, crossed, memory),
    }  # fmt: skip


CUSPARSE, CUBLAS = 0.75, 0.8  # of the memory's bandwidth, and of the fp32 rate, that they are taken to reach


def float_model_ms(model: str, nodes: int, edges: int, widths: tuple[int, ...], target: str) -> float:
    """PyG in fp32 by the same kind of reckoning: products, gathers and passes over activations.

    GCN sums a CSR matrix at the output's width and GraphSAGE at the input's, as PyG has them; GAT gathers, multiplies
    and scatters messages, which its CSR path does as well.
    """
    card, total = CARDS[target], 0.0
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        products = 2 if model == "GraphSAGE" else 1
        total += 2e-9 * nodes * fan_in * fan_out * products / (card["flops"] * CUBLAS)
        summed = fan_in if model == "GraphSAGE" else fan_out
        table = 4.0 * nodes * summed
        gathered = 4.0 * edges * summed if table > card["l2_bytes"] else table
        if model == "GAT":  # a message is written, read and written with its weight, and read for the sum
            gathered += 4 * 4.0 * edges * summed
        total += memory_ms((gathered + table + 12.0 * edges) / CUSPARSE, target)
        passes = 2 + products + (2 if i + 2 < len(widths) else 0)  # bias, addition, ReLU
        total += memory_ms(4.0 * nodes * fan_out * passes, target)
    return total


def model_rows(model: str, bits: int, nodes: int, edges: int, target: str) -> dict[str, Any]:
    """A packed model, rehearsed at its size: the launches of a forward pass and what they would take.

    Torch's own small operations between them are not in it; a gap between launches is.
    """
    import torch

    from benchmarks.gpu.graphs import edge_index_of
    from benchmarks.gpu.models import packed_model
    from benchmarks.stacks import WIDTHS, build_stack
    from qgnn_plugin.kernels.triton.autotune import power_law_plan
    from qgnn_plugin.kernels.triton.schedule import schedule_for
    from qgnn_plugin.packing.lazy import sizes
    from tools.rehearsal import rehearse

    small, plan = power_law_plan(2048, 20_000, "cpu"), power_law_plan(nodes, edges, "cpu")
    packed = packed_model(build_stack(model, WIDTHS).eval(), torch.randn(2048, WIDTHS[0]), edge_index_of(small), bits)
    whole = patch.object(sizes, "BLOCK_FLOATS", 1 << 62)  # blocks of rows are for the CPU's cache
    with whole, rehearse(target) as launches, torch.no_grad():
        packed(torch.randn(nodes, WIDTHS[0]), edge_index_of(plan))
    lengths = schedule_for(plan.rowptr, 256).length
    binaries = {launch.code: launch.binary for launch in launches}
    steps = [
        {"kernel": launch.kernel, "grid": launch.grid, **launch_ms(launch, binaries[launch.code], lengths, target)}
        for launch in launches
    ]
    ours = sum(s["predicted_ms"] + GAP_MS for s in steps)
    theirs = float_model_ms(model, nodes, edges, WIDTHS, target)
    return {
        "model": model, "bits": bits, "target": target, "launches": steps, "predicted_ms": ours,
        "float_ms": theirs, "times_as_fast": theirs / ours,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predictions of whole models; the interpreter has to be off.")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--nodes", type=int, default=170_000)
    parser.add_argument("--edges", type=int, default=2_000_000)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    rows = []
    for model in options.model:
        for bits in options.bits:
            rows.append(model_rows(model, bits, options.nodes, options.edges, options.target))
            options.json.write_text(compact_json(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
