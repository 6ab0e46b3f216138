"""``quantize_pack``, ``unpack_dequantize`` and ``fake_quantize`` on the CPU: the three agree."""

import pytest
import torch
from cpu_support import WIDTHS, assert_equal, random_range

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS
from qgnn_plugin.kernels.quantize_pack import pack_mapped, quantize_pack, quantize_pack_reference
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


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("unit", [None, 0.3])
def test_columns_are_mapped_and_clamped_in_the_pass_that_packs(unit: float | None, is_mapped: bool, relu: bool) -> None:
    x, scale, offset = torch.randn(70, 37), torch.rand(37) + 0.1, torch.randn(37)
    factor, term = (torch.randn(37), torch.randn(37)) if is_mapped else (None, None)
    y = x if factor is None or term is None else x * factor + term
    y = y.relu() if relu else y
    times = None if unit is None else torch.tensor(unit)
    expected = quantize_pack_reference(y, scale, offset, 4, times)
    with use_backend("cpu"):
        found = pack_mapped(x, scale, offset, 4, times, factor, term, relu)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
