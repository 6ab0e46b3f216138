"""The range search against every range of its grid, and on data that defeat a squared error."""

import pytest
import torch
from torch import Tensor

from qgnn_plugin.quantizers.range_search import GRID, MAX_SAMPLES, search_range, subsample

QMAX = (3, 15, 255)
KINDS = ("normal", "heavy tails", "non-negative", "shifted", "one outlier")


def fit_error(x: Tensor, scale: Tensor, lower: Tensor, qmax: int) -> Tensor:
    """Mean-squared error per row, in float64."""
    x, scale, lower = x.double(), scale.double().unsqueeze(1), lower.double().unsqueeze(1)
    codes = torch.floor((x - lower) / scale + 0.5).clamp(0, qmax)
    return (codes * scale + lower - x).square().mean(1)


def grid(x: Tensor, qmax: int, zero_code: float | None) -> list[tuple[Tensor, Tensor]]:
    """Every candidate ``(scale, lower)``; the last one is min/max."""
    low, high = x.double().amin(1), x.double().amax(1)
    out = []
    for step in range(1, GRID + 1):
        alpha = step / GRID
        if zero_code is None:
            out.append((alpha * (high - low) / qmax, alpha * low))
        else:
            below = -low / zero_code if zero_code else torch.zeros_like(low)
            scale = alpha * torch.maximum(below, high / (qmax - zero_code))
            out.append((scale, -zero_code * scale))
    return out


def samples(kind: str) -> Tensor:
    x = torch.randn(5, 400)
    return {
        "normal": x,
        "heavy tails": x * x.abs() ** 2,
        "non-negative": x.relu(),
        "shifted": x - 7,
        "one outlier": torch.cat([x, torch.full((5, 1), 50.0)], 1),
    }[kind]


@pytest.mark.parametrize("qmax", QMAX)
@pytest.mark.parametrize("levels", ["free", "zero at 0", "zero at Q/2", "zero at (Q + 1)/2"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_range_of_the_grid_is_better(qmax: int, levels: str, kind: str) -> None:
    zero_code = {"free": None, "zero at 0": 0.0, "zero at Q/2": qmax / 2}.get(
        levels, (qmax + 1) / 2
    )
    x = samples(kind)
    if zero_code == 0.0:
        x = x.abs()
    scale, lower = search_range(x, qmax, zero_code)
    assert scale.shape == lower.shape == (5,)
    found = fit_error(x, scale, lower, qmax)
    for other in grid(x, qmax, zero_code):
        assert (found <= fit_error(x, *other, qmax) * (1 + 1e-4) + 1e-12).all()


def test_clipping_an_outlier_beats_min_max() -> None:
    x = torch.cat([torch.randn(1, 4000), torch.full((1, 1), 40.0)], 1)
    scale, lower = search_range(x, 3, None)
    minmax = grid(x, 3, None)[-1]
    assert fit_error(x, scale, lower, 3).item() < 0.5 * fit_error(x, *minmax, 3).item()


@pytest.mark.parametrize("zero_code", [None, 0.0, 7.5])
@pytest.mark.parametrize("exponent", [-60, -20, 0, 20, 60, 100, 120])
def test_result_scales_with_the_data(zero_code: float | None, exponent: int) -> None:
    """Bitwise for a power of two, also where a squared error overflows or vanishes in float32."""
    x = torch.randn(3, 200) if zero_code != 0.0 else torch.rand(3, 200)
    scale, lower = search_range(x, 15, zero_code)
    factor = 2.0**exponent
    scaled, shifted = search_range(x * factor, 15, zero_code)
    assert torch.equal(scaled, scale * factor)
    assert torch.equal(shifted, lower * factor)


def test_rows_do_not_disturb_each_other() -> None:
    x = torch.randn(3, 100)
    mixed = torch.stack([x[0] * 1e30, x[1], x[2] * 1e-20])
    scale, lower = search_range(mixed, 15, None)
    for row in range(3):
        alone = search_range(mixed[row : row + 1], 15, None)
        assert torch.equal(scale[row], alone[0][0])
        assert torch.equal(lower[row], alone[1][0])
    relative = fit_error(mixed, scale, lower, 15).sqrt() / mixed.double().square().mean(1).sqrt()
    assert (relative < 0.1).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e30, -1e30, 1e-40])
@pytest.mark.parametrize("zero_code", [None, 2.0])
def test_constant_rows_are_represented(value: float, zero_code: float | None) -> None:
    x = torch.full((2, 10), value)
    scale, lower = search_range(x, 3, zero_code)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert fit_error(x, scale, lower, 3).sqrt().max().item() <= 1e-6 * abs(value) + 1e-30


def test_subsample_is_bounded_and_keeps_extremes() -> None:
    x = torch.randn(4, MAX_SAMPLES)
    x[:, 1], x[:, 3] = -100.0, 100.0
    thin = subsample(x)
    assert thin.numel() <= MAX_SAMPLES + 4 * (2 + 1)
    assert torch.equal(thin.amin(1), x.amin(1))
    assert torch.equal(thin.amax(1), x.amax(1))
    short = torch.randn(2, 100)
    assert subsample(short) is short


def test_many_rows_keep_enough_samples_each() -> None:
    assert subsample(torch.randn(4096, 300)).size(1) >= 150


def test_float64_is_searched_in_float64() -> None:
    x = torch.randn(1, 50, dtype=torch.float64) * 1e200
    scale, _ = search_range(x, 15, None)
    assert scale.dtype == torch.float64
    assert scale.isfinite().all()
