"""Rows with an integer multiplier: exact sums, packed results with multipliers of their own."""

from typing import Any

import pytest
import torch
from cpu_support import WIDTHS, assert_equal, plan_of, random_range, random_words, threads
from graphs import GRAPHS

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import PACKED_BITS, pack_codes, top_code, unpack_codes
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize

pytestmark = pytest.mark.usefixtures("poison_empty")


def random_multipliers(rows: int) -> torch.Tensor:
    return torch.randint(1, LARGEST_MULTIPLIER + 1, (rows,), dtype=torch.uint8)


def output(kind: str, features: int, bits: int, spread: float) -> dict[str, Any]:
    """Where packed results with multipliers go: codes and multipliers that vary for results of about ``spread``."""
    step = (torch.rand(1 if kind == "tensor" else features) + 0.5) * spread / top_code(bits) / 4
    unit = torch.tensor([spread / 6])
    return {"out_scale": step, "out_offset": -step * top_code(bits) / 2, "out_bits": bits, "out_unit": unit}


# -- quantize and dequantize -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "cpu", "interpret"])
def test_multipliers_of_rows(backend: str) -> None:
    """``clamp(ceil(peak / p), 1, 15)``; NaN counts as nothing, infinity as the most there is."""
    unit, inf, nan = torch.tensor(0.5), float("inf"), float("nan")
    peaks = [0.0, 0.5, 0.50001, 1.0, 7.0, 7.4, 7.6, 1e30, inf, nan]
    x = torch.zeros(len(peaks), 19)
    x[torch.arange(len(peaks)), torch.arange(len(peaks)) * 2] = torch.tensor(peaks) * torch.tensor([1.0, -1.0] * 5)
    before = x.clone()
    with use_backend(backend):
        _, m = quantize_pack(x, torch.ones(1), torch.zeros(1), 2, unit)
    assert m.dtype is torch.uint8
    assert m.tolist() == [1, 1, 2, 2, 14, 15, 15, 15, 15, 1]
    assert torch.equal(x, before) or x.isnan().any()


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("kind", ["tensor", "column"])
def test_quantize(kind: str, bits: int) -> None:
    for width in WIDTHS:
        x = torch.randn(50, width) * torch.rand(50, 1).exp2() * 3
        to = output(kind, width, bits, 6.0)
        args = (to["out_scale"], to["out_offset"], bits)
        assert_equal(quantize_pack, x, *args, to["out_unit"])
        words, m = quantize_pack(x, *args, to["out_unit"])
        assert len(m.unique()) > 3
        assert_equal(unpack_dequantize, words, to["out_scale"], to["out_offset"], width, bits, m)
        if kind == "tensor":  # a row is quantized as one of the range s m, l m
            scale, offset = (value * m.float().view(-1, 1) for value in args[:2])
            assert torch.equal(words, quantize_pack(x, scale, offset, bits))
            expected = unpack_dequantize(words, scale, offset, width, bits)
            assert torch.equal(unpack_dequantize(words, *args[:2], width, bits, m), expected)


# -- sums ------------------------------------------------------------------------------------------------------------


