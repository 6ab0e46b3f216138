"""``linear_pair`` on Triton against its reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton_support import assert_same, ranges

from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.linear import Product, linear
from qgnn_plugin.kernels.linear_pair import linear_pair
from qgnn_plugin.kernels.linear_pair import triton as module
from qgnn_plugin.kernels.triton.launch import Config, override

ROWS = 70
# As Ampere and Hopper have it: of two warpgroups beside each other each packs columns of its own.
CONFIGS = {1: Config(num_warps=4, block_m=16, block_n=256), 2: Config(num_warps=8, block_m=64, block_n=256)}


def product(
    features: int, outputs: int, bits: tuple[int, int], multiplied: bool = False, per_row: bool = False
) -> Product:
    x, w = (pack_codes(torch.randint(0, 2**b, (n, features)), b) for n, b in zip((ROWS, outputs), bits, strict=True))
    times = torch.randint(0, 16, (ROWS,), dtype=torch.uint8) if multiplied else None
    ends = ranges("row" if per_row else "tensor", ROWS, features), ranges("column", outputs, outputs)
    return Product(x, w, *ends[0], *ends[1], features, *bits, None, times)


def results(outputs: int, bits: int) -> list[dict[str, Any]]:
    """Floats, codes of a range per column, and codes of rows with multipliers."""
    scale, offset = ranges("column", outputs, outputs)
    packed = {"out_scale": 4 * scale, "out_offset": offset, "out_bits": bits, "relu": True}
    one = {"out_scale": torch.tensor(3.0), "out_offset": torch.tensor(-2.0)}
    return [{}, packed, {**packed, **one, "out_unit": torch.tensor([0.7])}]


@pytest.mark.parametrize("groups", CONFIGS)
@pytest.mark.parametrize(
    ("bits", "features", "bits2", "features2", "outputs", "out_bits"),
    [
        ((2, 2), 64, (2, 2), 64, 128, 2), ((4, 2), 100, (2, 4), 33, 20, 4), ((8, 8), 33, (1, 8), 70, 24, 8),
        ((1, 4), 40, (8, 2), 17, 150, 1), ((2, 8), 1, (4, 4), 90, 7, 2),
    ],
)  # fmt: skip
def test_one_kernel(
    bits: tuple[int, int], features: int, bits2: tuple[int, int], features2: int, outputs: int, out_bits: int,
    groups: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever the widths; nothing else is launched."""
    monkeypatch.setattr(module, "linear", None)
    plain = product(features, outputs, bits), product(features2, outputs, bits2)
    biased = [p._replace(bias=torch.randn(outputs)) for p in plain]
    times = [torch.randint(0, 16, (ROWS,), dtype=torch.uint8) for _ in plain]
    pairs = [
        (biased[0]._replace(multiplier=times[0]), plain[1]), (plain[0], biased[1]._replace(multiplier=times[1])),
        (biased[0], product(features2, outputs, bits2, per_row=True)._replace(bias=biased[1].bias)),
    ]  # fmt: skip
    with override(linear_pair=CONFIGS[groups]):
        for pair, to in zip(pairs, results(outputs, out_bits), strict=True):
            assert_same(lambda p=pair, t=to: linear_pair(*p, **t))  # type: ignore[misc]


def test_programs_walk_over_blocks_of_rows_and_columns() -> None:
    first, second = (product(n, 90, (2, 2), multiplied=True) for n in (40, 24))
    with override(linear_pair=replace(CONFIGS[1], block_n=32)):
        for to in results(90, 2):
            assert_same(lambda t=to: linear_pair(first, second, **t))  # type: ignore[misc]


@pytest.mark.parametrize(("features", "outputs"), [(300, 40), (20, 300)])
def test_sizes_that_one_kernel_does_not_have(features: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More weights than a program keeps, rows wider than it has: one product adds the floats of the other."""
    monkeypatch.setattr(module, "multiply", None)
    first, second = product(features, outputs, (4, 4), multiplied=True), product(features + 3, outputs, (4, 4))
    assert_same(lambda: linear_pair(first, second, **results(outputs, 4)[2]))


def test_results_are_those_of_one_product_added_to_the_other() -> None:
    first, second = product(50, 12, (4, 2)), product(30, 12, (2, 2), multiplied=True)
    args, other = first[:9], linear(*second[:9], multiplier=second.multiplier)
    for to in results(12, 2):
        expected, got = linear(*args, addend=other, **to), linear_pair(first, second, **to)
        for want, found in zip(*(v if isinstance(v, tuple) else (v,) for v in (expected, got)), strict=True):
            assert torch.equal(want, found)


def test_no_rows() -> None:
    first, second = (product(8, 16, (2, 2)) for _ in range(2))
    none = [p._replace(x_words=p.x_words[:0]) for p in (first, second)]
    for to in results(16, 2):
        assert_same(lambda t=to: linear_pair(*none, **t))  # type: ignore[misc]
