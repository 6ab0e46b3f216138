"""``linear`` against its reference."""

import pytest
import torch
from triton_support import assert_same, ranges

from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.linear import linear, linear_colterm
from qgnn_plugin.kernels.linear.triton_prepared import prepare_weights

ROWS = 37


@pytest.mark.parametrize(
    ("x_bits", "w_bits", "features", "outputs"),
    [
        (2, 2, 64, 32), (4, 2, 100, 20), (8, 8, 33, 7), (1, 4, 256, 64), (8, 2, 128, 40), (2, 8, 17, 150),
        (4, 4, 600, 70), (8, 8, 1100, 3), (2, 2, 1, 1), (2, 2, 0, 8),
    ],
)  # fmt: skip
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


def test_a_program_walks_over_several_blocks_of_rows() -> None:
    """As many programs as run at once keep their weights and share the rows, the last of which fill no block."""
    rows, features, outputs = 64 * 7 + 5, 40, 24
    x = pack_codes(torch.randint(0, 4, (rows, features)), 2)
    w = pack_codes(torch.randint(0, 4, (outputs, features)), 2)
    args = (x, w, *ranges("tensor", 1, 1), *ranges("column", 1, outputs), features, 2, 2)
    assert_same(lambda: linear(*args, bias=torch.ones(outputs)))
    assert_same(lambda: linear(*args, out_scale=torch.tensor(9.0), out_offset=torch.tensor(0.0), out_bits=2))


@pytest.mark.parametrize(("out_bits", "outputs"), [(1, 300), (2, 12), (2, 130), (4, 36), (8, 70)])
def test_packed_output_of_any_width(out_bits: int, outputs: int) -> None:
    features = 20
    x = pack_codes(torch.randint(0, 16, (ROWS, features)), 4)
    w = pack_codes(torch.randint(0, 16, (outputs, features)), 4)
    for kind in ("tensor", "column", "row"):
        scale, offset = ranges(kind, ROWS, outputs)
        out = {"out_scale": 40 * scale, "out_offset": offset, "out_bits": out_bits}
        args = (x, w, *ranges("tensor", 1, 1), *ranges("tensor", 1, 1), features, 4, 4)
        assert_same(lambda args=args, out=out: linear(*args, **out))  # type: ignore[misc]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_prepared_weights_multiply_as_the_codes_do(bits: int) -> None:
    """In the order of the input's bytes: what byte ``k`` has in part ``p`` meets weight ``p B + k``."""
    features, outputs, block = 70, 9, 8
    x, w = torch.randint(0, 2**bits, (5, features)), torch.randint(0, 256, (outputs, features))
    scale, offset = ranges("column", 1, outputs)
    ready = prepare_weights(pack_codes(w, 8), scale, offset, features, bits, 8, block)
    raw = pack_codes(x, bits).view(torch.uint8).to(torch.int32)
    raw = torch.nn.functional.pad(raw, (0, -raw.size(1) % block)).view(5, -1, 1, block)
    parts = torch.arange(8 // bits).view(-1, 1)
    codes = (raw >> (bits * parts) & (2**bits - 1)).reshape(5, -1)
    product = codes.long() @ ready.codes.long().t() + 128 * x.sum(1, keepdim=True)
    assert torch.equal(product, x @ w.t())
    assert torch.equal(ready.column_sum, (w - 128).sum(1).to(torch.int32))
    assert torch.equal(ready.column_term, linear_colterm(w, scale, offset))


def test_weights_that_were_written_to_are_prepared_again() -> None:
    x, w = (pack_codes(torch.randint(0, 4, (rows, 32)), 2) for rows in (6, 8))
    scale, offset = ranges("column", 1, 8)
    args = (x, w, *ranges("tensor", 1, 1), scale, offset, 32, 2, 2)
    assert_same(lambda: linear(*args))
    w.copy_(pack_codes(torch.randint(0, 4, (8, 32)), 2))
    assert_same(lambda: linear(*args))
    scale.mul_(2)
    assert_same(lambda: linear(*args))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_sums_of_words(bits: int) -> None:
    """Every field at its largest and at random; the reference is what rows of ``linear`` sum to."""
    features = 3 * 32 // bits
    codes = torch.randint(0, 2**bits, (4, features))
    codes[0] = 2**bits - 1
    x, w = pack_codes(codes, bits), pack_codes(torch.zeros(2, features, dtype=torch.int64), 2)
    one = torch.ones(1)
    assert_same(lambda: linear(x, w, one, torch.zeros(1), one, one, features, bits, 2))
