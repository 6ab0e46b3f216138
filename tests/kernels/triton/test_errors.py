"""What a user sees where the Triton backend cannot run: a clear error, never a wrong result."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from graphs import star
from triton_support import SMALL, assert_same, plan_of, ranges

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.aggregate.triton import aggregate as launch_aggregate
from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.attention_aggregate.triton import attention_aggregate as launch_attention
from qgnn_plugin.kernels.backend import check_devices, use_backend
from qgnn_plugin.kernels.layout import pack_codes, row_words
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.quantize_pack.triton import quantize_pack as launch_pack
from qgnn_plugin.kernels.triton import launch

IMPORT_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import qgnn_plugin
from qgnn_plugin.kernels.backend import available_backends, use_backend
from qgnn_plugin.kernels.quantize_pack import quantize_pack
assert "triton" not in available_backends("cuda") and "interpret" not in available_backends("cpu")
x, one = torch.rand(3, 5), torch.ones(1)
quantize_pack(x, one, one, 2)
try:
    with use_backend("triton"):
        quantize_pack(x, one, one, 2)
except RuntimeError as problem:
    assert "available" in str(problem), problem
else:
    raise AssertionError("ran on a missing backend")
"""


def packed(plan: GraphPlan, features: int, bits: int) -> torch.Tensor:
    return pack_codes(torch.randint(0, 2**bits, (plan.num_src, features)), bits)


def test_the_package_works_without_triton() -> None:
    found = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_TRITON], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_backend_of_another_device_is_refused() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match="available"):
        quantize_pack(torch.rand(2, 4), torch.ones(1), torch.zeros(1), 2)


def test_mixed_devices_are_refused() -> None:
    plan = plan_of(SMALL["self_loops"]())
    words, (scale, offset) = packed(plan, 8, 2), ranges("tensor", 0, 8)
    with pytest.raises(ValueError, match=r"one device \(got \['cpu', 'meta'\]\)"):
        check_devices(words, None, scale.to("meta"))
    with pytest.raises(ValueError, match="one device"):
        launch_aggregate(words, plan.rowptr, plan.col, scale.to("meta"), offset, 8, 2)
    with pytest.raises(ValueError, match="one device"):
        launch_pack(torch.rand(2, 8), scale, offset.to("meta"), 2)
    with pytest.raises(ValueError, match="on one device"):
        GraphPlan.from_edges(torch.zeros(1).long(), torch.zeros(1, device="meta").long(), 1, 1)


def test_strided_and_misaligned_tensors_give_the_same_results() -> None:
    plan = plan_of(SMALL["erdos_renyi"]())
    features, bits = 40, 2
    scale, offset = ranges("column", plan.num_src, features)
    rows = pack_codes(torch.randint(0, 4, (plan.num_src + 1, features)), bits)
    wide = torch.zeros(plan.num_src, 2 * row_words(features, bits), dtype=torch.int32)
    wide[:, ::2] = rows[1:]
    for words in (rows[1:], wide[:, ::2]):  # starts off a multiple of 16 bytes; rows and words apart
        assert_same(lambda words=words: aggregate(words, plan, scale, offset, features, bits))  # type: ignore[misc]
    weight = torch.rand(2, plan.num_edges).t()
    assert not weight.is_contiguous()
    assert_same(lambda: aggregate(rows[1:], plan, scale, offset, features, bits, edge_weight=weight), exact=False)


@pytest.mark.parametrize("op", ["aggregate", "attention"])
def test_debug_mode_finds_indices_out_of_range(op: str) -> None:
    plan = plan_of(SMALL["self_loops"]())
    words, (scale, offset) = packed(plan, 8, 2), ranges("tensor", 0, 8)
    alpha = torch.rand(plan.num_src, 2)
    args = (words, plan.rowptr, plan.col + 1, scale, offset, 8, 2)
    run = (
        partial(launch_aggregate, *args)
        if op == "aggregate"
        else partial(launch_attention, *args, 2, 4, 0.2, alpha, alpha)
    )
    with launch.debug_checks(), pytest.raises(ValueError, match=r"source nodes in \[0, 7\)"):
        run()


def test_shapes_beyond_the_hardware_are_refused() -> None:
    with pytest.raises(ValueError, match="hardware's limits"):
        launch.launch(None, (2**31, 1), torch.device("cpu"))
    with pytest.raises(ValueError, match="at most 4096 words in one tile"):
        launch.whole_row_tile(launch.Config(), 5000)
    with pytest.raises(ValueError, match="numbered in 32 bits"):
        GraphPlan.from_edges(torch.zeros(0).long(), torch.zeros(0).long(), 2**31, 1)


def test_rows_wider_than_a_tile_are_refused_by_attention_alone() -> None:
    plan = plan_of(star(3))
    features = 8 * (launch.MAX_ROW_WORDS + 1)
    words, (scale, offset) = packed(plan, features, 4), ranges("tensor", 0, features)
    alpha = torch.rand(plan.num_src, 1)
    with use_backend("interpret"), pytest.raises(ValueError, match="fewer features"):
        attention_aggregate(
            words, plan, scale, offset, features, 4, heads=1, attention_bits=4, alpha_src=alpha, alpha_dst=alpha
        )


def test_capture_of_a_new_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from qgnn_plugin.kernels.triton import schedule

    plan = plan_of(SMALL["power_law"]())
    known = schedule.schedule_for(plan.rowptr, 64)
    monkeypatch.setattr(schedule, "is_capturing", lambda tensor: True)
    assert schedule.schedule_for(plan.rowptr, 64) is known
    with pytest.raises(RuntimeError, match="run the model once before capturing"):
        schedule.schedule_for(plan.rowptr.clone(), 64)
