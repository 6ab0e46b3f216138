"""quantize_pack, unpack_dequantize, fake_quantize and linear against their references."""

import pytest
import torch
from triton_support import assert_same, ranges

from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS, pack_codes
from qgnn_plugin.kernels.linear import linear
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


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("features", "kind"), [(1, "tensor"), (33, "column"), (300, "row")])
def test_fake_quantize_and_its_gradients(bits: int, features: int, kind: str) -> None:
    x = 2 * torch.randn(ROWS, features)
    grad = torch.randn(ROWS, features)
    scale, offset = ranges(kind, ROWS, features)

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [v.clone().requires_grad_() for v in (x, scale, offset)]
        y = fake_quantize(*leaves, bits)
        y.backward(grad)
        return y.detach(), *(v.grad for v in leaves)

    assert_same(run, exact=False)
    assert_same(lambda: fake_quantize(x, scale, offset, bits))


@pytest.mark.parametrize(
    ("x_bits", "w_bits", "features", "outputs"),
    [(2, 2, 64, 32), (4, 2, 100, 20), (8, 8, 33, 7), (1, 4, 256, 64), (8, 2, 128, 40)],
)
def test_linear(x_bits: int, w_bits: int, features: int, outputs: int) -> None:
    x = pack_codes(torch.randint(0, 2**x_bits, (ROWS, features)), x_bits)
    w = pack_codes(torch.randint(0, 2**w_bits, (outputs, features)), w_bits)
    per_row, one = ranges("row", ROWS, features), ranges("tensor", ROWS, features)
    per_output = ranges("column", outputs, outputs)
    bias = torch.randn(outputs)
    packed = {"out_scale": torch.tensor(0.5), "out_offset": torch.tensor(-1.0), "out_bits": 2}
    for x_range, w_range in ((one, per_output), (per_row, ranges("tensor", 1, 1))):
        args = (x, w, *x_range, *w_range, features, x_bits, w_bits)
        assert_same(lambda args=args: linear(*args, bias=bias, relu=True))  # type: ignore[misc]
    assert_same(lambda: linear(x, w, *one, *per_output, features, x_bits, w_bits, **packed))
    factor = torch.rand(ROWS)
    assert_same(lambda: linear(x, w, *one, *per_output, features, x_bits, w_bits, row_scale=factor, **packed))
    assert_same(lambda: linear(x, w, *one, *per_output, features, x_bits, w_bits, row_scale=factor))
    other = torch.randn(ROWS, outputs)
    assert_same(lambda: linear(x, w, *one, *per_output, features, x_bits, w_bits, addend=other, relu=True, **packed))
