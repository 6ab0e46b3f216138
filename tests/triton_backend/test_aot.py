"""Every kernel compiles ahead of time; what the binaries show holds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

INTEGER_INSTRUCTIONS_PER_CODE = 1.0


def compile_grid(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of the report, from a process without the interpreter."""
    file = folder / "aot.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run(
        [
            sys.executable, "-m", "qgnn_plugin.kernels.triton.aot", "--json", str(file),
            *arguments,
        ],
        check=True, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(file.read_text())


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        name = f"{row['target']} {row['op']} {row['case']}"
        assert row["spills"] == 0, f"{name} spills {row['spills']} registers"
        assert row["local_bytes"] == 0, f"{name} uses {row['local_bytes']} bytes of local memory"
        if row.get("mode") != "sum":
            continue
        if row["row_bytes"] % 16 == 0:
            assert max(row["loop_loads"]) == 16, f"{name} loads {row['loop_loads']}"
        if row["target"].startswith("sm") and row["bits"] in (2, 4) and row["features"] >= 64:
            per_code = row["integer_instructions"] / row["codes_per_iteration"]
            assert per_code <= INTEGER_INSTRUCTIONS_PER_CODE, f"{name}: {per_code:.2f} per code"


def test_sum_on_hopper(tmp_path: Path) -> None:
    check(compile_grid(tmp_path, "--target", "sm_90", "--case", "sum int"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_small_grid(tmp_path: Path, target: str) -> None:
    check(compile_grid(tmp_path, "--target", target))
