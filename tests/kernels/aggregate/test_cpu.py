"""``aggregate`` on the CPU against its reference."""

from typing import Any

import pytest
import torch
from cpu_support import (
    WIDTHS,
    assert_equal,
    output_range,
    plan_of,
    random_range,
    random_words,
    threads,
)
from graphs import GRAPHS
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import PACKED_BITS, pack_codes, top_code
from qgnn_plugin.kernels.plan import GraphPlan

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_sum(graph: str, bits: int) -> None:
    plan = plan_of(graph)
    for width in WIDTHS:
        words = random_words(plan.num_src, width, bits)
        source = random_range("column", plan.num_src, width)
        assert_equal(aggregate, words, plan, **source, num_features=width, bits=bits)


@pytest.mark.parametrize("out_bits", [0, *PACKED_BITS])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_epilogue(reduce: str, out_bits: int) -> None:
    plan, bits = plan_of("power_law"), 2
    for width, kind in ((33, "tensor"), (64, "column"), (100, "row")):
        words = random_words(plan.num_src, width, bits)
        options: dict[str, Any] = random_range("tensor", plan.num_src, width)
        options.update(dst_scale=torch.rand(plan.num_dst), bias=torch.randn(width), relu=True)
        if out_bits:
            options.update(output_range(kind, plan.num_dst, width, out_bits, 4.0))
        assert_equal(aggregate, words, plan, num_features=width, bits=bits, reduce=reduce, **options)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("heads", "width"), [(None, 40), (1, 7), (4, 64), (8, 40), (3, 15)])
def test_weighted(heads: int | None, width: int, bits: int) -> None:
    plan = plan_of("power_law")
    words = random_words(plan.num_src, width, bits)
    weight = torch.randn(plan.num_edges) if heads is None else torch.randn(plan.num_edges, heads)
    for kind in ("tensor", "column", "row"):
        source = random_range(kind, plan.num_src, width)
        assert_equal(
            aggregate, words, plan, tolerance=1e-5, **source, num_features=width, bits=bits, edge_weight=weight
        )


def test_range_per_source_without_weights() -> None:
    plan = plan_of("star")
    words = random_words(plan.num_src, 40, 4)
    source = random_range("row", plan.num_src, 40)
    assert_equal(aggregate, words, plan, tolerance=1e-5, **source, num_features=40, bits=4)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("degree", [84, 85, 86, 136, 137, 679, 681, 2056, 2057, 100_001])
def test_no_lane_overflows(degree: int, bits: int) -> None:
    """Full codes over every degree at which a lane is flushed, and far beyond."""
    width = 19
    words = pack_codes(torch.full((3, width), top_code(bits)), bits)
    col = torch.arange(degree, dtype=torch.int32) % 3
    plan = GraphPlan(torch.tensor([0, 0, degree, degree]), col, 3)
    one, zero = torch.ones(1), torch.zeros(1)
    with use_backend("cpu"):
        out = aggregate(words, plan, one, zero, width, bits)
        weighted = aggregate(words, plan, one, zero, width, bits, edge_weight=torch.ones(degree))
    total = float(torch.tensor(degree * top_code(bits), dtype=torch.float32))
    assert torch.equal(out, torch.tensor([[0.0], [total], [0.0]]).expand(3, width))
    torch.testing.assert_close(weighted, out)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 60), st.integers(0, 400), st.integers(1, 130), st.sampled_from(PACKED_BITS),
    st.integers(1, 4), st.integers(0, 2**31),
)  # fmt: skip
def test_property(nodes: int, edges: int, width: int, bits: int, count: int, seed: int) -> None:
    """Exact integers: a sum over codes with step 1 is the product with the adjacency matrix."""
    generator = torch.Generator().manual_seed(seed)
    src, dst = torch.randint(0, nodes, (2, edges), generator=generator)
    codes = torch.randint(0, top_code(bits) + 1, (nodes, width), generator=generator)
    plan = GraphPlan.from_edges(src, dst, nodes, nodes)
    with threads(count), use_backend("cpu"):
        out = aggregate(pack_codes(codes, bits), plan, torch.ones(1), torch.zeros(1), width, bits)
    adjacency = torch.zeros(nodes, nodes).index_put_((dst, src), torch.ones(()), accumulate=True)
    assert torch.equal(out, adjacency @ codes.float())


def test_threads_share_a_large_graph() -> None:
    """Enough work for several threads; a result large enough to be written past the caches."""
    nodes, edges, width = 20_000, 200_000, 256
    src, dst = torch.randint(0, nodes, (2, edges))
    plan = GraphPlan.from_edges(src, dst, nodes, nodes)
    words = random_words(nodes, width, 2)
    results = []
    for count in (1, 2, 5):
        with threads(count), use_backend("cpu"):
            results.append(aggregate(words, plan, torch.ones(1), torch.zeros(1), width, 2))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    row = int(plan.degree.argmax())
    neighbours = plan.col[plan.rowptr[row] : plan.rowptr[row + 1]].long()
    with use_backend("torch"):
        alone = GraphPlan(torch.tensor([0, len(neighbours)]), neighbours.int(), nodes)
        expected = aggregate(words, alone, torch.ones(1), torch.zeros(1), width, 2)
    assert torch.equal(results[0][row], expected[0])


def test_inputs_are_neither_changed_nor_need_be_contiguous() -> None:
    plan, width = plan_of("erdos_renyi"), 40
    words = random_words(plan.num_src, 2 * width, 4)[:, ::2]
    scale = torch.rand(2 * width)[::2] + 0.1
    before = words.clone()
    assert_equal(aggregate, words, plan, scale, torch.zeros(1), width, 4)
    assert torch.equal(words, before)


def test_errors() -> None:
    plan = plan_of("erdos_renyi")
    words, one = random_words(plan.num_src, 40, 2), torch.ones(1)
    with pytest.raises(ValueError, match="Expected 'reduce' to be one of"):
        aggregate(words, plan, one, one, 40, 2, reduce="median")
    with pytest.raises(ValueError, match="Expected one packed row per source node, 60"):
        aggregate(words[1:], plan, one, one, 40, 2)
    with pytest.raises(ValueError, match="'out_scale' and 'out_offset' for 2-bit output"):
        aggregate(words, plan, one, one, 40, 2, out_bits=2)
    with pytest.raises(ValueError, match="no output range for float32 output"):
        aggregate(words, plan, one, one, 40, 2, out_scale=one, out_offset=one)
    with pytest.raises(ValueError, match="no 'edge_weight' with reduce='max'"):
        aggregate(words, plan, one, one, 40, 2, reduce="max", edge_weight=torch.ones(300))
    with pytest.raises(ValueError, match=r"H dividing 40 \(got \[300, 3\]\)"):
        aggregate(words, plan, one, one, 40, 2, edge_weight=torch.ones(300, 3))
    degree = 2**31 // 255 + 1
    hub = GraphPlan(torch.tensor([0, degree]), torch.zeros((), dtype=torch.int32).expand(degree), 1)
    with pytest.raises(ValueError, match="at most 8421504 edges into a node at 8 bits"):
        aggregate(random_words(1, 40, 8), hub, one, one, 40, 8)
    rows = torch.ones(plan.num_src, 1)
    for backend in ("torch", "cpu"):
        with use_backend(backend), pytest.raises(ValueError, match="one range per tensor or col"):
            aggregate(words, plan, rows, rows, 40, 2, reduce="max")
