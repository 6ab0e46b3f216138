"""Codes and their straight-through gradients: finite differences in float64 and closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qgnn_plugin import QLRQuantizer
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import top_code
from qgnn_plugin.quantizers import RangeKind, quantize_codes
from qgnn_plugin.quantizers.functional import _codes, _codes_backward, _op_bits, truncate

BITS = (2, 4, 8)
STEP = 1e-6


def reference_codes(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    return torch.floor((x - lower) / scale + 0.5).clamp(0, qmax)


def surrogate(x: Tensor, scale: Tensor, lower: Tensor, qmax: int, residue: Tensor) -> Tensor:
    """Rounding replaced by adding what it added at the base point: smooth except at the clamp."""
    return lower + scale * (((x - lower) / scale).clamp(0, qmax) + residue)


def away_from_edges(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    """Move values off the two kinks of the clamp, where no derivative exists."""
    v = (x - lower) / scale
    near = ((v - 0).abs() < 1e-2) | ((v - qmax).abs() < 1e-2)
    return torch.where(near, x + 0.05 * scale, x)


def finite_difference(loss, value: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Central differences of ``loss()`` in every entry of ``value``, changed in place."""
    grad = torch.zeros_like(value)
    flat, out = value.view(-1), grad.view(-1)
    for i in range(flat.numel()):
        base = flat[i].item()
        step = STEP * max(1.0, abs(base))
        flat[i] = base + step
        above = loss()
        flat[i] = base - step
        below = loss()
        flat[i] = base
        out[i] = (above - below) / (2 * step)
    return grad


