"""Properties of the quantizer on adversarial values (hypothesis)."""

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qgnn_plugin import QLRQuantizer

SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

bits = st.sampled_from([2, 4, 8])
levels = st.sampled_from(["affine", "symmetric", "half"])
granularity = st.sampled_from(["tensor", "channel", "node", "row"])


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))
    ends = draw(st.sampled_from([1.0, 1e-30, 1e4, 1e30]))
    low = draw(st.sampled_from([-1.0, 0.0]))
    width = draw(st.sampled_from([32, 16]))  # half-width floats: many ties and repeats
    values = st.floats(low, 1.0, width=width, allow_subnormal=True)
    array = draw(hnp.arrays(np.float32, shape, elements=values))
    return torch.from_numpy(array) * ends


def make(x: Tensor, bits: int, levels: str, granularity: str) -> QLRQuantizer:
    quantizer = QLRQuantizer(
        bits, levels=levels, granularity=granularity, channels=x.size(1)  # type: ignore[arg-type]
    )
    quantizer.set_range(x)
    return quantizer.train()


def ends(quantizer: QLRQuantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, lower and upper end in float64, broadcast to ``x``."""
    quantized = quantizer(x)
    scale, lower = quantized.scale.detach().double(), quantized.lower.detach().double()
    assert quantized.qmax is not None
    upper = lower + scale * quantized.qmax
    return scale.expand_as(x), lower.expand_as(x), upper.expand_as(x)


def rounding(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """What float32 may lose in ``c s + l``."""
    return 2.0**-22 * torch.maximum(x.double().abs(), torch.maximum(lower.abs(), upper.abs()))


@SETTINGS
@given(matrices(), bits, levels, granularity)
def test_codes_are_integers_within_the_width(x: Tensor, b: int, level: str, layout: str) -> None:
    quantizer = make(x, b, level, layout)
    for values in (x, 10 * x, -x):
        quantized = quantizer(values)
        codes = quantized.codes.detach()
        assert quantized.qmax is not None
        assert torch.equal(codes, codes.round())
        assert codes.min() >= 0
        assert codes.max() <= quantized.qmax <= 2**b - 1


@SETTINGS
@given(matrices(), bits, levels, granularity)
def test_error_is_at_most_half_a_step_inside(x: Tensor, b: int, level: str, layout: str) -> None:
    quantizer = make(x, b, level, layout)
    out = quantizer(x).dequantize().detach().double()
    scale, lower, upper = ends(quantizer, x)
    inside = (x >= lower) & (x <= upper)
    slack = scale * 1e-4 + rounding(x, lower, upper)
    assert ((out - x).abs()[inside] <= (scale / 2 + slack)[inside]).all()
    nearest = torch.where(x < lower, lower, upper)
    assert ((out - nearest).abs()[~inside] <= slack[~inside]).all()


@SETTINGS
@given(matrices(), bits, levels, st.sampled_from(["tensor", "channel"]))
def test_quantizing_twice_is_quantizing_once(x: Tensor, b: int, level: str, layout: str) -> None:
    """Where float32 resolves the steps; not per node, where a row's own peak moves."""
    quantizer = make(x, b, level, layout)
    scale, lower, upper = ends(quantizer, x)
    assume(bool((scale > 8 * rounding(x, lower, upper)).all()))
    once = quantizer(x)
    again = quantizer(once.dequantize().detach())
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.dequantize(), again.dequantize())


@SETTINGS
@given(matrices(), bits, levels)
def test_order_is_kept(x: Tensor, b: int, level: str) -> None:
    quantizer = make(x, b, level, "tensor")
    ordered = x.flatten().sort().values
    codes = quantizer(ordered).codes.detach()
    assert (codes[1:] >= codes[:-1]).all()


@SETTINGS
@given(matrices(), bits, granularity, st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order(x: Tensor, b: int, layout: str, random) -> None:  # type: ignore[no-untyped-def]
    order = torch.tensor(random.sample(range(x.size(0)), x.size(0)))
    quantizer = make(x, b, "affine", layout)
    assert torch.equal(quantizer(x[order]).dequantize(), quantizer(x).dequantize()[order])
    refitted = make(x[order], b, "affine", layout)
    torch.testing.assert_close(refitted.log_scale, quantizer.log_scale, rtol=1e-3, atol=1e-3)


@SETTINGS
@given(matrices(), bits)
def test_zero_stays_zero_in_non_negative_data(x: Tensor, b: int) -> None:
    x = x.abs()
    quantizer = make(x, b, "affine", "tensor")
    assert (quantizer(x).dequantize()[x == 0] == 0).all()


@SETTINGS
@given(matrices(), bits, levels, granularity)
def test_gradients_are_finite_and_masked(x: Tensor, b: int, level: str, layout: str) -> None:
    quantizer = make(x, b, level, layout)
    scale, lower, upper = ends(quantizer, x)
    leaf = x.clone().requires_grad_()
    quantizer(leaf).dequantize().sum().backward()
    assert leaf.grad is not None
    assert ((leaf.grad == 0) | ((leaf.grad - 1).abs() < 1e-5)).all()
    slack = scale * 1e-3 + rounding(x, lower, upper)
    assert (leaf.grad[(x < lower - slack) | (x > upper + slack)] == 0).all()
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
