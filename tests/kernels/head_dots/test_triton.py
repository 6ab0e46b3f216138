"""Dot products of heads on Triton, in the order of the reference."""

import pytest
import torch
from triton_support import assert_same

from qgnn_plugin.kernels.head_dots import head_dots
from qgnn_plugin.kernels.head_linear import head_linear
from qgnn_plugin.kernels.head_linear import triton as module
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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("features", "heads", "vectors"), [(64, 4, 2), (64, 8, 2), (128, 1, 1), (256, 4, 2), (256, 256, 1)]
)
def test_one_kernel_has_codes_and_dots(
    features: int, heads: int, vectors: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole rows: nothing else is launched; few rows in the last block, a bias, with multipliers and without."""
    if bits == 1 and features == 64:
        features, heads = 128, 2 * heads
    monkeypatch.setattr(module, "quantize_pack", None)
    monkeypatch.setattr(module, "head_dots", None)
    monkeypatch.setattr(module, "linear", None)
    rows, wide = 70, 40
    x, w = (pack_codes(torch.randint(0, 2**bits, (n, wide)), bits) for n in (rows, features))
    ends = torch.rand(1) / 8, torch.randn(1) / 8, torch.rand(features) / 4, torch.randn(features) / 4
    arguments = (x, w, *ends, wide, bits, bits, torch.randn(vectors, features), heads)
    multiplier = torch.randint(1, 16, (rows,), dtype=torch.uint8)
    to = torch.rand(features) / 2**bits, torch.randn(features), bits
    for times, unit in ((multiplier, torch.tensor([0.7])), (None, None)):
        assert_same(
            lambda t=times, u=unit: head_linear(  # type: ignore[misc]
                *arguments, *to, bias=torch.arange(features) / 64, multiplier=t, out_unit=u
            )
        )


@pytest.mark.parametrize(
    ("features", "heads", "vectors"),
    [(40, 1, 2), (48, 3, 2), (72, 8, 1), (64, 4, 3), (64, 4, 0), (1024, 8, 2), (8, 1, 2)],
)
def test_rows_that_one_kernel_does_not_have(features: int, heads: int, vectors: int) -> None:
    """Of other sizes: the product, codes and dots one after the other, and the same results."""
    rows, wide = 9, 20
    x, w = (pack_codes(torch.randint(0, 16, (n, wide)), 4) for n in (rows, features))
    ends = torch.rand(1) / 8, torch.randn(1) / 8, torch.rand(features) / 4, torch.randn(features) / 4
    arguments = (x, w, *ends, wide, 4, 4, torch.randn(vectors, features), heads, torch.rand(1), torch.randn(1), 2)
    for unit in (torch.tensor([0.7]), None):
        assert_same(lambda u=unit: head_linear(*arguments, out_unit=u))  # type: ignore[misc]
