"""``attention_aggregate`` on the CPU against its reference."""

from typing import Any

import pytest
import torch
from cpu_support import assert_equal, output_range, plan_of, random_range, random_words
from torch import Tensor

from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER, attention_thresholds
from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.cpu.weighted import head_table
from qgnn_plugin.kernels.layout import pack_codes, parts_per_byte, row_bytes, top_code
from qgnn_plugin.kernels.plan import GraphPlan

pytestmark = pytest.mark.usefixtures("poison_empty")
SHAPES = [(1, 7), (4, 16), (8, 8), (3, 5)]


def gat(plan: GraphPlan, heads: int) -> dict[str, Any]:
    source, target = torch.randn(plan.num_src, heads), torch.randn(plan.num_dst, heads)
    return {"heads": heads, "alpha_src": 2 * source, "alpha_dst": 2 * target}


def message_range(kind: str, rows: int, width: int, heads: int) -> dict[str, Tensor]:
    if kind == "head":
        return {"scale": torch.rand(rows, heads) + 0.1, "offset": torch.randn(rows, heads)}
    return random_range(kind, rows, width)


@pytest.mark.parametrize("attention_bits", [2, 4, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("graph", ["power_law", "isolated_nodes", "no_edges", "star"])
def test_quantized_numerators_are_exact(graph: str, bits: int, attention_bits: int) -> None:
    plan = plan_of(graph)
    for heads, channels in SHAPES[:1] if graph == "star" else SHAPES:
        width = heads * channels
        words = random_words(plan.num_src, width, bits)
        options = gat(plan, heads) | random_range("column", plan.num_src, width)
        options.update(num_features=width, bits=bits, attention_bits=attention_bits)
        assert_equal(attention_aggregate, words, plan, **options)
        packed = output_range("column", plan.num_dst, width, bits, 2.0)
        bias = torch.randn(width)
        assert_equal(attention_aggregate, words, plan, **options, **packed, bias=bias, relu=True)


@pytest.mark.parametrize(
    ("bits", "heads", "channels", "attention_bits", "multiplied"),
    [(4, 4, 16, 8, True), (2, 1, 41, 4, False), (8, 8, 12, 8, True), (2, 2, 80, 2, True), (4, 3, 5, 8, True)],
)
@pytest.mark.parametrize("graph", ["power_law", "isolated_nodes", "no_edges", "star"])
def test_numerators_of_pairs_are_exact(
    graph: str, bits: int, heads: int, channels: int, attention_bits: int, multiplied: bool
) -> None:
    """Logits of GATv2 that are multiples of a power of two: exact in every order of their sums."""
    plan, width = plan_of(graph), heads * channels
    words = random_words(plan.num_src, width, bits)
    options: dict[str, Any] = {
        "scale": 2.0 ** -torch.randint(0, 3, (width,)), "offset": torch.randint(-8, 8, (width,)) / 4,
        "att": torch.randint(-1, 2, (heads, channels)) * 2.0 ** (-bits - 2),
        "x_dst": torch.randint(-80, 80, (plan.num_dst, width)) / 4, "negative_slope": 0.25,
    }  # fmt: skip
    if multiplied:
        options["multiplier"] = torch.randint(1, LARGEST_MULTIPLIER + 1, (plan.num_src,), dtype=torch.uint8)
    options.update(heads=heads, num_features=width, bits=bits, attention_bits=attention_bits)
    assert_equal(attention_aggregate, words, plan, **options)
    assert_equal(attention_aggregate, words, plan, tolerance=1e-6, **options, concat=False)


@pytest.mark.parametrize(("heads", "channels"), SHAPES)
@pytest.mark.parametrize("kind", ["tensor", "row", "head"])
@pytest.mark.parametrize("form", ["gat", "gat with edges", "gatv2"])
def test_float_numerators(form: str, kind: str, heads: int, channels: int) -> None:
    plan, width, bits = plan_of("power_law"), heads * channels, 4
    words = random_words(plan.num_src, width, bits)
    options: dict[str, Any] = gat(plan, heads)
    if form == "gat with edges":
        options["alpha_edge"] = torch.randn(plan.num_edges, heads)
    if form == "gatv2":
        att, x_dst = torch.randn(heads, channels) / 2, torch.randn(plan.num_dst, width)
        options = {"heads": heads, "att": att, "x_dst": x_dst}
    options |= message_range(kind, plan.num_src, width, heads)
    for concat in (True, False):
        assert_equal(
            attention_aggregate, words, plan, tolerance=1e-5, **options, num_features=width, bits=bits, concat=concat
        )


@pytest.mark.parametrize("attention_bits", [2, 32])
def test_a_range_per_row_and_head_is_heads_apart(attention_bits: int) -> None:
    """Each head alone, with a range per row, gives the same."""
    plan, heads, channels, bits = plan_of("power_law"), 3, 5, 4
    codes = torch.randint(0, top_code(bits) + 1, (plan.num_src, heads, channels))
    options = gat(plan, heads)
    span = message_range("head", plan.num_src, heads * channels, heads)
    shared = {"bits": bits, "attention_bits": attention_bits}
    together = attention_aggregate(
        pack_codes(codes.flatten(1), bits), plan, **span, num_features=heads * channels, **shared, **options
    )
    for h in range(heads):
        column = slice(h, h + 1)
        alone = attention_aggregate(
            pack_codes(codes[:, h], bits), plan, span["scale"][:, column], span["offset"][:, column], channels, bits,
            attention_bits=attention_bits, alpha_src=options["alpha_src"][:, column],
            alpha_dst=options["alpha_dst"][:, column],
        )  # fmt: skip
        torch.testing.assert_close(together[:, h * channels : (h + 1) * channels], alone)


@pytest.mark.parametrize(
    ("features", "bits", "heads", "shared"), [(160, 2, 4, True), (256, 4, 4, True), (15, 2, 3, False)]
)
def test_lanes_past_a_row_do_not_split_a_head(features: int, bits: int, heads: int, shared: bool) -> None:
    """One weight serves sixteen lanes where those that hold a feature are of one head."""
    table, lanewise = head_table(features, bits, heads)
    assert (lanewise is None) == shared
    width = row_bytes(features, bits)
    for feature in range(features):
        part, byte = divmod(feature, width)
        tile, lane = divmod(byte, 64)
        at = (tile * parts_per_byte(bits) + part) * 64 + lane
        assert table[at] == feature // (features // heads)


def test_sums_past_an_int32() -> None:
    """100,001 equal logits over full 8-bit codes: sum k c is 6.5e9."""
    degree, width = 100_001, 5
    words = pack_codes(torch.full((2, width), top_code(8)), 8)
    col = torch.zeros(degree, dtype=torch.int32)
    plan = GraphPlan(torch.tensor([0, degree, degree]), col, 2)
    logits = torch.zeros(2, 1)
    out = attention_aggregate(
        words, plan, torch.ones(1), torch.zeros(1), width, 8,
        attention_bits=8, alpha_src=logits, alpha_dst=logits,
    )  # fmt: skip
    torch.testing.assert_close(out, torch.tensor([[255.0], [0.0]]).expand(2, width))


@pytest.mark.parametrize("attention_bits", [4, 8])
def test_logits_at_a_threshold_and_just_below_it(attention_bits: int) -> None:
    """Every numerator by itself: the only message is that of one source, whose weight is then the output."""
    levels = attention_thresholds(attention_bits)
    below = torch.nextafter(levels, torch.tensor(-torch.inf))
    logits = torch.cat([levels, below, torch.tensor([0.0, -1e-30, -1e30])])
    count, top = logits.numel(), top_code(attention_bits)
    numerators = torch.cat([torch.arange(1, top + 1), torch.arange(top), torch.tensor([top, top, 0])])
    # Row i has edges from source i, the only one with a code, and from the last source, whose logit is 0.
    col = torch.stack([torch.arange(count), torch.full((count,), count)], 1).reshape(-1).to(torch.int32)
    plan = GraphPlan(torch.arange(0, 2 * count + 1, 2), col, count + 1)
    codes = torch.ones(count + 1, 4)
    codes[-1] = 0
    out = attention_aggregate(
        pack_codes(codes.long(), 8), plan, torch.ones(1), torch.zeros(1), 4, 8, heads=1, attention_bits=attention_bits,
        negative_slope=1.0, alpha_src=torch.cat([logits, torch.zeros(1)]).unsqueeze(1), alpha_dst=torch.zeros(count, 1),
    )  # fmt: skip
    torch.testing.assert_close(out, (numerators / (numerators + top)).unsqueeze(1).expand(count, 4))


@pytest.mark.parametrize("edges", [3, 256, 700])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_weights_and_codes(bits: int, edges: int) -> None:
    """All numerators, multipliers and codes at their largest: every digit of every sum is in use."""
    heads, width = 4, 64
    words = pack_codes(torch.full((edges, width), top_code(bits)), bits)
    plan = GraphPlan(torch.tensor([0, edges, edges]), torch.arange(edges, dtype=torch.int32), edges)
    out = attention_aggregate(
        words, plan, torch.full((1,), 0.5), torch.full((1,), -3.0), width, bits, heads=heads, attention_bits=8,
        alpha_src=torch.zeros(edges, heads), alpha_dst=torch.zeros(2, heads),
        multiplier=torch.full((edges,), LARGEST_MULTIPLIER, dtype=torch.uint8),
    )  # fmt: skip
    expected = LARGEST_MULTIPLIER * (0.5 * top_code(bits) - 3.0)
    torch.testing.assert_close(out[0], torch.full((width,), expected), rtol=1e-6, atol=0)
    assert not out[1:].any()


def test_attention_errors() -> None:
    plan = plan_of("erdos_renyi")
    words, one = random_words(plan.num_src, 40, 2), torch.ones(1)
    with pytest.raises(ValueError, match="'heads' to divide 40 features"):
        attention_aggregate(words, plan, one, one, 40, 2, heads=3)
    heads = torch.ones(plan.num_src, 4)
    with pytest.raises(ValueError, match=r"\[60, 1\] \(got \[60, 4\]\)"):
        attention_aggregate(words, plan, heads, heads, 40, 2, **gat(plan, 2))
    with pytest.raises(ValueError, match="'attention_bits' to be 2, 4, 8 or 32"):
        attention_aggregate(words, plan, one, one, 40, 2, attention_bits=3)
    with pytest.raises(ValueError, match="either 'alpha_src' and 'alpha_dst'"):
        attention_aggregate(words, plan, one, one, 40, 2, **gat(plan, 1), att=torch.ones(1, 40))
    with pytest.raises(ValueError, match=r"'alpha_src' of shape \[60, 4\]"):
        attention_aggregate(words, plan, one, one, 40, 2, **(gat(plan, 1) | {"heads": 4}))
