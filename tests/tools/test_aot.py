"""Every kernel compiles ahead of time; what the binaries show holds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "gfx942")
INTEGER_INSTRUCTIONS_PER_CODE = {("sum", 2): 1.0, ("sum", 4): 1.0, ("max", 2): 1.0, ("max", 4): 2.0}  # at most
# At most, of a row with whole vectors: a canonical epilogue with bias, ReLU and packing takes about 18.
OUTSIDE_INSTRUCTIONS_PER_CODE = {**dict.fromkeys(("sum", "max", "weighted", "heads", "gat"), 26), "v2": 36}
# Of linear with packed output, per output: 15 are canonical arithmetic, 4 pack, the rest unpacks, loads and adds up.
LINEAR_INSTRUCTIONS_PER_OUTPUT = {"sm_90": 25, "sm_80": 44}
VECTOR_BYTES = 16
VECTOR_GATHERS = ("sum", "max", "weighted", "heads", "gat")  # GATv2 holds more per code, hence fewer codes per thread

# One specialization or two of each kernel: what `make test` compiles.
QUICK = (
    "aggregate sum int2 F=256", "aggregate sum int4 F=256 packed", "aggregate sum int4 F=256 hubs",
    "aggregate max int4 F=256", "aggregate weighted int4 F=256", "attention_aggregate gat int4 F=256 H=4 att4",
    "attention_aggregate gat int4 F=256 H=4 peak", "attention_aggregate v2 int4 F=64 H=4 att4",
    "linear int2 x int2 K=256 packed", "linear int4 x int4 K=600 packed", "linear int4 x int4 K=256 packed, added",
    "quantize_pack int4 F=256", "unpack_dequantize int4 F=256",
    "fake_quantize int4 F=256*", "smp_step * F=64", "spmm * F=64",
)  # fmt: skip

# For cards of other kinds, one of each that lanes, shuffles or matrix instructions tell apart; the rest is slow.
ELSEWHERE = (
    "aggregate sum int4 F=256 packed", "attention_aggregate gat int4 F=256 H=4 att4", "linear int4 x int4 K=600 packed",
    "quantize_pack int4 F=256",
)  # fmt: skip

# All of them, in parts that can run side by side.
GRID = (
    ("aggregate",), ("attention_aggregate",), ("linear",),
    ("quantize_pack", "unpack_dequantize", "fake_quantize", "smp_step", "spmm"),
)  # fmt: skip


def compile_grid(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of the report, from a process without the interpreter."""
    file = folder / "aot.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tools.aot", "--json", str(file), *arguments]
    subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True, text=True)
    return json.loads(file.read_text())


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        name = f"{row['target']} {row['op']} {row['case']}"
        assert row["spills"] == 0, f"{name} spills {row['spills']} registers"
        assert row["local_bytes"] == 0, f"{name} uses {row['local_bytes']} bytes of local memory"
        mode = row.get("mode")
        if mode in VECTOR_GATHERS and row["codes_per_iteration"] and row["row_bytes"] % VECTOR_BYTES == 0:
            codes_per_thread = row["codes_per_iteration"] / row["unroll"]
            widest = min(VECTOR_BYTES, int(codes_per_thread * row["bits"] / 8))
            assert max(row["loop_loads"]) >= widest, f"{name} loads {row['loop_loads']}"
        outside = OUTSIDE_INSTRUCTIONS_PER_CODE.get(mode, 0)
        if outside and row["row_bytes"] % VECTOR_BYTES == 0 and row["target"].startswith("sm_"):
            per_code = row["outside"] * row["unroll"] / row["codes_per_iteration"]
            assert per_code <= outside, f"{name}: {per_code:.1f} per code outside the loop"
        if row["op"] == "linear" and row["kept"] and row["case"].endswith("packed") and row["target"].startswith("sm_"):
            in_loop = sum(row["loop"].values()) * 32 * row["num_warps"]
            per_output = in_loop / (row["rows_per_item"] * row["outputs"] / row["columns"])
            assert per_output <= LINEAR_INSTRUCTIONS_PER_OUTPUT[row["target"]], f"{name}: {per_output:.1f} per output"
            assert sum(n for op, n in row["loop"].items() if op.startswith(("IMMA", "IGMMA"))), f"{name}: {row['loop']}"
        limit = INTEGER_INSTRUCTIONS_PER_CODE.get((mode, row["bits"]))
        # Rows that are not whole vectors take an address per word: up to 1.6 per code at 100 features of 4 bits.
        if limit is not None and row["codes_per_iteration"] and row["row_bytes"] % VECTOR_BYTES == 0:
            per_code = row["integer_instructions"] / row["codes_per_iteration"]
            assert per_code <= limit, f"{name}: {per_code:.2f} per code"


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(tmp_path: Path, target: str) -> None:
    quick = QUICK if target == "sm_90" else ELSEWHERE
    patterns = [argument for pattern in quick for argument in ("--case", pattern)]
    rows = compile_grid(tmp_path, "--target", target, *patterns)
    assert len(rows) >= len(quick)
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("ops", GRID, ids=lambda ops: ops[0])
@pytest.mark.parametrize("target", TARGETS)
def test_grid(tmp_path: Path, target: str, ops: tuple[str, ...]) -> None:
    patterns = [argument for op in ops for argument in ("--case", f"{op} *")]
    check(compile_grid(tmp_path, "--target", target, "--grid", "full", *patterns))
