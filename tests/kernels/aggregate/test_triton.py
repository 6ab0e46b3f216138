"""``aggregate`` against its reference, on every kind of graph."""

import pytest
import torch
from graphs import star
from triton_support import SMALL, assert_same, plan_of, ranges

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.aggregate.triton import aggregate as triton_aggregate
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.triton.launch import Config, check_devices, debug_checks, override


def packed_rows(rows: int, features: int, bits: int) -> torch.Tensor:
    return pack_codes(torch.randint(0, 2**bits, (rows, features)), bits)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_every_graph(name: str, reduce: str) -> None:
    plan = plan_of(SMALL[name]())
    words = packed_rows(plan.num_src, 33, 4)
    scale, offset = ranges("column", plan.num_src, 33)
    assert_same(lambda: aggregate(words, plan, scale, offset, 33, 4, reduce=reduce))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("features", [8, 100])
def test_every_width_with_the_whole_epilogue(bits: int, features: int) -> None:
    plan = plan_of(SMALL["power_law"]())
    words = packed_rows(plan.num_src, features, bits)
    scale, offset = ranges("tensor", plan.num_src, features)
    epilogue = {
        "dst_scale": torch.rand(plan.num_dst), "bias": torch.randn(features), "relu": True,
    }  # fmt: skip
    out = dict(zip(("out_scale", "out_offset"), ranges("column", 0, features), strict=True))
    assert_same(lambda: aggregate(words, plan, scale, offset, features, bits, **epilogue))
    for out_bits in {bits, 4}:
        assert_same(
            lambda b=out_bits: aggregate(  # type: ignore[misc]
                words, plan, scale, offset, features, bits, out_bits=b, **epilogue, **out
            )
        )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_largest_of_every_pair_of_codes(bits: int) -> None:
    """Whatever the codes beside them: codes are compared within their words."""
    values = torch.arange(2**bits)
    if bits == 8:
        values = values[torch.tensor([0, 1, 2, 63, 64, 65, 126, 127, 128, 129, 191, 192, 253, 254, 255])]
    pairs = torch.cartesian_prod(values, values)
    pairs = pairs[torch.randperm(len(pairs))]
    plan = GraphPlan.from_edges(torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 1)
    words = pack_codes(pairs.t().contiguous(), bits)
    with use_backend("interpret"):
        out = aggregate(words, plan, torch.ones(1), torch.zeros(1), len(pairs), bits, reduce="max")
    assert torch.equal(out[0], pairs.amax(1).float())


@pytest.mark.parametrize(("bits", "neighbours"), [(2, 10_007), (8, 1_031)])
def test_largest_codes_do_not_overflow_a_lane(bits: int, neighbours: int) -> None:
    plan = plan_of(star(neighbours))
    words = pack_codes(torch.full((plan.num_src, 5), 2**bits - 1), bits)
    scale, offset = torch.tensor(0.3), torch.tensor(-1.0)
    with override(aggregate_sum=Config(num_warps=1, segment=256, words_per_thread=1)):
        assert_same(lambda: aggregate(words, plan, scale, offset, 5, bits))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("neighbours", [256, 300])
def test_largest_products_do_not_overflow_a_lane(bits: int, neighbours: int) -> None:
    """One row of the longest segment, and one of several, of the largest codes times the largest multiplier."""
    plan = plan_of(star(neighbours))
    features, top = 37, 2**bits - 1
    codes = torch.full((plan.num_src, features), top)
    codes[::2, ::3] = 0  # what a lane carries into the next one would show
    words, times = pack_codes(codes, bits), torch.full((plan.num_src,), LARGEST_MULTIPLIER, dtype=torch.uint8)
    scale, offset, unit = torch.tensor(0.3), torch.tensor(-1.0), torch.tensor([0.7])
    out = {"out_scale": torch.tensor([0.2]), "out_offset": torch.tensor([-0.1]), "out_bits": bits, "out_unit": unit}
    with override(aggregate_multiplied=Config(num_warps=1, segment=256, words_per_thread=1)):
        assert_same(lambda: aggregate(words, plan, scale, offset, features, bits, multiplier=times))
        assert_same(lambda: aggregate(words, plan, scale, offset, features, bits, multiplier=times, relu=True, **out))


@pytest.mark.parametrize(
    ("bits", "features", "heads"), [(2, 33, 1), (2, 64, 4), (4, 64, 4), (4, 33, 3), (8, 20, 2), (8, 16, 2)]
)
def test_weighted(bits: int, features: int, heads: int) -> None:
    plan = plan_of(SMALL["erdos_renyi"]())
    words = packed_rows(plan.num_src, features, bits)
    weight = torch.rand(plan.num_edges, heads)
    scale, offset = ranges("column", plan.num_src, features)
    assert_same(
        lambda: aggregate(words, plan, scale, offset, features, bits, edge_weight=weight),
        exact=False,
    )


def test_range_per_source_row() -> None:
    plan = plan_of(SMALL["erdos_renyi"]())
    words = packed_rows(plan.num_src, 40, 4)
    scale, offset = ranges("row", plan.num_src, 40)
    assert_same(lambda: aggregate(words, plan, scale, offset, 40, 4), exact=False)
    assert_same(lambda: aggregate(words, plan, scale, offset[0], 40, 4), exact=False)


def test_result_does_not_depend_on_the_configuration() -> None:
    plan = plan_of(SMALL["power_law"]())
    words = packed_rows(plan.num_src, 64, 2)
    scale, offset = ranges("column", plan.num_src, 64)
    for config in (
        Config(num_warps=1, words_per_thread=1, tile_words=2, unroll=4, segment=5),
        Config(num_warps=8, words_per_thread=2, tile_words=4, unroll=1, segment=64),
    ):
        with override(aggregate_sum=config):
            assert_same(lambda: aggregate(words, plan, scale, offset, 64, 2))


def test_debug_mode_finds_indices_out_of_range() -> None:
    plan = plan_of(SMALL["self_loops"]())
    plan.col = plan.col + 1
    words = packed_rows(plan.num_src, 8, 2)
    scale, offset = ranges("tensor", 0, 8)
    with debug_checks(), pytest.raises(ValueError, match=r"source nodes in \[0, 7\)"):
        triton_aggregate(words, plan.rowptr, plan.col, scale, offset, 8, 2)


def test_mixed_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="one device"):
        check_devices(torch.empty(1), torch.empty(1, device="meta"))
