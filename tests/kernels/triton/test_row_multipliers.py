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


@pytest.mark.parametrize("attention_bits", [2, 4, 8])
def test_attention_packs_rows(attention_bits: int) -> None:
    """The peak of a row, of a hub's as well, is found before the same values are packed."""
    plan = plan_of(star(40))
    m, words = multipliers(plan.num_src), words_of(plan.num_src, 20, 4)
    options = {"heads": 2, "attention_bits": attention_bits, "bias": torch.randn(20), "relu": True}
    options |= {"alpha_src": torch.randn(plan.num_src, 2), "alpha_dst": torch.randn(plan.num_dst, 2)}
    ends = torch.tensor([0.3]), torch.tensor([-0.4])
    for to in (output(4, 40.0), output(4, 40.0, 20), output(2, 40.0)):
        for given in (m, None):
            assert_same(
                lambda to=to, g=given: attention_aggregate(  # type: ignore[misc]
                    words, plan, *ends, 20, 4, multiplier=g, **options, **to
                )
            )


@pytest.mark.parametrize("bits", [2, 8])
def test_eight_bit_numerators_of_a_whole_segment(bits: int) -> None:
    """256 neighbours of the largest code, multiplier and numerator: their sums in place would pass 32 bits."""
    plan = plan_of(star(256))
    m = torch.full((plan.num_src,), LARGEST_MULTIPLIER, dtype=torch.uint8)
    words = pack_codes(torch.full((plan.num_src, 4), top_code(bits)), bits)
    alphas = {"alpha_src": torch.zeros(plan.num_src, 1), "alpha_dst": torch.zeros(plan.num_dst, 1)}
    ends = torch.tensor([0.3]), torch.tensor([-0.4])
    with override(attention=Config(segment=256)):
        assert_same(lambda: attention_aggregate(words, plan, *ends, 4, bits, attention_bits=8, multiplier=m, **alphas))


@pytest.mark.parametrize(("bits", "heads", "attention_bits"), [(2, 2, 4), (4, 3, 32), (8, 1, 8)])
def test_gatv2(bits: int, heads: int, attention_bits: int) -> None:
    """Logits are sums of floats, without a canonical order; ``att`` of powers of two and targets of zero leave one."""
    plan = plan_of(SMALL["isolated_nodes"]())
    m, words = multipliers(plan.num_src), words_of(plan.num_src, 24, bits)
    v2 = {"att": torch.randn(heads, 24 // heads).sign() / 64, "x_dst": torch.zeros(plan.num_dst, 24), "heads": heads}
    ends = torch.tensor([0.5]), torch.tensor([-1.0])
    assert_same(
        lambda: attention_aggregate(
            words, plan, *ends, 24, bits, attention_bits=attention_bits, multiplier=m, negative_slope=0.25, **v2
        ),
        exact=attention_bits < 32, tolerance=1e-4,
    )  # fmt: skip


def test_float_numerators() -> None:
    plan = plan_of(SMALL["erdos_renyi"]())
    m, words = multipliers(plan.num_src), words_of(plan.num_src, 24, 4)
    options = {"heads": 2, "alpha_src": torch.randn(plan.num_src, 2), "alpha_dst": torch.randn(plan.num_dst, 2)}
    for columns in (1, 24):
        ends = torch.rand(columns) + 0.1, torch.randn(columns)
        assert_same(
            lambda e=ends: attention_aggregate(  # type: ignore[misc]
                words, plan, *e, 24, 4, attention_bits=32, multiplier=m, **options
            ),
            exact=False,
        )


@pytest.mark.parametrize("out_bits", [0, 2, 4])
@pytest.mark.parametrize("channels", [20, 64])
def test_linear(channels: int, out_bits: int) -> None:
    x, w, m = words_of(9, 40, 4), words_of(channels, 40, 4), multipliers(9)
    ends = torch.tensor([0.3]), torch.tensor([-2.0]), torch.rand(channels), torch.randn(channels)
    more = {"row_scale": torch.rand(9), "addend": torch.randn(9, channels), "relu": True}
    for columns in (1, channels):
        to = output(out_bits, 4000.0, columns) if out_bits else {}
        for given in ({}, more):
            assert_same(
                lambda to=to, given=given: linear(  # type: ignore[misc]
                    x, w, *ends, 40, 4, 4, multiplier=m, bias=torch.arange(float(channels)), **to, **given
                )
            )


def test_linear_rows_in_several_chunks_or_too_wide() -> None:
    """Rows of weights that are not kept, and rows of output that no program holds."""
    m = multipliers(5)
    with override(linear_rows=Config(block_m=16, block_n=64, block_k=64)):
        for features, channels in ((200, 40), (16, 200), (16, 600)):
            x, w = words_of(5, features, 2), words_of(channels, features, 2)
            ends = torch.tensor([0.3]), torch.tensor([-0.4]), torch.rand(channels), torch.randn(channels)
            to = output(2, 100.0)
            assert_same(
                lambda x=x, w=w, e=ends, f=features, to=to: linear(  # type: ignore[misc]
                    x, w, *e, f, 2, 2, multiplier=m, **to
                )
            )


def test_weighted() -> None:
    plan = plan_of(SMALL["power_law"]())
    words, m, weight = words_of(plan.num_src, 40, 4), multipliers(plan.num_src), torch.randn(plan.num_edges)
    for columns in (1, 40):
        ends = torch.rand(columns) + 0.1, torch.randn(columns)
        assert_same(
            lambda e=ends: aggregate(words, plan, *e, 40, 4, multiplier=m, edge_weight=weight),  # type: ignore[misc]
            exact=False, tolerance=1e-4,
        )  # fmt: skip
