"""Dot products of heads, by themselves and beside a packed product: the order of sums is part of what they are."""

from typing import Any

import pytest
import torch

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.head_dots import head_dots
from qgnn_plugin.kernels.head_linear import head_linear
from qgnn_plugin.kernels.layout import pack_codes, top_code
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.quantize_pack import quantize_pack

SHAPES = [(5, 4, 64, 2), (7, 8, 8, 2), (3, 1, 40, 1), (9, 3, 7, 2), (3, 5, 17, 3), (1, 1, 1, 1)]  # N, H, C, V
EMPTY = [(0, 2, 4, 2), (4, 2, 0, 2), (4, 2, 3, 0)]


def in_canonical_order(x: torch.Tensor, vectors: torch.Tensor, heads: int) -> torch.Tensor:
    """The definition once more, one number at a time."""
    width = x.size(1) // heads
    out = torch.zeros(vectors.size(0), x.size(0), heads)
    for v, n, h in torch.cartesian_prod(*(torch.arange(k) for k in out.shape)).tolist():
        lanes = [torch.zeros(()) for _ in range(16)]
        for f in range(width):
            lanes[f % 16] = lanes[f % 16] + x[n, h * width + f] * vectors[v, h * width + f]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[k] + lanes[half + k] for k in range(half)]
        out[v, n, h] = lanes[0]
    return out


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("rows", "heads", "width", "number"), SHAPES)
def test_order(rows: int, heads: int, width: int, number: int, backend: str, poison_empty: None) -> None:
    x, vectors = torch.randn(rows, heads * width), torch.randn(number, heads * width)
    with use_backend(backend):
        out = head_dots(x, vectors, heads)
    assert torch.equal(out, in_canonical_order(x, vectors, heads))
    exact = torch.einsum(
        "nhc,vhc->vnh", x.double().view(rows, heads, width), vectors.double().view(number, heads, width)
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("rows", "heads", "width", "number"), EMPTY)
def test_empty(rows: int, heads: int, width: int, number: int, backend: str, poison_empty: None) -> None:
    with use_backend(backend):
        out = head_dots(torch.randn(rows, heads * width), torch.randn(number, heads * width), heads)
    assert torch.equal(out, torch.zeros(number, rows, heads))


def test_strided_input_and_threads(poison_empty: None) -> None:
    x, vectors = torch.randn(64, 5000).t(), torch.randn(64, 4).t()
    assert not x.is_contiguous()
    expected = head_dots(x.contiguous(), vectors.contiguous(), 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(head_dots(x, vectors, 4), expected)
    finally:
        torch.set_num_threads(threads)


def test_wrong_arguments() -> None:
    x, vectors = torch.randn(3, 12), torch.randn(2, 12)
    with pytest.raises(ValueError, match="divides 12 features"):
        head_dots(x, vectors, 5)
    with pytest.raises(ValueError, match="'vectors' of shape"):
        head_dots(x, vectors[:, :8], 4)
    with pytest.raises(TypeError, match="float32 matrix"):
        head_dots(x.double(), vectors, 4)


def product(rows: int, features: int, channels: int, bits: int, multiplied: bool) -> dict[str, Any]:
    """Arguments of a product; its output is what :func:`to` says."""
    columns = torch.rand(channels) / 4, torch.randn(channels) / 4
    return {
        "x_words": pack_codes(torch.randint(0, 2**bits, (rows, features)), bits),
        "w_words": pack_codes(torch.randint(0, 2**bits, (channels, features)), bits),
        "x_scale": torch.rand(1) / 8, "x_offset": torch.randn(1) / 8, "w_scale": columns[0], "w_offset": columns[1],
        "in_features": features, "x_bits": bits, "w_bits": bits, "bias": torch.randn(channels),
        "multiplier": torch.randint(1, 16, (rows,), dtype=torch.uint8) if multiplied else None,
    }  # fmt: skip


def to(bits: int, multiplied: bool) -> dict[str, Any]:
    step = torch.tensor([0.5 / top_code(bits)])
    return {
        "out_scale": step, "out_offset": -step * top_code(bits) / 2, "out_bits": bits,
        "out_unit": torch.tensor([0.7]) if multiplied else None,
    }  # fmt: skip


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "features", "heads", "width"), [(100, 128, 4, 64), (50, 40, 3, 7), (2, 9, 1, 40)])
def test_product_with_dots(
    rows: int, features: int, heads: int, width: int, bits: int, multiplied: bool, poison_empty: None
) -> None:
    """One kernel computes what the three before it do, bit for bit, on both backends."""
    given, out = product(rows, features, heads * width, bits, multiplied), to(bits, multiplied)
    vectors = torch.randn(2, heads * width)
    y = linear(**given)
    expected = quantize_pack(y, *out.values())
    words, times, dots = head_linear(**given, vectors=vectors, heads=heads, **out)
    for want, got in zip(expected, (words, times), strict=True) if multiplied else ((expected, words),):
        assert torch.equal(want, got)
    assert times.shape == ((rows,) if multiplied else (0,))
    assert torch.equal(dots, head_dots(y, vectors, heads))
    direct = head_linear(**given, vectors=vectors, heads=heads, **out, is_checked=True)
    with use_backend("torch"):
        reference = head_linear(**given, vectors=vectors, heads=heads, **out)
    for want, *others in zip((words, times, dots), direct, reference, strict=True):
        assert all(torch.equal(want, other) for other in others)


def test_product_needs_packed_output() -> None:
    given = product(3, 8, 4, 2, False)
    with pytest.raises(ValueError, match="Expected packed output"):
        head_linear(**given, vectors=torch.randn(1, 4), heads=2, **(to(2, False) | {"out_bits": 0}))
