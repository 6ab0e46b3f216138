"""``quantize_pack`` and ``unpack_dequantize`` against their references."""

import pytest
import torch
from triton_support import assert_same, ranges

from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS, pack_codes
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize

ROWS = 37


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("features", "kind"), [(1, "tensor"), (33, "column"), (100, "row")])
def test_pack_and_unpack(bits: int, features: int, kind: str) -> None:
    x = torch.randn(ROWS, features)
    x[3, 0], x[4, 0], x[5, 0] = float("nan"), float("inf"), -float("inf")
    scale, offset = ranges(kind, ROWS, features)
    words = pack_codes(torch.randint(0, 2**bits, (ROWS, features)), bits)
    assert_same(lambda: quantize_pack(x, scale, offset, bits))
    assert_same(lambda: unpack_dequantize(words, scale, offset, features, bits))


def test_rows_tile_over_a_second_axis() -> None:
    x = torch.randn(5, 600)
    scale, offset = ranges("column", 5, 600)
    assert_same(lambda: quantize_pack(x, scale, offset, 8))


def test_non_contiguous_input() -> None:
    x = torch.randn(33, ROWS).t()
    scale, offset = ranges("column", ROWS, 33)
    assert_same(lambda: quantize_pack(x, scale, offset, 4))
    assert_same(lambda: fake_quantize(x, scale, offset, 4))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    scale, offset = ranges("tensor", rows, 20)
    x = torch.randn(rows, 20)
    words = pack_codes(torch.randint(0, 4, (rows, 20)), 2)
    assert_same(lambda: quantize_pack(x, scale, offset, 2))
    assert_same(lambda: unpack_dequantize(words, scale, offset, 20, 2))
    assert_same(lambda: fake_quantize(x, scale, offset, 2))
