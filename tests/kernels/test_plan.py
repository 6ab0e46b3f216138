"""Graph plans and their cache: order, transposes, identity, invalidation."""

import pytest
import torch
from graphs import GRAPHS, HUB_NEIGHBORS, Graph, erdos_renyi, star
from torch import Tensor

from qgnn_plugin.kernels.plan import GraphPlan, PlanCache, graph_plan, plan_cache


def plan_of(graph: Graph) -> GraphPlan:
    src, dst = graph.edge_index
    return GraphPlan.from_edges(src, dst, graph.num_nodes, graph.num_nodes)


@pytest.mark.parametrize("name", GRAPHS)
def test_plan_lists_sources_by_destination_in_the_given_order(name: str) -> None:
    graph = GRAPHS[name]()
    plan = plan_of(graph)
    rowptr, col, order = graph.csr()
    assert torch.equal(plan.rowptr, rowptr)
    assert torch.equal(plan.col.long(), col)
    assert plan.col.dtype == torch.int32
    assert (plan.num_src, plan.num_dst, plan.num_edges) == (
        graph.num_nodes,
        graph.num_nodes,
        graph.num_edges,
    )
    degree = torch.bincount(graph.edge_index[1], minlength=graph.num_nodes)
    assert torch.equal(plan.degree, degree.float())
    assert plan.max_degree == (int(degree.max()) if graph.num_nodes else 0)
    assert torch.equal(plan.dst, graph.edge_index[1][order])
    ids = torch.arange(graph.num_edges)
    assert torch.equal(plan.sort(ids), order)
    assert torch.equal(plan.unsort(plan.sort(ids)), ids)


@pytest.mark.parametrize("name", GRAPHS)
def test_transpose_reverses_every_edge(name: str) -> None:
    plan = plan_of(GRAPHS[name]())
    back = plan.transpose
    ids = torch.arange(plan.num_edges)
    where = back.sort(ids)  # CSR position of this plan of each reversed edge
    assert torch.equal(back.col.long(), plan.dst[where])
    assert torch.equal(back.dst, plan.col.long()[where])
    assert torch.equal(back.transpose.rowptr, plan.rowptr)
    assert plan.transpose is back


def test_sorted_edges_keep_their_order_without_a_permutation() -> None:
    src, dst = torch.tensor([3, 0, 2, 2]), torch.tensor([0, 1, 1, 3])
    plan = GraphPlan.from_edges(src, dst, 4, 4)
    assert plan.perm is None
    values = torch.randn(4, 2)
    assert plan.sort(values) is values
    assert plan.unsort(values) is values


@pytest.mark.parametrize("is_sorted", [False, True])
def test_parts_number_edges_as_the_caller_does(is_sorted: bool) -> None:
    """Of the caller's edges, whether or not these are in order; parts of parts too."""
    edge_index = erdos_renyi(50, 400).edge_index
    if is_sorted:
        edge_index = edge_index[:, edge_index[1].argsort(stable=True)]
    plan = GraphPlan.from_edges(*edge_index, 50, 50)
    assert (plan.perm is None) == is_sorted
    part = plan.rows(10, 40)
    for found, start, stop in ((part, 10, 40), (plan.rows(0, 20), 0, 20), (part.rows(5, 20), 15, 30)):
        src, dst = edge_index[:, found.edge_ids]
        assert torch.equal(src, found.col.long())
        assert torch.equal(dst, found.dst + start)
        assert int(((edge_index[1] >= start) & (edge_index[1] < stop)).sum()) == found.num_edges
        alone = found.in_order
        assert torch.equal(alone.edge_ids, torch.arange(found.num_edges))
        assert torch.equal(alone.rowptr, found.rowptr)
        assert torch.equal(alone.col, found.col)


def test_bipartite_plan() -> None:
    plan = GraphPlan.from_edges(torch.tensor([4, 0]), torch.tensor([1, 0]), 5, 2)
    assert (plan.num_src, plan.num_dst) == (5, 2)
    assert (plan.transpose.num_src, plan.transpose.num_dst) == (2, 5)
    assert plan.transpose.degree.tolist() == [1, 0, 0, 0, 1]


def test_hub_degree() -> None:
    assert plan_of(star()).max_degree == HUB_NEIGHBORS


@pytest.mark.parametrize(
    ("src", "dst", "what"),
    [([0, 5], [0, 1], "source"), ([0, 1], [0, 3], "destination"), ([0, -1], [0, 1], "source")],
)
def test_nodes_out_of_range_are_refused(src: list[int], dst: list[int], what: str) -> None:
    with pytest.raises(ValueError, match=rf"{what} nodes in the interval \[0, ."):
        GraphPlan.from_edges(torch.tensor(src), torch.tensor(dst), 5, 3)


def test_values_of_another_number_of_edges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one value per edge, 300 \(got 299\)"):
        plan_of(erdos_renyi()).sort(torch.randn(299))


def test_graph_plan_is_cached_and_directed() -> None:
    edge_index = erdos_renyi().edge_index
    plan = graph_plan(edge_index, (60, 60))
    assert graph_plan(edge_index, (60, 60)) is plan
    against = graph_plan(edge_index, (60, 60), flow="target_to_source")
    assert against is not plan
    assert torch.equal(against.degree, torch.bincount(edge_index[0], minlength=60).float())
    with pytest.raises(ValueError, match=r"shape \[2, E\] \(got \[3, 4\]\)"):
        graph_plan(torch.zeros(3, 4, dtype=torch.long), (5, 5))


