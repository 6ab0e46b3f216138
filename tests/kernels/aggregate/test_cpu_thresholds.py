"""Sums of 2-bit codes requantized by comparing integers: the codes are those of float arithmetic, bit for bit."""

from typing import Any

import numba
import numpy as np
import pytest
import torch
from cpu_support import assert_equal, random_words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.aggregate.cpu_thresholds import BLOCK, TALLEST, applies, find_thresholds
from qgnn_plugin.kernels.cpu.epilogue import Closed, epilogue, opened
from qgnn_plugin.kernels.layout import unpack_codes
from qgnn_plugin.kernels.plan import GraphPlan

pytestmark = pytest.mark.usefixtures("poison_empty")

BITS = 2


def plan_of_degrees(degrees: list[int], num_src: int = 50) -> GraphPlan:
    rowptr = torch.tensor([0, *degrees]).cumsum(0)
    return GraphPlan(rowptr, torch.randint(0, num_src, (int(rowptr[-1]),)).int(), num_src)


def means(plan: GraphPlan) -> Tensor:
    return plan.degree.clamp_min(1).reciprocal()


def factors(**options: Any) -> dict[str, Any]:
    range_ = {"out_scale": torch.tensor([0.5]), "out_offset": torch.tensor([-0.3])}
    return {"out_bits": BITS, **range_, "scale": torch.tensor([0.7]), "offset": torch.tensor([-0.4]), **options}


def is_applicable(plan: GraphPlan, width: int = 32, **options: Any) -> bool:
    used = factors(**options)
    return applies(epilogue(plan.num_dst, width, **used)[1], used["scale"], used["out_scale"])


@numba.njit
def thresholds_of(rowptr: Any, first: int, count: int, closed: Closed, table: Any) -> None:
    find_thresholds(rowptr, first, count, opened(closed), table)


@settings(deadline=None, max_examples=60)
@given(
    degrees=st.lists(st.integers(0, 40) | st.sampled_from([85, 86, 678, 679, 680, 2500]), min_size=1, max_size=70),
    width=st.sampled_from([16, 48, 64, 256, 528]),
    scaled=st.sampled_from(["no", "means", "any"]),
    per_row=st.booleans(),
    relu=st.booleans(),
    offset=st.sampled_from([0.0, -0.7, 40.0]),
    spread=st.sampled_from([1e-6, 0.05, 1.0, 1e4]),
)
def test_codes_are_those_of_float_arithmetic(
    degrees: list[int], width: int, scaled: str, per_row: bool, relu: bool, offset: float, spread: float
) -> None:
    plan = plan_of_degrees(degrees)
    rows = plan.num_dst
    options: dict[str, Any] = {"relu": relu, "out_bits": BITS}
    if scaled != "no":
        options["dst_scale"] = means(plan) if scaled == "means" else torch.randn(rows)
    shape = (rows, 1) if per_row else (1,)
    middle = 0.3 * (1.5 + offset) * (1.0 if scaled == "means" else 20.0)
    options.update(out_scale=(torch.rand(shape) + 0.1) * spread, out_offset=middle - 1.5 * spread * torch.rand(shape))
    args = (torch.tensor([0.3]), torch.tensor([0.3 * offset]), width, BITS)
    assert_equal(aggregate, random_words(plan.num_src, width, BITS), plan, *args, **options)


def test_thresholds_are_the_least_sums() -> None:
    """For every degree up to the tallest, found without falling back to floats; the arithmetic is spelled out here."""
    plan = plan_of_degrees(list(range(1, TALLEST + 1)))
    used = factors(dst_scale=means(plan))
    assert is_applicable(plan, dst_scale=means(plan))
    _, closed, _ = epilogue(plan.num_dst, 32, **used)
    table = np.empty(3 * BLOCK, np.int32)
    found = []
    for first in range(0, TALLEST, BLOCK):
        count = min(BLOCK, TALLEST - first)
        thresholds_of(plan.rowptr.numpy(), first, count, closed, table)
        found.append(torch.from_numpy(table.reshape(3, BLOCK)[:, :count].copy()))
    thresholds = torch.cat(found, 1)
    assert (thresholds >= 0).all()
    degree = plan.degree.to(torch.float32)
    low, inverse = torch.tensor(-0.3), torch.tensor([0.5]).reciprocal()

    def code(total: Tensor) -> Tensor:
        y = (total.float() * torch.tensor(0.7) + degree * torch.tensor(-0.4)) * means(plan)
        return ((y - low) * inverse + 0.5).floor().clamp(0, 3)

    for j, threshold in enumerate(thresholds, 1):
        reached = threshold <= 3 * degree
        assert (code(threshold)[reached] >= j).all()
        assert (code(threshold - 1)[(threshold > 0) & reached] < j).all()
        assert (code(3 * degree)[~reached] < j).all()
    assert (thresholds[0] > 0).any()
    assert (thresholds[2] <= 3 * degree).any()


@pytest.mark.parametrize(
    "options",
    [
        {"bias": torch.ones(32)},
        {"row_scale": torch.ones(4)},
        {"scale": torch.rand(32)},
        {"scale": torch.tensor([-1.0])},
        {"out_scale": torch.rand(32) + 0.1, "out_offset": torch.rand(32)},
        {"out_bits": 4},
        {"width": 40},
    ],
    ids=lambda options: "-".join(options),
)
def test_columns_that_differ_are_left_to_floats(options: dict[str, Any]) -> None:
    plan = plan_of_degrees([1, 2, 3, 4])
    assert is_applicable(plan)
    assert not is_applicable(plan, **options)


def test_rows_of_any_kind_side_by_side() -> None:
    """Rows that are compared, that floats must finish, and that have no edges, in one block."""
    plan = plan_of_degrees([0, 1, 85, 86, TALLEST, TALLEST + 1, 5000, 3])
    scale = torch.tensor([1.0, -1.0, 0.02, 0.02, 0.0, 0.001, 0.0003, float("inf")])
    words = random_words(plan.num_src, 64, BITS)
    range_ = {"out_scale": torch.tensor([0.7]), "out_offset": torch.tensor([0.2]), "out_bits": BITS}
    one = torch.ones(1)
    assert_equal(aggregate, words, plan, one, 0 * one, 64, BITS, dst_scale=scale, **range_)
    out = aggregate(words, plan, one, 0 * one, 64, BITS, dst_scale=scale.nan_to_num(), **range_)
    assert len(unpack_codes(out, 64, BITS).unique()) == 4
