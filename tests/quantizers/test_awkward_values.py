"""QLRQuantizer on constants, zeros, nothing, NaN, and values of any magnitude."""

import pytest
import torch
from quantizers.support import BITS, dequantized, fitted, relative_error
from torch import Tensor

from qgnn_plugin import QLRQuantizer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(40, 12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("levels", ["affine", "symmetric"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3.7, -3.7, 1e30, -1e30])
def test_constant_tensors(bits: int, levels: str, value: float) -> None:
    x = torch.full((5, 4), value)
    torch.testing.assert_close(dequantized(x, bits, levels=levels), x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", ["affine", "unsigned", "symmetric", "half"])
def test_zeros_are_exact_and_do_not_set_a_range_for_good(levels: str) -> None:
    """As from a zero-initialized layer: the first real batch finds its range."""
    quantizer = QLRQuantizer(8, levels=levels).train()  # type: ignore[arg-type]
    assert torch.equal(quantizer(torch.zeros(6, 4)).dequantize(), torch.zeros(6, 4))
    assert quantizer.is_set
    x = torch.rand(6, 4) * 100 + 1
    x[0] = 0
    error = (quantizer(x).dequantize() - x).norm() / x.norm()
    assert error < 0.02


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0, 0)])
def test_empty_tensors(granularity: str, shape: tuple[int, int]) -> None:
    options = {"granularity": granularity, "channels": 4}
    empty = torch.empty(shape)
    quantizer = QLRQuantizer(4, **options)  # type: ignore[arg-type]
    for mode in (True, False):  # nothing to quantize, so no range is needed or set
        assert quantizer.train(mode)(empty).dequantize().shape == shape
    assert not quantizer.is_set
    with pytest.raises(ValueError, match="got an empty tensor"):
        quantizer.set_range(empty)
    if granularity != "channel" or shape == (0, 4):
        quantizer.set_range(torch.randn(3, 4))
        assert quantizer.eval()(empty).dequantize().shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sparse", [False, True])
def test_non_finite_values_name_the_site(x: Tensor, bad: float, sparse: bool) -> None:
    quantizer = fitted(x)
    x[3, 5] = bad
    given = x.to_sparse_csr() if sparse else x
    message = r"finite values at 'conv1\.input' \(got 1 NaN or infinite of 480\)"
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            quantizer.train(mode)(given)
    with pytest.raises(ValueError, match=message):
        quantizer.set_range(x)
    quantizer.observe()
    with pytest.raises(ValueError, match=message):
        quantizer(given)


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    x = torch.tensor([[3e38, 3e38, 1e38]])
    torch.testing.assert_close(dequantized(x, 8), x, rtol=1e-2, atol=0)


@pytest.mark.parametrize("magnitude", [1e30, 1e18, 1e-18, 1e-28])
@pytest.mark.parametrize("levels", ["affine", "half"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
def test_magnitude_does_not_matter(
    x: Tensor, magnitude: float, levels: str, granularity: str
) -> None:
    options = {"levels": levels, "granularity": granularity, "channels": 12}
    assert relative_error(x * magnitude, 8, **options) < 0.02
    scaled = (x * magnitude).requires_grad_()
    quantizer = fitted(scaled.detach(), 8, **options)
    quantizer(scaled).dequantize().sum().backward()
    assert scaled.grad is not None
    assert scaled.grad.isfinite().all()
    assert quantizer.log_scale.grad is not None
    assert quantizer.log_scale.grad.isfinite().all()


@pytest.mark.parametrize("levels", ["affine", "symmetric", "half"])
def test_denormal_values_are_nearly_zero(levels: str) -> None:
    x = torch.randn(5, 4) * 1e-41
    error = (dequantized(x, 8, levels=levels).double() - x.double()).abs().max()
    assert error <= 1e-30


def test_range_far_from_zero_keeps_its_step() -> None:
    """The offset counts steps, so an inexact step times many of them would miss the data."""
    x = -1000 - torch.rand(50, 4)
    quantizer = fitted(x, 8)
    step = float(quantizer.log_scale.exp())
    assert step < 1.01 / 255
    assert float((quantizer(x).dequantize() - x).abs().max()) <= step  # step/2, clipping, rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", ["affine", "half"])
def test_other_precisions(x: Tensor, dtype: torch.dtype, levels: str) -> None:
    x = x.to(dtype)
    quantizer = fitted(x, 4, levels=levels, dtype=dtype)
    out = quantizer(x).dequantize()
    assert out.dtype == dtype
    assert float((out - x).float().norm() / x.float().norm()) < 0.15
    zeros = fitted(torch.zeros_like(x), 4, levels=levels, dtype=dtype)
    assert torch.equal(zeros(torch.zeros_like(x)).dequantize(), torch.zeros_like(x))
    tiny = fitted(x * 1e-7, 4, levels=levels, dtype=dtype)(x * 1e-7).dequantize()
    assert tiny.isfinite().all()
