"""``linear`` on the CPU against its reference."""

import pytest
import torch
from cpu_support import assert_equal, output_range, random_range, random_words

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.quantize_pack import quantize_pack

pytestmark = pytest.mark.usefixtures("poison_empty")


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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rows_of_any_number_of_words(bits: int) -> None:
    """Tiles of words are written over one another, last one first, and whole words tell the sum of a row's codes."""
    for words in (1, 7, 15, 16, 17, 32, 35):
        depth = 32 // bits * words
        for rows in (1, 97):
            x, w = random_words(rows, depth, bits), random_words(3, depth, bits)
            one, low = torch.ones(1), -torch.ones(1)
            assert_equal(linear, x, w, one, low, one, low, depth, bits, bits)
            if bits < 8:  # and codes past the last feature are none of it
                fewer = depth - 4
                weights = random_words(3, fewer, bits)
                assert_equal(linear, x, weights, one, low, one, low, fewer, bits, bits)


@pytest.mark.parametrize("depth", [84, 88, 7281, 7282])
def test_sums_of_the_largest_codes(depth: int) -> None:
    """Sums of two bits are held in bytes over 84 features and in 16 bits over 7281."""
    x, w = (pack_codes(torch.full((rows, depth), 3), 2) for rows in (9, 33))
    one, zero = torch.ones(1), torch.zeros(1)
    with use_backend("cpu"):
        out = linear(x, w, one, zero, one, zero, depth, 2, 2)
    assert torch.equal(out, torch.full((9, 33), 9.0 * depth))


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
