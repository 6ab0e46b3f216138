"""Kernels run past the dispatcher are the ops bit for bit."""

from typing import Any

import pytest
import torch
from cpu_support import random_words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.backend import has_numba, is_direct, use_backend
from qgnn_plugin.kernels.finite import is_finite
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize

pytestmark = [
    pytest.mark.skipif(not has_numba(), reason="kernels of the CPU are compiled by numba"),
    pytest.mark.usefixtures("poison_empty"),
]


def assert_same(found: Any, expected: Any) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def output(bits: int, columns: int, has_unit: bool) -> dict[str, Any]:
    if bits == 0:
        return {}
    count = max(1, columns)
    out = {"out_scale": torch.rand(count) + 0.1, "out_offset": -torch.rand(count), "out_bits": bits}
    return {**out, "out_unit": torch.tensor(0.7)} if has_unit else out


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 90),
    channels=st.integers(1, 80),
    x_bits=st.sampled_from([1, 2, 4, 8]),
    w_bits=st.sampled_from([1, 2, 4, 8]),
    out_bits=st.sampled_from([0, 1, 2, 4, 8]),
    per_channel=st.booleans(),
    multiplied=st.booleans(),
    rest=st.integers(0, 31),
)
def test_products_past_the_dispatcher(
    rows: int,
    width: int,
    channels: int,
    x_bits: int,
    w_bits: int,
    out_bits: int,
    per_channel: bool,
    multiplied: bool,
    rest: int,
) -> None:
    x_words, w_words = random_words(rows, width, x_bits), random_words(channels, width, w_bits)
    shape = (channels,) if per_channel else (1,)
    scale, offset = torch.rand(shape) + 0.1, torch.randn(shape)
    bias = torch.randn(channels) if rest & 1 else None
    options = {"relu": bool(rest & 2), **output(out_bits, channels if rest & 4 else 0, bool(rest & 8))}
    if rest & 16:
        options |= {"row_scale": torch.rand(rows), "addend": torch.randn(rows, channels)}
    multiplier = torch.randint(1, 16, (rows,), dtype=torch.uint8) if multiplied else None
    x_range = torch.tensor(0.3), torch.tensor(-0.2)
    args = (x_words, w_words, *x_range, scale, offset, width, x_bits, w_bits)
    found = linear(*args, bias=bias, multiplier=multiplier, is_checked=True, **options)
    with use_backend("torch"):
        assert_same(found, linear(*args, bias=bias, multiplier=multiplier, **options))


@pytest.mark.parametrize("write", ["numpy", "data", "torch"])
def test_weights_that_are_written_are_read_again(write: str) -> None:
    x_words, w_words, other = (random_words(20, 48, 4) for _ in range(3))
    ranges = torch.tensor(0.3), torch.tensor(-0.2)
    args = (*ranges, *ranges, 48, 4, 4)
    linear(x_words, w_words, *args, is_checked=True)
    if write == "numpy":
        w_words.numpy()[:] = other.numpy()
    elif write == "data":
        w_words.data.copy_(other)
    else:
        w_words.copy_(other)
    assert_same(linear(x_words, w_words, *args, is_checked=True), linear(x_words, other, *args))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("multiplied", [False, True])
def test_what_is_checked_already_is_computed_alike(bits: int, multiplied: bool) -> None:
    src, dst = torch.randint(30, (2, 200))
    plan = GraphPlan.from_edges(src, dst, 30, 30)
    words, x = random_words(30, 40, bits), torch.randn(30, 40)
    range_ = torch.tensor(0.3), torch.tensor(-0.2)
    multiplier = torch.randint(1, 16, (30,), dtype=torch.uint8) if multiplied else None
    unit = torch.tensor(0.4) if multiplied else None
    for out in (output(0, 0, False), output(bits, 0, False), output(bits, 40, multiplied)):
        args = (words, plan, *range_, 40, bits)
        options = {"bias": torch.randn(40), "relu": True, "multiplier": multiplier, **out}
        assert_same(aggregate(*args, is_checked=True, **options), aggregate(*args, **options))
    packed = (x, *range_, bits, unit)
    assert_same(quantize_pack(*packed, is_checked=True), quantize_pack(*packed))
    opened = (words, *range_, 40, bits, multiplier)
    assert_same(unpack_dequantize(*opened, is_checked=True), unpack_dequantize(*opened))


@pytest.mark.parametrize("out_bits", [0, 2, 4])
@pytest.mark.parametrize("multiplied", [False, True])
def test_sums_with_an_addend(out_bits: int, multiplied: bool) -> None:
    src, dst = torch.randint(30, (2, 200))
    plan = GraphPlan.from_edges(src, dst, 30, 30)
    words, addend, range_ = random_words(30, 48, 2), torch.randn(30, 48), (torch.tensor(0.3), torch.tensor(-0.2))
    multiplier = torch.randint(1, 16, (30,), dtype=torch.uint8) if multiplied else None
    out = output(out_bits, 0, multiplied)
    found = aggregate(
        words, plan, *range_, 48, 2, multiplier=multiplier, relu=True, is_checked=True, addend=addend, **out
    )
    y = (aggregate(words, plan, *range_, 48, 2, multiplier=multiplier) + addend).relu()
    expected: Any = y
    if out:
        expected = quantize_pack(y, out["out_scale"], out["out_offset"], out_bits, out.get("out_unit"))
    assert_same(found, expected)
    with use_backend("torch"), pytest.raises(ValueError, match="no 'addend'"):
        aggregate(words, plan, *range_, 48, 2, is_checked=True, addend=addend)


def test_whoever_looks_at_what_is_dispatched_sees_every_op() -> None:
    x, range_ = torch.randn(5, 8), (torch.tensor(0.3), torch.tensor(-0.2))
    assert is_direct()
    with use_backend("torch"):
        assert not is_direct()
    with torch.profiler.profile() as profile:
        assert not is_direct()
        quantize_pack(x, *range_, 4, is_checked=True)
    assert any(event.name == "qgnn::quantize_pack" for event in profile.events())
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not is_direct()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_finite(count: int, bad: float | None) -> None:
    for x in (torch.randn(count), torch.full((count,), 3e38), torch.full((count,), 1e-45), torch.zeros(count)):
        if bad is not None and count:
            x[torch.randint(count, ())] = bad
        assert is_finite(x) == bool(x.isfinite().all())
    y: Tensor = torch.randn(4, 6).t()
    assert is_finite(y)
