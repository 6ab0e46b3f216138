"""``quantize_pack``, ``unpack_dequantize`` and ``fake_quantize`` on the CPU: the three agree."""

import pytest
import torch
from cpu_support import WIDTHS, assert_equal, random_range

from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS
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
