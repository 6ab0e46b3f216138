"""Rows with integer multipliers on Triton: exact sums, and packed results with multipliers of their own."""

from typing import Any

import pytest
import torch
from graphs import star
from triton_support import SMALL, assert_same, plan_of

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.layout import pack_codes, top_code
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.triton.launch import Config, override
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize


def words_of(rows: int, features: int, bits: int) -> torch.Tensor:
    return pack_codes(torch.randint(0, 2**bits, (rows, features)), bits)


def multipliers(rows: int) -> torch.Tensor:
    return torch.randint(1, LARGEST_MULTIPLIER + 1, (rows,), dtype=torch.uint8)


def output(bits: int, spread: float, features: int = 1) -> dict[str, Any]:
    step = (torch.rand(features) + 0.5) * spread / top_code(bits) / 4
    return {
        "out_scale": step, "out_offset": -step * top_code(bits) / 2, "out_bits": bits,
        "out_unit": torch.tensor([spread / 6]),
    }  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("features", [7, 64, 100])
def test_quantize(features: int, bits: int) -> None:
    x = torch.randn(9, features) * torch.rand(9, 1).exp2() * 3
    x[1, 0], x[2, 3] = float("nan"), float("inf")
    for columns in (1, features):
        to = output(bits, 6.0, columns)
        args = to["out_scale"], to["out_offset"], bits
        assert_same(lambda a=args, u=to["out_unit"]: quantize_pack(x, *a, u))  # type: ignore[misc]
        words, m = quantize_pack(x, *args, to["out_unit"])
        assert_same(lambda a=args, w=words, m=m: unpack_dequantize(w, *a[:2], features, bits, m))  # type: ignore[misc]


@pytest.mark.parametrize("name", SMALL)
def test_every_graph(name: str) -> None:
    plan = plan_of(SMALL[name]())
    m = multipliers(plan.num_src)
    for bits, features in ((4, 33),):
        words = words_of(plan.num_src, features, bits)
        ends = torch.rand(features) + 0.1, torch.randn(features)
        assert_same(lambda w=words, e=ends, f=features, b=bits: aggregate(w, plan, *e, f, b, multiplier=m))  # type: ignore[misc]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_sums(bits: int) -> None:
    plan = plan_of(SMALL["power_law"]())
    m, features = multipliers(plan.num_src), 40
    words = words_of(plan.num_src, features, bits)
    epilogue = {"dst_scale": torch.randn(plan.num_dst), "bias": torch.randn(features), "relu": True}
    for to in (output(bits, 40.0), output(bits, 40.0, features), output(4, 40.0)):
        for given in (m, None):
            assert_same(
                lambda to=to, g=given: aggregate(  # type: ignore[misc]
                    words, plan, torch.tensor([0.3]), torch.tensor([-0.4]), features, bits, multiplier=g, **epilogue,
                    **to,
                )
            )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4])
def test_hubs(bits: int) -> None:
    """A row in segments, whose multipliers are summed on the way and whose own is found at the end."""
    plan = plan_of(star(300))
    m = multipliers(plan.num_src)
    words = words_of(plan.num_src, 12, bits)
    ends = torch.tensor([0.3]), torch.tensor([-0.4])
    with override(**{f"aggregate_{mode}": Config(segment=64) for mode in ("sum", "weighted")}):
        assert_same(lambda: aggregate(words, plan, *ends, 12, bits, multiplier=m))
        to = output(bits, 500.0)
        assert_same(lambda: aggregate(words, plan, *ends, 12, bits, multiplier=m, **to))
    alphas = {"alpha_src": torch.zeros(plan.num_src, 1), "alpha_dst": torch.zeros(plan.num_dst, 1)}
    with override(attention=Config(segment=64)):
        assert_same(
            lambda: attention_aggregate(words, plan, *ends, 12, bits, attention_bits=4, multiplier=m, **alphas)
        )


@pytest.mark.parametrize("attention_bits", [2, 4, 8])
@pytest.mark.parametrize(("features", "heads"), [(40, 1), (64, 4), (15, 3)])
def test_attention(features: int, heads: int, attention_bits: int) -> None:
    plan = plan_of(SMALL["erdos_renyi"]())
    m = multipliers(plan.num_src)
    for bits in (2, 4, 8):
        words = words_of(plan.num_src, features, bits)
        options = {
            "heads": heads, "attention_bits": attention_bits, "multiplier": m,
            "alpha_src": torch.randn(plan.num_src, heads), "alpha_dst": torch.randn(plan.num_dst, heads),
        }  # fmt: skip
        ends = torch.rand(features) + 0.1, torch.randn(features)
        for to in ({}, output(bits, 8.0)):
            assert_same(
                lambda w=words, b=bits, o=options, e=ends, to=to: attention_aggregate(  # type: ignore[misc]
                    w, plan, *e, features, b, **o, **to
                )
            )


@pytest.mark.parametrize("out_bits", [0, 2, 4])
def test_linear(out_bits: int) -> None:
    x, w, m = words_of(9, 40, 4), words_of(20, 40, 4), multipliers(9)
    to = output(out_bits, 4000.0) if out_bits else {}
    ends = torch.tensor([0.3]), torch.tensor([-2.0]), torch.rand(20), torch.randn(20)
    assert_same(lambda: linear(x, w, *ends, 40, 4, 4, multiplier=m, bias=torch.arange(20.0), **to))


def test_weighted() -> None:
    plan = plan_of(SMALL["power_law"]())
    words, m, weight = words_of(plan.num_src, 40, 4), multipliers(plan.num_src), torch.randn(plan.num_edges)
    for columns in (1, 40):
        ends = torch.rand(columns) + 0.1, torch.randn(columns)
        assert_same(
            lambda e=ends: aggregate(words, plan, *e, 40, 4, multiplier=m, edge_weight=weight),  # type: ignore[misc]
            exact=False, tolerance=1e-4,
        )  # fmt: skip
