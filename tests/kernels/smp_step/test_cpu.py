"""``smp_step`` on the CPU against its reference."""

from typing import Any

import pytest
import torch
from cpu_support import assert_equal, output_range, plan_of, random_range, random_words
from torch import Tensor

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.smp_step import smp_step, step_factors

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("multiplier", [0.0, 0.3])
@pytest.mark.parametrize("bits", [0, 2, 4])
def test_smp_step(bits: int, multiplier: float) -> None:
    plan, width = plan_of("power_law"), 33
    h, x0 = torch.randn(2, plan.num_src, width)
    norm = plan.degree.clamp(min=1).rsqrt()
    options: dict[str, Any] = {"eta": 0.1, "mu": 9.0, "multiplier": multiplier, "measure": True}
    if bits:
        span = random_range("tensor", plan.num_src, width)
        options |= span | {"words": random_words(plan.num_src, width, bits), "bits": bits}

    def step() -> tuple[Tensor, ...]:
        return smp_step(h, x0, plan, norm, **options)

    assert_equal(step, tolerance=1e-5)
    packed = output_range("tensor", plan.num_src, width, 4, 2.0)
    out, words, _ = smp_step(h, x0, plan, norm, **options, **packed)
    span = {"scale": packed["out_scale"], "offset": packed["out_offset"]}
    from qgnn_plugin.kernels.quantize_pack import quantize_pack

    assert torch.equal(words, quantize_pack(out * norm.view(-1, 1), **span, bits=4))


@pytest.mark.parametrize("multiplier", [0.0, 0.3])
def test_smp_step_by_blocks(multiplier: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows change nothing, the partial sums included."""
    plan, width = plan_of("power_law"), 33
    h, x0 = torch.randn(2, plan.num_src, width)
    norm = plan.degree.clamp(min=1).rsqrt()
    packed = output_range("column", plan.num_src, width, 4, 2.0)
    span = random_range("tensor", plan.num_src, width) | {"words": random_words(plan.num_src, width, 4), "bits": 4}
    for messages in ({}, span):
        results = []
        for floats in (1 << 20, 64 * width):
            monkeypatch.setattr("qgnn_plugin.kernels.smp_step.cpu.CACHED_FLOATS", floats)
            with use_backend("cpu"):
                results.append(
                    smp_step(h, x0, plan, norm, eta=0.1, mu=4.0, multiplier=multiplier, **messages, **packed)
                )
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.15, 0.2, 0.3, 1.0])
def test_factors_of_an_appnp_step_are_exact(alpha: float) -> None:
    assert step_factors(alpha, (1 - alpha) / alpha, 0.0) == (0.0, 1 - alpha, 0.0)
    assert step_factors(alpha, 1 / alpha - 1, 0.0)[:2] == (0.0, 1 - alpha)


def test_smp_step_is_an_appnp_step() -> None:
    """docs/smoothness.md: with mu = 9 and eta = 0.1 the teleport probability is 0.1."""
    plan = plan_of("self_loops")
    h, x0 = torch.randn(2, plan.num_src, 8)
    norm = plan.degree.rsqrt()
    dense = torch.zeros(plan.num_dst, plan.num_src)
    dense.index_put_((plan.dst, plan.col.long()), torch.ones(()), accumulate=True)
    expected = 0.9 * (norm.view(-1, 1) * dense * norm) @ h + 0.1 * x0
    out, _, _ = smp_step(h, x0, plan, norm, eta=0.1, mu=9.0)
    torch.testing.assert_close(out, expected)
