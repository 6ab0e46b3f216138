"""Dot products of heads on Triton, in the order of the reference."""

import pytest
import torch
from triton_support import assert_same

from qgnn_plugin.kernels.head_dots import head_dots
from qgnn_plugin.kernels.head_linear import head_linear
from qgnn_plugin.kernels.layout import pack_codes


@pytest.mark.parametrize(
    ("rows", "heads", "width", "number"), [(5, 4, 32, 2), (70, 2, 8, 2), (3, 1, 40, 1), (9, 3, 7, 2), (0, 2, 4, 2)]
)
def test_dots(rows: int, heads: int, width: int, number: int) -> None:
    x, vectors = torch.randn(rows, heads * width), torch.randn(number, heads * width)
    assert_same(lambda: head_dots(x, vectors, heads))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_product_with_dots(bits: int) -> None:
    x, w = (pack_codes(torch.randint(0, 2**bits, (n, 24)), bits) for n in (20, 32))
    ends = torch.rand(1) / 8, torch.randn(1) / 8, torch.rand(32) / 4, torch.randn(32) / 4
    multiplier, vectors = torch.randint(1, 16, (20,), dtype=torch.uint8), torch.randn(2, 32)
    to = torch.rand(1), torch.randn(1), bits
    for unit in (None, torch.tensor([0.7])):
        assert_same(
            lambda u=unit: head_linear(  # type: ignore[misc]
                x, w, *ends, 24, bits, bits, vectors, 4, *to, multiplier=multiplier, out_unit=u
            )
        )