def integer_sums(plan: GraphPlan, codes: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum m c`` and ``sum m`` by row of the graph, int64, edge by edge."""
    total = torch.zeros(plan.num_dst, codes.size(1), dtype=torch.int64)
    mass = torch.zeros(plan.num_dst, 1, dtype=torch.int64)
    for i in range(plan.num_dst):
        sources = plan.col[plan.rowptr[i] : plan.rowptr[i + 1]].long()
        total[i] = (codes[sources].long() * m[sources].long().view(-1, 1)).sum(0)
        mass[i] = m[sources].long().sum()
    return total, mass


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_sum(graph: str, bits: int) -> None:
    plan = plan_of(graph)
    m = random_multipliers(plan.num_src)
    for width in WIDTHS:
        words = random_words(plan.num_src, width, bits)
        for kind in ("tensor", "column"):
            source = random_range(kind, plan.num_src, width)
            assert_equal(aggregate, words, plan, **source, num_features=width, bits=bits, multiplier=m)
        total, mass = integer_sums(plan, unpack_codes(words, width, bits), m)
        with use_backend("cpu"):
            one, zero = torch.ones(1), torch.zeros(1)
            assert torch.equal(aggregate(words, plan, one, zero, width, bits, multiplier=m), total.float())
            sums = aggregate(words, plan, one, one, width, bits, multiplier=m)
            assert torch.equal(sums, total.float() + mass.float())


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("degree", [3, 4, 5, 257, 4097, 300_003])
def test_no_lane_overflows(degree: int, bits: int) -> None:
    """The largest codes at the largest multipliers, over every degree at which something may be flushed."""
    width = 19
    words = pack_codes(torch.full((3, width), top_code(bits)), bits)
    col = torch.arange(degree, dtype=torch.int32) % 3
    plan = GraphPlan(torch.tensor([0, 0, degree, degree]), col, 3)
    m = torch.full((3,), LARGEST_MULTIPLIER, dtype=torch.uint8)
    with use_backend("cpu"):
        out = aggregate(words, plan, torch.ones(1), torch.zeros(1), width, bits, multiplier=m)
    total = float(torch.tensor(degree * top_code(bits) * LARGEST_MULTIPLIER, dtype=torch.float32))
    assert torch.equal(out, torch.tensor([[0.0], [total], [0.0]]).expand(3, width))


def test_more_edges_than_integers_hold_are_refused() -> None:
    """``deg * 15 * 255`` has to fit 31 bits; without multipliers as many edges are fine."""
    degree = (2**31 - 1) // (255 * LARGEST_MULTIPLIER) + 1
    plan = GraphPlan(torch.tensor([0, degree]), torch.zeros(degree, dtype=torch.int32), 1)
    words, one, zero = pack_codes(torch.full((1, 4), 255), 8), torch.ones(1), torch.zeros(1)
    m = torch.full((1,), LARGEST_MULTIPLIER, dtype=torch.uint8)
    with pytest.raises(ValueError, match="edges into a node at 8 bits with row multipliers"):
        aggregate(words, plan, one, zero, 4, 8, multiplier=m)
    with use_backend("cpu"):
        assert torch.equal(aggregate(words, plan, one, zero, 4, 8), torch.full((1, 4), float(degree * 255)))
        m[:] = 1
        words = pack_codes(torch.full((1, 4), 15), 4)
        out = aggregate(words, plan, one, zero, 4, 4, multiplier=m)
    assert torch.equal(out, torch.full((1, 4), float(degree * 15)))


@pytest.mark.parametrize("out_bits", PACKED_BITS)
@pytest.mark.parametrize("bits", [2, 4])
def test_packed_sums(bits: int, out_bits: int) -> None:
    """Multipliers in and out, every part of the epilogue, one range or one per column."""
    plan = plan_of("power_law")
    m = random_multipliers(plan.num_src)
    for width, kind in ((7, "column"), (64, "tensor"), (100, "tensor"), (256, "tensor")):
        words = random_words(plan.num_src, width, bits)
        source = {"scale": torch.rand(1) + 0.1, "offset": torch.randn(1)}
        common = {"num_features": width, "bits": bits, **source, **output(kind, width, out_bits, 40.0)}
        assert_equal(aggregate, words, plan, **common, multiplier=m)
        assert_equal(aggregate, words, plan, **common)  # multipliers out alone
        rest = {"dst_scale": torch.randn(plan.num_dst), "bias": torch.randn(width), "relu": True}
        assert_equal(aggregate, words, plan, **common, **rest, multiplier=m, reduce="mean")
        positive = {"dst_scale": torch.rand(plan.num_dst)}
        assert_equal(aggregate, words, plan, **common, **positive, multiplier=m)
        _, found = aggregate(words, plan, **common, multiplier=m)
        assert len(found.unique()) > 3


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("heads", "width"), [(None, 40), (4, 64), (3, 15)])
def test_weighted_sums(heads: int | None, width: int, bits: int) -> None:
    plan = plan_of("power_law")
    words, m = random_words(plan.num_src, width, bits), random_multipliers(plan.num_src)
    weight = torch.randn(plan.num_edges) if heads is None else torch.randn(plan.num_edges, heads)
    for kind in ("tensor", "column"):
        source = random_range(kind, plan.num_src, width)
        assert_equal(
            aggregate, words, plan, tolerance=1e-5, **source, num_features=width, bits=bits, edge_weight=weight,
            multiplier=m,
        )  # fmt: skip


# -- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_bits", [0, *PACKED_BITS])
@pytest.mark.parametrize("x_bits", [2, 4, 8])
def test_linear(x_bits: int, out_bits: int) -> None:
    """As an input of the range ``(s m, l m)`` per row; multipliers of results on top."""
    for rows, k, channels in ((1, 40, 7), (37, 100, 64), (100, 256, 100)):
        x, w = random_words(rows, k, x_bits), random_words(channels, k, 4)
        m = random_multipliers(rows)
        sx, lx, sw, lw = torch.rand(1) + 0.1, torch.randn(1), torch.rand(channels) + 0.1, torch.randn(channels)
        spread = 100.0 * k
        out = output("tensor" if channels != 64 else "column", channels, out_bits, spread) if out_bits else {}
        rest = {
            "bias": torch.randn(channels), "relu": True, "row_scale": torch.rand(rows),
            "addend": torch.randn(rows, channels),
        }  # fmt: skip
        for more in ({}, rest):
            args = (w, sx, lx, sw, lw, k, x_bits, 4)
            assert_equal(linear, x, *args, **more, **out, multiplier=m)
            factor = m.float().view(-1, 1)
            with use_backend("cpu"):
                ranged = linear(x, w, sx * factor, lx * factor, *args[3:], **more, **out)
                found = linear(x, *args, **more, **out, multiplier=m)
            if out_bits:
                assert torch.equal(ranged[1], found[1])
                ranged, found = ranged[0], found[0]
            assert torch.equal(ranged, found)


# -- attention -------------------------------------------------------------------------------------------------------


def attention_inputs(plan: GraphPlan, width: int, heads: int, v2: bool) -> dict[str, torch.Tensor]:
    if v2:
        return {"att": torch.randn(heads, width // heads), "x_dst": torch.randn(plan.num_dst, width)}
    return {"alpha_src": torch.randn(plan.num_src, heads), "alpha_dst": torch.randn(plan.num_dst, heads)}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("bits", "attention_bits", "width", "heads"),
    # Heads by sixteen words, by lane, of odd widths, in several tiles; then what byte dot products do not hold.
    [(2, 2, 256, 4), (4, 4, 64, 8), (4, 2, 40, 1), (2, 4, 300, 4), (8, 8, 40, 1), (4, 8, 15, 3), (1, 2, 40, 4)],
)
def test_attention(graph: str, bits: int, attention_bits: int, width: int, heads: int) -> None:
    """GAT's sums are integers, with multipliers and without: bit for bit those of the reference."""
    plan = plan_of(graph)
    words = random_words(plan.num_src, width, bits)
    source = random_range("column" if width == 64 else "tensor", plan.num_src, width)
    more = {"alpha_edge": torch.randn(plan.num_edges, heads)} if width == 256 else {}
    for m in (random_multipliers(plan.num_src), None) if graph != "star" else (random_multipliers(plan.num_src),):
        assert_equal(
            attention_aggregate, words, plan, **source, num_features=width, bits=bits, heads=heads,
            attention_bits=attention_bits, multiplier=m, **attention_inputs(plan, width, heads, False), **more,
        )  # fmt: skip


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("attention_bits", [4, 32])
def test_attention_to_rounding(attention_bits: int, v2: bool) -> None:
    """Logits and float numerators round, so a numerator may differ by a step where one is at a threshold."""
    plan = plan_of("power_law")
    m, width, heads = random_multipliers(plan.num_src), 48, 4
    words = random_words(plan.num_src, width, 4)
    source = random_range("column", plan.num_src, width)
    options = {
        **source, "num_features": width, "bits": 4, "heads": heads, "attention_bits": attention_bits,
        **attention_inputs(plan, width, heads, v2),
    }  # fmt: skip
    with use_backend("torch"):
        expected = attention_aggregate(words, plan, **options, multiplier=m)
        factor = m.float().view(-1, 1)
        x = unpack_codes(words, width, 4).float() * (source["scale"] * factor) + source["offset"] * factor
    with use_backend("cpu"):
        out = attention_aggregate(words, plan, **options, multiplier=m)
    off = (out - expected).abs() > 1e-4 * expected.abs().max()
    assert float(off.float().mean()) < 0.01
    assert float(out.max()) <= float(x.max()) + 1e-3  # means of what is sent
    assert float(out[plan.degree > 0].min()) >= float(x.min()) - 1e-3


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("out_bits", [2, 4, 8])
def test_packed_attention(out_bits: int, concat: bool) -> None:
    plan, heads, width = plan_of("power_law"), 4, 64
    words, m = random_words(plan.num_src, width, 2), random_multipliers(plan.num_src)
    features = width if concat else width // heads
    assert_equal(
        attention_aggregate, words, plan, torch.rand(1) + 0.1, torch.randn(1), width, 2, heads=heads, attention_bits=4,
        multiplier=m, concat=concat, bias=torch.randn(features), relu=True,
        **attention_inputs(plan, width, heads, False), **output("tensor", features, out_bits, 8.0),
    )  # fmt: skip


def test_attention_over_a_hub() -> None:
    """30,000 neighbours with the largest of everything: integers beyond 2^31, and a mass beyond 2^24."""
    degree, width = 30_000, 20
    words = pack_codes(torch.full((3, width), 255), 8)
    plan = GraphPlan(torch.tensor([0, degree]), torch.arange(degree, dtype=torch.int32) % 3, 3)
    m = torch.full((3,), LARGEST_MULTIPLIER, dtype=torch.uint8)
    alphas = {"alpha_src": torch.zeros(3, 1), "alpha_dst": torch.zeros(1, 1)}
    with use_backend("cpu"):
        out = attention_aggregate(
            words, plan, torch.ones(1), torch.ones(1), width, 8, attention_bits=8, multiplier=m, **alphas
        )
    torch.testing.assert_close(out, torch.full((1, width), 256.0 * LARGEST_MULTIPLIER), rtol=1e-6, atol=0)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_errors() -> None:
    plan = plan_of("erdos_renyi")
    words, one, zero = random_words(plan.num_src, 40, 2), torch.ones(1), torch.zeros(1)
    m, rows = random_multipliers(plan.num_src), torch.ones(plan.num_src, 1)

    def run(**options: Any) -> None:
        source = {"scale": one, "offset": zero, "multiplier": m, **options}
        aggregate(words, plan, num_features=40, bits=2, **source)

    with pytest.raises(TypeError, match="Expected 'multiplier' to be uint8"):
        run(multiplier=m.int())
    with pytest.raises(ValueError, match="Expected 'multiplier' of shape"):
        run(multiplier=m[:-1])
    with pytest.raises(ValueError, match="got a range per row"):
        run(scale=rows, offset=rows)
    with pytest.raises(ValueError, match="reduce='max'"):
        run(reduce="max")
    with pytest.raises(ValueError, match="pass 'out_bits'"):
        run(out_unit=one)
    packed = {"out_scale": one, "out_offset": zero, "out_bits": 2}
    with pytest.raises(TypeError, match="float32"):
        run(out_unit=one.double(), **packed)
    with pytest.raises(ValueError, match="one element"):
        run(out_unit=torch.ones(2), **packed)
    with pytest.raises(ValueError, match="got a range per row"):
        run(out_unit=one, **{**packed, "out_scale": torch.ones(plan.num_dst, 1)})


def test_empty() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    for backend in ("torch", "cpu"):
        with use_backend(backend):
            words, m = quantize_pack(torch.empty(0, 5), one, zero, 2, one)
            assert (words.shape, m.shape) == ((0, 1), (0,))
            words, m = quantize_pack(torch.empty(3, 0), one, zero, 2, one)
            assert m.tolist() == [1, 1, 1]


def test_threads_share_a_large_graph() -> None:
    nodes, edges, width = 20_000, 200_000, 256
    plan = GraphPlan.from_edges(*torch.randint(0, nodes, (2, edges)), nodes, nodes)
    words, m = random_words(nodes, width, 2), random_multipliers(nodes)
    results = []
    for count in (1, 2, 5):
        with threads(count), use_backend("cpu"):
            to = output("tensor", width, 2, 200.0)
            to["out_scale"], to["out_offset"] = torch.tensor([20.0]), torch.tensor([-30.0])
            source = (torch.ones(1), torch.tensor([-1.5]))
            results.append(aggregate(words, plan, *source, width, 2, multiplier=m, **to))
    for words_, m_ in results[1:]:
        assert torch.equal(words_, results[0][0])
        assert torch.equal(m_, results[0][1])
