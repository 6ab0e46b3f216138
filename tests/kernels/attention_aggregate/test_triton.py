"""attention_aggregate against its reference: GAT, GATv2, quantized and float numerators."""

import pytest
import torch
from triton_support import SMALL, assert_same, plan_of, ranges

from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.attention_aggregate.triton import attention_hub_kernel
from qgnn_plugin.kernels.layout import pack_codes, row_words
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.triton import launch


def inputs(plan: GraphPlan, features: int, heads: int, bits: int, kind: str = "column"):  # type: ignore[no-untyped-def]
    words = pack_codes(torch.randint(0, 2**bits, (plan.num_src, features)), bits)
    gat = {
        "heads": heads, "alpha_src": torch.randn(plan.num_src, heads),
        "alpha_dst": torch.randn(plan.num_dst, heads),
    }  # fmt: skip
    return (words, plan, *ranges(kind, plan.num_src, features), features, bits), gat


@pytest.mark.parametrize(
    ("bits", "features", "heads", "attention_bits"),
    [(2, 32, 4, 4), (4, 24, 3, 2), (4, 15, 5, 8), (8, 33, 1, 4), (1, 16, 2, 4), (8, 16, 2, 4)],
)
def test_quantized_numerators_are_exact(bits: int, features: int, heads: int, attention_bits: int) -> None:
    args, gat = inputs(plan_of(SMALL["erdos_renyi"]()), features, heads, bits)
    assert_same(lambda: attention_aggregate(*args, attention_bits=attention_bits, **gat))


@pytest.mark.parametrize("name", ["isolated_nodes", "self_loops", "no_edges", "no_nodes"])
def test_small_graphs(name: str) -> None:
    args, gat = inputs(plan_of(SMALL[name]()), 12, 2, 4)
    assert_same(lambda: attention_aggregate(*args, attention_bits=4, **gat))
    assert_same(lambda: attention_aggregate(*args, **gat), exact=False)


@pytest.mark.parametrize("kind", ["tensor", "row"])
def test_float_numerators(kind: str) -> None:
    plan = plan_of(SMALL["erdos_renyi"]())
    args, gat = inputs(plan, 32, 4, 4, kind)
    edge = torch.randn(plan.num_edges, 4)
    assert_same(lambda: attention_aggregate(*args, alpha_edge=edge, **gat), exact=False)


def test_gatv2() -> None:
    plan = plan_of(SMALL["isolated_nodes"]())
    args, _ = inputs(plan, 24, 3, 4)
    v2 = {"att": torch.randn(3, 8), "x_dst": torch.randn(plan.num_dst, 24)}
    assert_same(lambda: attention_aggregate(*args, heads=3, **v2), exact=False, tolerance=1e-4)


def test_mean_of_heads_and_packed_output() -> None:
    plan = plan_of(SMALL["self_loops"]())
    args, gat = inputs(plan, 16, 2, 4)
    gat |= {"attention_bits": 4, "relu": True}
    assert_same(lambda: attention_aggregate(*args, concat=False, bias=torch.ones(8), **gat), exact=False)
    out = {"out_scale": torch.tensor(0.2), "out_offset": torch.tensor(-0.5), "out_bits": 4}
    assert_same(lambda: attention_aggregate(*args, bias=torch.ones(16), **gat, **out))


def test_a_hub_whose_sums_pass_32_bits() -> None:
    """34,000 neighbours at 8 x 8 bits, the second stage alone: its first has a segment of 256 in every slot."""
    segments, top = 133, 255
    width, device = row_words(4, 8), torch.device("cpu")
    slots = torch.full((segments, 4), 256 * top * top, dtype=torch.int32)
    shares = torch.full((segments, 1), 256 * top, dtype=torch.int32)
    one, out = torch.ones(1, dtype=torch.int32), torch.empty(1, 4)
    launch.launch(
        attention_hub_kernel, (1,), device, torch.cat([slots.view(-1), shares.view(-1)]), 0 * one, 0 * one,
        segments * one, torch.ones(1), torch.zeros(1), None, None, None, None, out, None, segments, F=4, W=width,
        BITS=8, SLOTS=4, WORDS=width, HEADS=1, HEAD_TILE=1, ALIGNED=True, INTEGER=True, SCALE=0, OFFSET=0, RELU=False,
        PACK=False, OUT_SCALE=0, OUT_OFFSET=0, MULTIPLIED=False, LARGEST=15,
    )  # fmt: skip
    assert out.tolist() == [[255.0] * 4]
