"""Predictions from binaries: what is counted, and what decides."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import kernel_predictions as predictions
from benchmarks import kernel_report as report

ROW: dict[str, Any] = {
    "op": "linear", "target": "sm_90", "loop": {"FADD": 900, "F2I.TRUNC.NTZ": 64, "IGMMA.64x128x32.S8.S8": 16},
    "outside": 200, "num_warps": 4, "kept": True, "rows_per_item": 64, "columns": 2, "programs": 3,
    "weight_bytes": 32768, "row_traffic": 132,
}  # fmt: skip


def test_linear_counts_every_instruction_of_every_block_of_rows() -> None:
    rows = 64 * 1000
    figures = predictions.linear_ms(ROW, rows)
    instructions = 2000 * 4 * 980 + 396 * 4 * 200
    assert figures["instructions_per_row"] == pytest.approx(instructions / rows)
    card = predictions.CARDS["sm_90"]
    assert figures["slots_ms"] == pytest.approx(instructions / (card["sms"] * 4 * card["ghz"] * 1e6))
    assert figures["issue_ms"] == pytest.approx(figures["slots_ms"] / predictions.EFFICIENCY)
    assert figures["predicted_ms"] == max(figures[k] for k in ("issue_ms", "pipe_ms", "l2_ms", "memory_ms"))
    assert set(predictions.linear_ms({**ROW, "kept": False}, rows)) == {"memory_ms"}


def test_the_slowest_pipe_decides() -> None:
    conversions = predictions.pipe_ms({"F2I.TRUNC.NTZ": 10, "FADD": 10}, 1e6, "sm_90")
    card = predictions.CARDS["sm_90"]
    assert conversions == pytest.approx(1e7 * 32 / (card["sms"] * 16 * card["ghz"] * 1e6))
    assert predictions.pipe_ms({"I2FP.F32.S32": 10}, 1e6, "sm_90") == pytest.approx(conversions / 4)
    assert predictions.pipe_ms({"v_add": 10}, 1e6, "gfx942") == 0.0


def test_programs_of_a_gather_wait_for_their_longest_row() -> None:
    lengths = torch.tensor([9, 5, 3, 1])
    binary = SimpleNamespace(loop={"LDG.E": 8}, outside=100)
    launch = SimpleNamespace(
        kernel="aggregate_kernel", grid=(2, 1, 1), num_warps=4, tensor_bytes=1000,
        numbers={"ROWS": 2, "UNROLL": 4, "W": 16},
    )  # fmt: skip
    figures = predictions.launch_ms(launch, binary, lengths, "sm_90")
    assert figures["issue_ms"] == pytest.approx(predictions.issue_ms(4 * ((3 + 1) * 8 + 2 * 100), "sm_90"))
    assert figures["l2_ms"] == pytest.approx(predictions.l2_ms(1000 + 18 * 68, "sm_90"))


def test_float_models_take_longer_with_more_of_everything() -> None:
    sizes = (170_000, 2_000_000, (128, 256, 256, 40))
    times = {name: predictions.float_model_ms(name, *sizes, "sm_90") for name in ("GCN", "GraphSAGE", "GAT")}
    assert times["GCN"] < times["GraphSAGE"] < times["GAT"]
    assert times["GCN"] < predictions.float_model_ms("GCN", *sizes, "sm_80")


def test_the_table_of_models_adds_up() -> None:
    steps = [
        {"kernel": "linear_kernel", "predicted_ms": 0.5}, {"kernel": "hub_kernel", "predicted_ms": 0.25},
        {"kernel": "quantize_pack_kernel", "predicted_ms": 0.125},
    ]  # fmt: skip
    row = {"model": "GCN", "bits": 2, "target": "sm_90", "launches": steps, "predicted_ms": 0.878, "float_ms": 8.78,
           "times_as_fast": 10.0}  # fmt: skip
    assert "| GCN | 2 | 3 | 0.878 | 8.78 | 10.0 | 0.500 | 0.250 | 0.125 |" in report.models_markdown([row])
    assert report.models_markdown([]) == ""
