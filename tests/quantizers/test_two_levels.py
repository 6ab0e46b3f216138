"""One bit: its two levels, the range of least squares against others, and gradients against formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import GCN, GATConv

import qgnn_plugin as qgnn
from qgnn_plugin import QLRQuantizer
from qgnn_plugin.kernels.fake_quantize.cpu_codes import codes_backward
from qgnn_plugin.quantizers import RangeKind, quantize_codes
from qgnn_plugin.quantizers.functional import _codes_backward, _op_bits
from qgnn_plugin.quantizers.range_search import search_range
from qgnn_plugin.quantizers.rows import multipliers, search_rows

GRANULARITIES = ("tensor", "channel", "node", "row")


def fitted(x: Tensor, **options: Any) -> QLRQuantizer:
    quantizer = QLRQuantizer(1, dtype=x.dtype, **options)
    quantizer.set_range(x)
    return quantizer


# Levels ###############################################################################################################


def test_weights_are_their_signs_times_their_mean_magnitude() -> None:
    """Per output channel, with levels of minus and plus half a step (XNOR-Net, equation 6)."""
    weight = torch.randn(7, 300, dtype=torch.float64) * torch.rand(7, 1, dtype=torch.float64)
    quantizer = fitted(weight, levels="half", granularity="channel", channels=7, channel_dim=0)
    out = quantizer(weight)
    assert out.qmax == 1
    assert out.bits == 1
    assert set(out.codes.unique().tolist()) == {0.0, 1.0}
    expected = weight.sign() * weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(out.dequantize(), expected, rtol=1e-12, atol=0)


def test_levels_of_data_of_either_sign_are_free_and_those_of_others_hold_zero() -> None:
    x = torch.cat([torch.full((30, 4), -3.0), torch.full((10, 4), 1.0)])
    free = fitted(x)
    assert free.range_kind == RangeKind.FREE
    torch.testing.assert_close(free(x).dequantize(), x)
    x = torch.rand(40, 5) * (torch.rand(40, 5) < 0.7)
    positive = fitted(x)
    assert positive.range_kind == RangeKind.NONNEGATIVE
    values = positive(x).dequantize().unique()
    assert values.numel() == 2
    assert values[0] == 0


def test_data_of_zero_and_one_stay_exact() -> None:
    x = (torch.rand(30, 40) < 0.3).float() * 0.7
    quantizer = fitted(x)
    assert quantizer.range_kind == RangeKind.ZERO_ONE
    assert quantizer.is_zero_one
    assert torch.equal(quantizer(x).dequantize(), x)
    rows = x * torch.rand(30, 1)
    assert fitted(rows).range_kind == RangeKind.NONNEGATIVE  # a float per row weighs more than the 40 bits of one
    wide = rows.repeat(1, 7)
    assert fitted(wide).range_kind == RangeKind.ZERO_ONE_ROWS
    assert torch.equal(fitted(wide)(wide).dequantize(), wide)


@pytest.mark.parametrize("levels", ["affine", "unsigned", "half"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_alone_leave_zero_to_itself(levels: str, granularity: str) -> None:
    zeros = torch.zeros(6, 5)
    quantizer = fitted(zeros, levels=levels, granularity=granularity, channels=5)
    assert quantizer.range_kind == RangeKind.ZEROS
    assert quantizer(zeros).dequantize().abs().max() <= 1e-20


# Range search #########################################################################################################


def error(x: Tensor, scale: Tensor, lower: Tensor, weight: Tensor | None = None) -> Tensor:
    codes = ((x - lower) / scale + 0.5).floor().clamp(0, 1)
    squares = (codes * scale + lower - x).square()
    return (squares if weight is None else squares * weight).mean(-1)


def samples(kind: str, rows: int = 4) -> Tensor:
    x = torch.randn(rows, 300, dtype=torch.float64)
    made = {"normal": x, "skewed": x.exp() - 1, "shifted": x + 40, "one outlier": x.clone(), "few": x.round()}[kind]
    if kind == "one outlier":
        made[:, 0] = 50
    return made


@pytest.mark.parametrize("zero_code", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["normal", "skewed", "shifted", "one outlier", "few"])
def test_no_other_range_is_better(kind: str, zero_code: float | None) -> None:
    """Not any of 50 x 50 ranges whose levels are within the data."""
    x = samples(kind)
    x = {0.0: x.abs(), 1.0: -x.abs()}.get(zero_code, x)  # type: ignore[arg-type]
    scale, lower = search_range(x, 1, zero_code)
    found = error(x, scale.unsqueeze(1), lower.unsqueeze(1))
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    for share in torch.linspace(0.02, 2, 50).tolist():
        if zero_code is None:
            step, at = share / 2 * (high - low), torch.linspace(0, 1, 50, dtype=x.dtype).view(-1, 1, 1)
            starts = low + at * (high - low)
        else:
            step = share * torch.maximum(low.abs(), high.abs())
            starts = (-zero_code * step).unsqueeze(0)
        assert (found <= error(x, step, starts) * (1 + 1e-9)).all()


def test_equal_values_are_exact() -> None:
    for value in (3.0, -3.0):
        x = torch.full((2, 10), value)
        scale, lower = search_range(x, 1, None)
        assert torch.equal(lower + 0 * scale, x[:, 0])
        assert error(x, scale.unsqueeze(1), lower.unsqueeze(1)).eq(0).all()


@pytest.mark.parametrize("zero_code", [None, 0.5])
def test_multiples_of_rows_are_fitted_for_what_rows_are_multiplied_by(zero_code: float | None) -> None:
    """Of the multipliers found, no other range is better, and rows of different sizes have different multipliers."""
    x = torch.randn(200, 20, dtype=torch.float64) * torch.rand(200, 1, dtype=torch.float64).exp2() ** 4
    peaks = x.abs().amax(1, keepdim=True)
    unit, scale, lower = search_rows(torch.stack([x.flatten(), peaks.expand_as(x).flatten()]), 1, zero_code)
    m = multipliers(peaks, unit)
    assert m.unique().numel() > 4
    y, weight = (x / m).flatten(), m.square().expand_as(x).flatten()
    found = error(y, scale, lower, weight)
    for share in torch.linspace(0.3, 3, 20).tolist():
        for shift in torch.linspace(-1, 1, 11).tolist() if zero_code is None else [0.0]:
            low = (lower if zero_code is None else -0.5 * scale * share) + shift * scale
            assert found <= error(y, scale * share, low, weight) * (1 + 1e-9)


# Gradients ############################################################################################################


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_in_closed_form(dtype: torch.dtype, per_row: bool) -> None:
    """Of the middle ``m = l + s/2``: ``dx^/dx`` is 1 within a step of it, ``dx^/dm`` the rest; ``dx^/ds = c - 1/2``."""
    x = (torch.randn(60, 33, dtype=dtype) * 2).requires_grad_()
    shape = (60, 1) if per_row else ()
    scale = (torch.rand(shape, dtype=dtype) + 0.8).requires_grad_()
    middle = (torch.randn(shape, dtype=dtype) * 0.3).requires_grad_()
    assert _op_bits(x, scale, middle, 1) == 1
    weight = torch.randn_like(x)
    lower = middle - scale / 2
    codes = quantize_codes(x, scale, lower, 1)
    ((codes * scale + lower) * weight).sum().backward()
    near = (x - middle).abs() <= scale
    expected = {
        "x": weight * near,
        "scale": (weight * ((x >= middle).to(dtype) - 0.5)).sum_to_size(shape),
        "middle": (weight * ~near).sum_to_size(shape),
    }
    assert near.any()
    assert (~near).any()
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for name, value in (("x", x), ("scale", scale), ("middle", middle)):
        torch.testing.assert_close(value.grad, expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("levels", ["affine", "unsigned", "half"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_of_a_quantizer(levels: str, granularity: str) -> None:
    """Of ``x``, ``log s`` and the offset in steps, in float64, by autograd through ``m + s (c - 1/2)`` spelled out."""
    x = torch.randn(6, 5, dtype=torch.float64)
    x = x.abs() if levels == "unsigned" else x
    x[0] *= 4
    quantizer = fitted(x, levels=levels, granularity=granularity, channels=5)
    with torch.no_grad():
        quantizer.log_scale -= 0.4
        if quantizer.offset is not None:
            quantizer.offset += 0.2
    rows = {"node": x.abs().amax(1, keepdim=True)}.get(granularity, torch.ones(()))
    if granularity == "row":
        assert quantizer.unit is not None
        rows = multipliers(x.abs().amax(1, keepdim=True), quantizer.unit)
    weight = torch.randn_like(x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (quantizer(ours).dequantize() * weight).sum().backward()

    log_scale = quantizer.log_scale.detach().clone().requires_grad_()
    offset = torch.full_like(log_scale, -(quantizer.zero_code or 0.0))
    if quantizer.offset is not None:
        offset = quantizer.offset.detach().clone().requires_grad_()
    scale = log_scale.exp() * rows
    middle = scale * (offset + 0.5)
    code = (x >= middle).to(x.dtype).detach()
    near = ((x - middle).abs() <= scale).to(x.dtype).detach()
    values = middle + scale * (code - 0.5) + near * ((theirs - theirs.detach()) - (middle - middle.detach()))
    (values * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(quantizer.log_scale.grad, log_scale.grad)
    if quantizer.offset is not None:
        torch.testing.assert_close(quantizer.offset.grad, offset.grad)


def test_the_compiled_gradients_are_those_of_the_reference() -> None:
    x, grad = torch.randn(50, 37) * 3, torch.randn(50, 37)
    scale, lower = torch.rand(50, 1) + 0.5, torch.randn(50, 1)
    grad_x, _, grad_lower = codes_backward(grad, x, scale, lower, 1)
    expected_x, expected_scale, expected_lower = _codes_backward(grad, x, scale, lower, 1)
    assert torch.equal(grad_x, expected_x)
    torch.testing.assert_close(grad_lower, expected_lower)
    torch.testing.assert_close(grad_lower * 0.5, expected_scale)


@pytest.mark.parametrize("make", [lambda: GCN(20, 24, 3, 5, dropout=0.0), lambda: GATConv(20, 5)], ids=["GCN", "GAT"])
def test_compressed_activations_keep_every_gradient(make: Any) -> None:
    """Of two levels states and sides tell all there is to know: no gradient of a range is an estimate."""
    torch.manual_seed(1)
    x, edge_index, y = torch.randn(90, 20), torch.randint(90, (2, 400)), torch.randint(5, (90,))
    model = qgnn.calibrate(qgnn.quantize_model(make(), bits=1), (x, edge_index), method="ranges").train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        F.cross_entropy(model(x, edge_index), y).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with qgnn.compressed_activations():
        found = gradients()
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Training #############################################################################################################


def test_training_fits_what_one_level_cannot() -> None:
    """Signs of a linear map, which its binary form can learn: the loss falls to a tenth, with weights of two values."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 3)
    signs = torch.randn(3, 16).sign()
    x = torch.randn(400, 16)
    y = x @ signs.T
    model = qgnn.quantize_model(layer, config=qgnn.QuantConfig(bits=8, weight_bits=1))
    qgnn.calibrate(model, [(x,)], method="ranges")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(model.train()(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert torch.equal(model.weight_quantizer(model.weight).codes * 2 - 1, signs)