LEVELS = ("affine", "unsigned", "symmetric", "half")
GRANULARITIES = ("tensor", "channel", "node", "row")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("truncation", [None, "sbt"])
def test_gradients_match_finite_differences(
    bits: int, granularity: str, level: str, truncation: str | None
) -> None:
    """Of x, of the offset and of the log scale, in float64, through the whole quantizer."""
    x = torch.randn(6, 5, dtype=torch.float64)
    x[0] *= 4  # beyond any range fitted to the rest
    if level == "unsigned":
        x = x.abs()
    quantizer = QLRQuantizer(
        bits, levels=level, granularity=granularity, channels=5, truncation=truncation,  # type: ignore[arg-type]
        dtype=torch.float64,
    )  # fmt: skip
    quantizer.set_range(x)
    with torch.no_grad():
        quantizer.log_scale += 0.3 * torch.randn_like(quantizer.log_scale) - 0.4
        if quantizer.offset is not None:
            quantizer.offset += 0.3

    def factors(x: Tensor) -> Tensor:
        """What a row's range is multiplied by: constants to the gradient."""
        peaks = x.detach().abs().amax(1, keepdim=True)
        if granularity == "row":
            assert quantizer.unit is not None
            return (peaks / quantizer.unit).ceil().clamp(1, 15)
        return peaks if granularity == "node" else torch.ones_like(x[0, :1])

    rows = factors(x)
    log_scale = quantizer.log_scale.detach().clone()
    offset = torch.full_like(log_scale, -quantizer.zero_code if quantizer.zero_code else 0.0)
    if quantizer.offset is not None:
        offset = quantizer.offset.detach().clone()

    def values() -> tuple[Tensor, Tensor]:
        scale = log_scale.exp()
        return scale * rows, scale * offset * rows

    qmax = quantizer.qmax
    x = away_from_edges(x, *values(), qmax).requires_grad_()
    weight = torch.randn_like(x)
    rows = factors(x)  # the rows' peaks may have moved
    quantized = quantizer(x)
    (quantized.dequantize() * weight).sum().backward()
    scale, lower = values()
    residue = quantized.codes.detach() - ((x.detach() - lower) / scale).clamp(0, qmax)
    assert (residue.abs() <= 0.5 + 1e-9).all() or truncation is not None
    point = x.detach().clone()

    def loss() -> float:
        return float((surrogate(point, *values(), qmax, residue) * weight).sum())

    assert x.grad is not None
    torch.testing.assert_close(x.grad, finite_difference(loss, point), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        quantizer.log_scale.grad, finite_difference(loss, log_scale), rtol=1e-5, atol=1e-6
    )
    if quantizer.offset is not None:
        torch.testing.assert_close(
            quantizer.offset.grad, finite_difference(loss, offset), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_in_closed_form(bits: int, dtype: torch.dtype) -> None:
    """dx^/dx, dx^/du and dx^/dl of docs/quantizer.md, element by element."""
    qmax = top_code(bits)
    x = torch.randn(200, dtype=dtype) * 2
    low = torch.full_like(x, -1.3).requires_grad_()
    high = torch.full_like(x, 1.7).requires_grad_()
    x.requires_grad_()
    scale = (high - low) / qmax
    codes = quantize_codes(x, scale, low, qmax)
    (codes * scale + low).sum().backward()
    with torch.no_grad():
        v = (x - low) / scale
        inside, above, below = (v >= 0) & (v <= qmax), v > qmax, v < 0
        assert inside.any()
        assert above.any()
        assert below.any()
        c = reference_codes(x, scale, low, qmax)
        assert torch.equal(c, codes)
        share = (c - v) / qmax
        zero, one = torch.zeros_like(x), torch.ones_like(x)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(x.grad, torch.where(inside, one, zero), **tolerance)
    torch.testing.assert_close(
        high.grad, torch.where(inside, share, torch.where(above, one, zero)), **tolerance
    )
    torch.testing.assert_close(
        low.grad, torch.where(inside, -share, torch.where(below, one, zero)), **tolerance
    )


SHAPES = [(1,), (7,), (5, 3), (4, 0), (129, 257), (2, 3, 65), (64, 256), (3, 16384)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_pass_kernels_match_tensor_operations(
    shape: tuple[int, ...], per_row: bool, dtype: torch.dtype, poison_empty: None
) -> None:
    """Forward bitwise, backward to rounding; ranges per tensor and per row, all remainders."""
    if per_row and len(shape) < 2:
        pytest.skip("a range per row needs rows")
    x = torch.randn(shape, dtype=dtype)
    scale, lower = torch.tensor(0.11, dtype=dtype), torch.tensor(-0.7, dtype=dtype)
    if per_row:
        scale = scale * (1 + torch.rand(*shape[:-1], 1, dtype=dtype))
        lower = lower.expand_as(scale).contiguous()
    expected = _codes(x, scale, lower, 15)
    grad = torch.randn_like(x)
    expected_grads = _codes_backward(grad, x, scale, lower, 15)
    assert _op_bits(x, scale, lower, 15) == (4 if x.numel() else None)
    leaves = [t.clone().requires_grad_() for t in (x, scale, lower)]
    codes = quantize_codes(*leaves, 15)
    assert torch.equal(codes, expected)
    codes.backward(grad)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
    for leaf, reference in zip(leaves, expected_grads, strict=True):
        torch.testing.assert_close(leaf.grad, reference, **tolerance)
    assert torch.equal(leaves[0].grad, expected_grads[0])  # type: ignore[arg-type]


class OpsSeen(TorchDispatchMode):
    """Names of the ops of ours that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qgnn":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("qmax", [1, 3, 15, 255])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(70,), (9, 33), (3, 5, 20)])
def test_training_runs_the_op(shape: tuple[int, ...], per_row: bool, qmax: int, backend: str) -> None:
    """Whoever looks at what is dispatched sees it; past the dispatcher the same kernel gives the same codes."""
    x = torch.randn(shape)
    scale, lower = torch.tensor(4.0 / qmax), torch.tensor(-1.3)
    if per_row and len(shape) > 1:
        scale, lower = (v * (1 + torch.rand(*shape[:-1], 1)) for v in (scale, lower))
    grad = torch.randn(shape)

    def step() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, scale, lower)]
        codes = quantize_codes(*leaves, qmax)
        codes.backward(grad)
        return codes.detach(), *(leaf.grad for leaf in leaves)  # type: ignore[misc]

    direct = step()
    with use_backend(backend), OpsSeen() as seen:
        dispatched = step()
    assert seen.names == ["fake_quantize.default", "fake_quantize_backward.default"]
    assert torch.equal(direct[0], dispatched[0])
    assert torch.equal(direct[1], dispatched[1])
    for ours, theirs in zip(direct[2:], dispatched[2:], strict=True):
        if backend == "auto":
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_non_contiguous_values_and_gradients() -> None:
    base = torch.randn(40, 30)
    x = base.t()[::2]
    scale, lower = torch.tensor(0.2), torch.tensor(-1.0)
    leaf = x.clone().requires_grad_()
    view = base.clone().requires_grad_()
    first = quantize_codes(leaf, scale, lower, 15)
    second = quantize_codes(view.t()[::2], scale, lower, 15)
    assert torch.equal(first, second)
    grad = torch.randn(first.size(1), first.size(0)).t()
    first.backward(grad)
    second.backward(grad)
    assert torch.equal(leaf.grad, view.grad.t()[::2])  # type: ignore[union-attr,arg-type]
    expanded = quantize_codes(leaf, scale, lower, 15).sum()  # its gradient has strides of 0
    expanded.backward()


@pytest.mark.parametrize("shape", [(), (8, 1), (1, 8)])
def test_range_gradients_stay_finite_where_codes_overflow(shape: tuple[int, ...]) -> None:
    """Far outside a tiny range ``v`` is infinite; times a zero gradient that must not be NaN."""
    x = (torch.randn(8, 8) * 1e20).requires_grad_()
    scale = torch.full(shape, 1e-25).requires_grad_()
    lower = torch.zeros(shape, requires_grad=True)
    codes = quantize_codes(x, scale, lower, 15)
    assert set(codes.unique().tolist()) == {0.0, 15.0}
    (codes * scale + lower).sum().backward()
    for leaf in (x, scale, lower):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("skew", [0, 3, -20, 100])
def test_truncation_in_integers(bits: int, skew: int) -> None:
    """BT and BT* of every 8-bit code, against round-half-up in exact integers."""
    qmax = top_code(bits)
    base = 255 // qmax
    assert base * qmax == 255
    codes = truncate(torch.arange(256.0), qmax, torch.tensor(float(skew)))
    for fine, code in enumerate(codes.tolist()):
        assert code == min(max(math.floor((2 * (fine + skew) + base) / (2 * base)), 0), qmax)


@pytest.mark.parametrize("bits", [2, 4])
def test_truncation_goes_through_eight_bits(bits: int) -> None:
    """255 / Q is odd, so rounding twice is rounding once: only BT*'s correction changes codes."""
    qmax = top_code(bits)
    x = torch.randn(4000)
    scale, lower = torch.tensor(4.0 / qmax), torch.tensor(-2.0)
    direct = quantize_codes(x, scale, lower, qmax)
    assert (quantize_codes(x, scale, lower, qmax, torch.tensor(0.0)) != direct).sum() <= 2  # ties
    fine = quantize_codes(x, scale * (qmax / 255), lower, 255)
    base = 255 // qmax
    shifted = torch.floor((fine + 9) / base + 0.5).clamp(0, qmax)
    assert torch.equal(quantize_codes(x, scale, lower, qmax, torch.tensor(9.0)), shifted)
    assert (shifted > direct).any()


def test_second_derivatives_are_straight_through() -> None:
    """Of ``c^2``, with ``dc/dx = 1 / s`` inside the range: ``2 / s^2`` there and 0 beyond."""
    x = torch.tensor([-1.0, 0.33, 0.74, 1.49, 9.0], requires_grad=True)
    y = quantize_codes(x, torch.tensor(0.1), torch.tensor(0.0), 15).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 200.0, 200.0, 200.0, 0.0]))


def test_range_kinds_order_from_general_to_special() -> None:
    """Merging observations takes the smallest."""
    kinds = [RangeKind.FREE, RangeKind.NONNEGATIVE, RangeKind.ZERO_ONE_ROWS, RangeKind.ZERO_ONE]
    assert sorted(kinds) == kinds
