"""The counting sort of plans against torch's sort: the same arrays, on every graph and with every kind of self-loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import GRAPHS

from qgnn_plugin.kernels import edge_order, indices
from qgnn_plugin.kernels.backend import has_numba
from qgnn_plugin.kernels.edge_order import (
    inverse_degree,
    inverse_root_degree,
    order_edges,
    order_edges_reference,
)

pytestmark = pytest.mark.skipif(not has_numba(), reason="the counting sort is compiled by numba")


def assert_same(src: torch.Tensor, dst: torch.Tensor, num_src: int, num_dst: int, **loops: object) -> None:
    ours = order_edges(src, dst, num_src, num_dst, **loops)
    expected = order_edges_reference(src, dst, num_src, num_dst, **loops)
    for found, wanted in zip(ours[:3], expected[:3], strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    assert ours.dropped == expected.dropped
    indices.check_csr(ours.rowptr, ours.col, num_src)
    indices._graphs.clear()  # now they are looked at
    indices.check_csr(ours.rowptr, ours.col, num_src)


@pytest.mark.parametrize("drops_loops", [False, True])
@pytest.mark.parametrize("has_loops", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph(name: str, has_loops: bool, drops_loops: bool) -> None:
    graph = GRAPHS[name]()
    added = graph.num_nodes if has_loops else 0
    for src, dst in (graph.edge_index, graph.edge_index.to(torch.int32), graph.edge_index.t().contiguous().t()):
        assert_same(src, dst, graph.num_nodes, graph.num_nodes, added=added, drops_loops=drops_loops)
    order = torch.argsort(graph.edge_index[1], stable=True)
    src, dst = graph.edge_index[:, order]
    assert_same(src, dst, graph.num_nodes, graph.num_nodes, added=added, drops_loops=drops_loops)


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_of_two_kinds_of_nodes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_src, num_dst, num_edges = (int(v) for v in torch.randint(1, 40, (3,), generator=generator))
    src = torch.randint(num_src, (num_edges,), generator=generator)
    dst = torch.randint(num_dst, (num_edges,), generator=generator)
    for added in (0, min(num_src, num_dst)):
        for drops_loops in (False, True):
            assert_same(src, dst, num_src, num_dst, added=added, drops_loops=drops_loops)


def test_destinations_that_only_start_with_node_zero() -> None:
    """Self-loops go after all edges: in order only where these all reach the first node."""
    for dst in ([0, 0], [0, 1], [1, 1]):
        assert_same(torch.tensor([1, 1]), torch.tensor(dst), 3, 3, added=3)


def test_compiled_code_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_order, "order_edges_reference", lambda *_, **__: pytest.fail("the long way"))
    order_edges(torch.tensor([0, 1]), torch.tensor([1, 0]), 2, 2, added=2)


@pytest.mark.parametrize("src", [[-1, 0], [0, 2], [2**40, 0]])
@pytest.mark.parametrize("is_source", [False, True])
def test_nodes_that_do_not_exist(src: list[int], is_source: bool) -> None:
    bad, good = torch.tensor(src), torch.tensor([0, 1])
    pair = (bad, good) if is_source else (good, bad)
    what = "source" if is_source else "destination"
    with pytest.raises(ValueError, match=rf"Expected {what} nodes in the interval \[0, 2\)"):
        order_edges(*pair, 2, 2)


@pytest.mark.parametrize("order", [order_edges, order_edges_reference])
def test_self_loops_that_are_left_out_need_not_exist_unless_asked(order: Callable[..., Any]) -> None:
    src, dst = torch.tensor([7, 0]), torch.tensor([7, 1])
    assert order(src, dst, 2, 2, added=2, drops_loops=True).col.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"Expected source nodes in the interval \[0, 2\)"):
        order(src, dst, 2, 2, added=2, drops_loops=True, checks_loops=True)


@pytest.mark.parametrize("factors", [inverse_degree, inverse_root_degree])
def test_factors_of_degrees_are_those_of_torch(factors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    degrees = torch.cat([torch.arange(3000), torch.randint(1 << 22, (500,))])
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
    found = factors(rowptr)
    monkeypatch.setattr(edge_order, "_compiled", lambda: None)
    assert torch.equal(found, factors(rowptr))