class Counter:
    """Builds distinct values and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


LAYOUTS = {
    "strided": lambda t: t,
    "csr": lambda t: t.to_sparse_csr(),
    "csc": lambda t: t.to_sparse_csc(),
    "coo": lambda t: t.to_sparse_coo(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_tensor_hits_and_another_misses(layout: str) -> None:
    cache, build = PlanCache(), Counter()
    tensor = LAYOUTS[layout](torch.eye(4))
    first = cache.get((tensor,), ("k",), build)
    assert cache.get((tensor,), ("k",), build) == first
    assert cache.get((tensor.detach(),), ("k",), build) == first  # the same memory
    assert cache.get((tensor.clone(),), ("k",), build) != first
    assert cache.get((tensor,), ("other",), build) != first
    assert cache.get((tensor, None), ("k",), build) != first
    assert build.count == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_change_in_place_misses(layout: str) -> None:
    cache, build = PlanCache(), Counter()
    tensor = LAYOUTS[layout](torch.eye(4))
    cache.get((tensor,), (), build)
    if layout == "strided":
        tensor[0, 1] = 5
    else:
        (tensor._values() if layout == "coo" else tensor.values()).mul_(2)
    cache.get((tensor,), (), build)
    assert build.count == 2


def test_change_of_one_of_several_tensors_misses() -> None:
    cache, build = PlanCache(), Counter()
    edge_index, weight = torch.zeros(2, 3, dtype=torch.long), torch.ones(3)
    cache.get((edge_index, weight), (), build)
    weight.mul_(2)
    cache.get((edge_index, weight), (), build)
    cache.get((edge_index, None), (), build)
    cache.get((weight, edge_index), (), build)
    assert build.count == 4


def test_views_of_the_same_memory_are_told_apart() -> None:
    cache, build = PlanCache(), Counter()
    base = torch.arange(12).view(2, 6)
    for view in (base, base[:, :3], base[:, 1:4], base.view(6, 2).t(), base.view(torch.float64)):
        cache.get((view,), (), build)
    assert build.count == 5


def test_address_is_not_reused_while_an_entry_lives() -> None:
    cache, build = PlanCache(capacity=4), Counter()
    for _ in range(20):
        cache.get((torch.zeros(2, 100, dtype=torch.long),), (), build)
    assert build.count == 20


def test_inference_tensors_are_compared_by_value() -> None:
    """They have no version counter and yet can be changed inside inference mode."""
    cache, build = PlanCache(), Counter()
    with torch.inference_mode():
        edge_index = torch.zeros(2, 3, dtype=torch.long)
        adjacency = torch.eye(3).to_sparse_csr()
        for tensor in (edge_index, adjacency):
            cache.get((tensor,), (), build)
            cache.get((tensor,), (), build)
        assert build.count == 2
        edge_index[0, 0] = 2
        adjacency.values().mul_(3)
        for tensor in (edge_index, adjacency):
            cache.get((tensor,), (), build)
            cache.get((tensor,), (), build)
        assert build.count == 4


class Wrapper(Tensor):
    """Has no memory of its own, like PyG's ``EdgeIndex``."""

    @staticmethod
    def __new__(cls, size: int) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, (2, size), dtype=torch.long)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def test_tensors_without_memory_are_never_mixed_up() -> None:
    cache, build = PlanCache(), Counter()
    assert cache.get((Wrapper(3),), (), build) != cache.get((Wrapper(3),), (), build)
    meta = torch.empty(2, 3, device="meta")
    assert cache.get((meta,), (), build) != cache.get((meta.clone(),), (), build)


def test_least_recently_used_entries_go_first() -> None:
    cache, build = PlanCache(capacity=2), Counter()
    a, b, c = (torch.zeros(i + 1) for i in range(3))
    for tensor in (a, b, a, c):  # c pushes out b
        cache.get((tensor,), (), build)
    assert len(cache) == 2
    assert build.count == 3
    cache.get((a,), (), build)
    assert build.count == 3
    cache.get((b,), (), build)
    assert build.count == 4
    cache.clear()
    assert len(cache) == 0


def test_shared_cache_is_bounded() -> None:
    for i in range(2 * plan_cache.capacity):
        graph_plan(torch.zeros(2, i + 1, dtype=torch.long), (1, 1))
    assert len(plan_cache) <= plan_cache.capacity


def test_the_short_way_to_a_value_sees_what_the_long_way_sees() -> None:
    cache, built = PlanCache(2), []
    tensor = torch.arange(6)

    def value(key: str = "sum") -> int:
        def build() -> int:
            built.append(key)
            return int(tensor.sum())

        return cache.get((tensor, None), (key,), build)

    assert (value(), value()) == (15, 15)
    assert built == ["sum"]
    tensor.numpy()[0] = 10
    assert (value(), value()) == (25, 25)
    tensor.data[1] = 11
    assert (value(), len(built)) == (35, 3)
    tensor.resize_(3)
    assert (value(), len(built)) == (23, 4)
    value("second")
    value("third")  # no more than two are kept
    assert (value(), built[4:]) == (23, ["second", "third", "sum"])
    cache.clear()
    assert (value(), built[7:]) == (23, ["sum"])
