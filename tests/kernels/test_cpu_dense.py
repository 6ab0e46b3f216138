"""``quantize_pack``, ``unpack_dequantize``, ``fake_quantize`` and ``linear`` on the CPU."""

import pytest
import torch
from cpu_support import WIDTHS, assert_equal, output_range, random_range, random_words

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize

pytestmark = pytest.mark.usefixtures("poison_empty")
KINDS = ("tensor", "column", "row")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("rows", [0, 1, 100])
def test_pack_unpack_and_fake_quantize(rows: int, bits: int, kind: str) -> None:
    for width in WIDTHS:
        x = 3 * torch.randn(rows, width)
        if rows > 1:
            x[3, 0], x[4, -1], x[5, 0] = float("nan"), float("inf"), -float("inf")
        span = random_range(kind, rows, width)
        assert_equal(quantize_pack, x, **span, bits=bits)
        words = quantize_pack(x, **span, bits=bits)
        assert_equal(unpack_dequantize, words, **span, num_features=width, bits=bits)
        assert_equal(fake_quantize, x, **span, bits=bits)
        once = unpack_dequantize(words, **span, num_features=width, bits=bits)
        assert torch.equal(fake_quantize(x, **span, bits=bits), once)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_fake_quantize_gradients(bits: int, kind: str) -> None:
    x, upstream = 2 * torch.randn(150, 33), torch.randn(150, 33)
    span = random_range(kind, 150, 33)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.ops.qgnn.fake_quantize_backward(upstream, x, *span.values(), bits)

    assert_equal(gradients, tolerance=1e-5)
    leaves = [value.clone().requires_grad_() for value in (x, *span.values())]
    with use_backend("cpu"):
        fake_quantize(*leaves, bits).backward(upstream)
        for leaf, gradient in zip(leaves, gradients(), strict=True):
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, gradient)


def test_gradients_are_those_of_the_definition() -> None:
    """Against finite differences in the range, away from the rounding's jumps."""
    x = torch.tensor([[-2.0, -0.4, 0.3, 1.2, 9.0]])
    scale, offset = torch.tensor([0.7], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, scale, offset, 2).sum().backward()
    v = (x + 1) / 0.7
    code = (v + 0.5).floor().clamp(0, 3)
    inside = (v >= 0) & (v <= 3)
    assert torch.equal(leaf.grad, inside.float())
    torch.testing.assert_close(scale.grad, torch.where(inside, code - v, code).sum().view(1))
    assert float(offset.grad) == float((~inside).sum())


@pytest.mark.parametrize(("x_bits", "w_bits"), [(1, 2), (2, 2), (4, 4), (8, 8), (2, 8), (8, 2)])
def test_linear(x_bits: int, w_bits: int) -> None:
    for rows, depth, channels in ((0, 8, 8), (1, 1, 1), (7, 33, 5), (100, 256, 130), (50, 300, 40)):
        x, w = random_words(rows, depth, x_bits), random_words(channels, depth, w_bits)
        weight = {f"w_{k}": v for k, v in random_range("column", 1, channels).items()}
        for kind in ("tensor", "row"):
            source = {f"x_{k}": v for k, v in random_range(kind, rows, depth).items()}
            shape = {"in_features": depth, "x_bits": x_bits, "w_bits": w_bits}
            assert_equal(linear, x, w, **source, **weight, **shape)
            packed = output_range("column", rows, channels, 2, 10.0 * depth)
            bias = torch.randn(channels)
            assert_equal(linear, x, w, **source, **weight, **shape, bias=bias, relu=True, **packed)
            factor = torch.rand(rows)
            other = torch.randn(rows, channels)
            for out in ({}, packed, output_range("row", rows, channels, 4, 5.0 * depth)):
                assert_equal(linear, x, w, **source, **weight, **shape, bias=bias, row_scale=factor, **out)
                assert_equal(linear, x, w, **source, **weight, **shape, bias=bias, relu=True, addend=other, **out)


def test_row_scale_is_a_product_before_quantization() -> None:
    """The packed messages of a normalized graph, in one pass or in three."""
    x, w, one, zero = random_words(50, 40, 4), random_words(24, 40, 2), torch.ones(1), -torch.ones(1)
    factor, bias = torch.rand(50), torch.randn(24)
    args = (x, w, one, zero, one, zero, 40, 4, 2)
    step, low = torch.tensor(9.0), torch.tensor(-50.0)
    with use_backend("cpu"):
        fused = linear(*args, bias=bias, relu=True, row_scale=factor, out_scale=step, out_offset=low, out_bits=4)
        apart = quantize_pack(linear(*args, bias=bias).relu() * factor.view(-1, 1), step, low, 4)
    assert torch.equal(fused, apart)


def test_linear_sees_weights_changed_in_place() -> None:
    x, one, zero = random_words(5, 16, 2), torch.ones(1), torch.zeros(1)
    w = random_words(3, 16, 2)
    linear(x, w, one, zero, one, zero, 16, 2, 2)
    w.copy_(random_words(3, 16, 2))
    assert_equal(linear, x, w, one, zero, one, zero, 16, 2, 2)


def test_linear_errors() -> None:
    x, w, one = random_words(4, 16, 2), random_words(3, 16, 2), torch.ones(1)
    with pytest.raises(ValueError, match=r"'x_scale' of shape \[4, 1\] \(got \[16\]\)"):
        linear(x, w, torch.ones(16), one, one, one, 16, 2, 2)
    with pytest.raises(ValueError, match=r"'row_scale' of shape \[4\] \(got \[4, 1\]\)"):
        linear(x, w, one, one, one, one, 16, 2, 2, row_scale=torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"'addend' of shape \[4, 3\]"):
        linear(x, w, one, one, one, one, 16, 2, 2, addend=torch.ones(3, 4))
    with pytest.raises(ValueError, match="Expected 'w_words' of shape"):
        linear(x, w[:, :0], one, one, one, one, 16, 2, 2)
