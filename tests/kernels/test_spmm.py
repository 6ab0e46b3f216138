"""Sparse products against dense ones: values, gradients, every width, every graph."""

import pytest
import torch
from graphs import GRAPHS, Graph, erdos_renyi, isolated_nodes, power_law, star
from torch import Tensor

from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.spmm import segment_max, segment_sum, spmm

WIDTHS = (1, 3, 8, 15, 16, 17, 31, 64, 65, 100, 130)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.float64: {}}


def plan_of(graph: Graph) -> GraphPlan:
    src, dst = graph.edge_index
    return GraphPlan.from_edges(src, dst, graph.num_nodes, graph.num_nodes)


def dense(plan: GraphPlan, weight: Tensor | None = None) -> Tensor:
    """``[num_dst, num_src]`` in float64, parallel edges added."""
    values = torch.ones(plan.num_edges) if weight is None else weight
    matrix = torch.zeros(plan.num_dst, plan.num_src, dtype=torch.float64)
    return matrix.index_put((plan.dst, plan.col.long()), values.double(), accumulate=True)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_product_on_every_graph(
    name: str, dtype: torch.dtype, weighted: bool, poison_empty: None
) -> None:
    plan = plan_of(GRAPHS[name]())
    x = torch.randn(plan.num_src, 20, dtype=dtype)
    weight = torch.randn(plan.num_edges, dtype=dtype) if weighted else None
    out = spmm(plan, x, weight)
    assert out.dtype == dtype
    messages = x[plan.col.long()].double()
    if weight is not None:
        messages = messages * weight.double().unsqueeze(1)
    expected = torch.zeros_like(x, dtype=torch.float64).index_add_(0, plan.dst, messages)
    torch.testing.assert_close(out, expected.to(dtype), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_at_every_width(width: int, dtype: torch.dtype, poison_empty: None) -> None:
    plan = plan_of(power_law())
    x = torch.randn(plan.num_src, width, dtype=dtype)
    weight = torch.randn(plan.num_edges, dtype=dtype)
    for w in (None, weight):
        expected = (dense(plan, w) @ x.double()).to(dtype)
        torch.testing.assert_close(spmm(plan, x, w), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(("heads", "width"), [(1, 5), (8, 8), (16, 8), (3, 8), (8, 4), (4, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_have_their_own_weights(
    heads: int, width: int, dtype: torch.dtype, poison_empty: None
) -> None:
    plan = plan_of(erdos_renyi())
    x = torch.randn(plan.num_src, heads, width, dtype=dtype)
    weight = torch.randn(plan.num_edges, heads, dtype=dtype)
    out = spmm(plan, x, weight)
    assert out.shape == (plan.num_dst, heads, width)
    for head in range(heads):
        expected = (dense(plan, weight[:, head]) @ x[:, head].double()).to(dtype)
        torch.testing.assert_close(out[:, head], expected, **TOLERANCE[dtype])
    unweighted = (dense(plan) @ x.double().flatten(1)).to(dtype).view_as(out)
    torch.testing.assert_close(spmm(plan, x), unweighted, **TOLERANCE[dtype])


@pytest.mark.parametrize("codes", [3, 255])
def test_integers_are_exact_up_to_two_to_the_24(codes: int) -> None:
    graph = star(65_000)
    plan = plan_of(graph)
    x = torch.full((graph.num_nodes, 2), float(codes))
    assert spmm(plan, x)[0].tolist() == [codes * 65_000.0] * 2


def test_non_contiguous_values() -> None:
    plan = plan_of(erdos_renyi())
    x = torch.randn(20, plan.num_src).t()
    weight = torch.randn(2, plan.num_edges).t()[:, 0]
    torch.testing.assert_close(spmm(plan, x), spmm(plan, x.contiguous()))
    torch.testing.assert_close(spmm(plan, x, weight), spmm(plan, x, weight.contiguous()))
    leaf = x.contiguous().requires_grad_()
    spmm(plan, leaf).sum().backward()  # a gradient with strides of 0
    out_degree = torch.bincount(plan.col.long(), minlength=plan.num_src).float()
    assert torch.equal(leaf.grad, out_degree.unsqueeze(1).expand(-1, 20))  # type: ignore[arg-type]


def test_weights_of_another_precision() -> None:
    dtype, other = torch.float32, torch.float64
    plan = plan_of(erdos_renyi())
    x = torch.randn(plan.num_src, 9, dtype=dtype)
    weight = torch.randn(plan.num_edges, dtype=other, requires_grad=True)
    out = spmm(plan, x, weight)
    assert out.dtype == dtype
    expected = (dense(plan, weight.detach()) @ x.double()).to(dtype)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    plan = plan_of(isolated_nodes())
    x = torch.randn(plan.num_src, 4).to(dtype).requires_grad_()
    weight = torch.rand(plan.num_edges).to(dtype).requires_grad_()
    for w in (None, weight):
        out = spmm(plan, x, w)
        expected = dense(plan, None if w is None else w.detach()) @ x.detach().double()
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize("name", ["erdos_renyi", "isolated_nodes", "duplicate_edges", "no_edges"])
@pytest.mark.parametrize("heads", [0, 2])
def test_gradcheck(name: str, heads: int) -> None:
    graph = erdos_renyi(8, 14) if name == "erdos_renyi" else GRAPHS[name]()
    plan = plan_of(graph)
    shape = (plan.num_src, heads, 3) if heads else (plan.num_src, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    shape = (plan.num_edges, heads) if heads else (plan.num_edges,)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spmm(plan, x), (x,))
    if plan.num_edges:
        assert torch.autograd.gradcheck(lambda x, w: spmm(plan, x, w), (x, weight))
        assert torch.autograd.gradcheck(lambda w: spmm(plan, x.detach(), w), (weight,))
        assert torch.autograd.gradcheck(lambda w: segment_sum(plan, w), (weight,))


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize(("heads", "width"), [(8, 8), (3, 17)])
def test_float32_gradients(heads: int, width: int, dtype: torch.dtype, poison_empty: None) -> None:
    plan = plan_of(power_law())
    x = torch.randn(plan.num_src, heads, width, requires_grad=True)
    weight = torch.randn(plan.num_edges, heads, requires_grad=True)
    grad = torch.randn(plan.num_dst, heads, width)
    spmm(plan, x, weight).backward(grad)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    spmm(plan, x64, w64).backward(grad.double())
    torch.testing.assert_close(x.grad, x64.grad.float(), rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad, w64.grad.float(), rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]


def test_second_derivatives() -> None:
    """Of ``|A x|^2``, summed over columns of the Hessian: ``2 A' A 1``."""
    plan = plan_of(erdos_renyi(8, 14))
    x = torch.randn(plan.num_src, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(spmm(plan, x).square().sum(), x, create_graph=True)
    grad.sum().backward()
    a = spmm(plan, torch.eye(plan.num_src)).double()
    expected = 2 * a.t() @ (a @ torch.ones(plan.num_src, 3, dtype=torch.float64))
    torch.testing.assert_close(x.grad, expected.float())


def test_deterministic_over_runs_and_threads() -> None:
    plan = plan_of(power_law(300, 5000))
    x = torch.randn(plan.num_src, 37)
    weight = torch.randn(plan.num_edges)
    first = spmm(plan, x, weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(spmm(plan, x, weight), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        (59, None, r"one row per source node, 60 \(got 59\)"),
        (60, (299,), r"edge weights of shape \[300, 1\] \(got \[299, 1\]\)"),
        (60, (300, 2), r"edge weights of shape \[300, 1\] \(got \[300, 2\]\)"),
    ],
)
def test_shapes_are_checked(rows: int, weights: tuple[int, ...] | None, message: str) -> None:
    weight = None if weights is None else torch.ones(weights)
    with pytest.raises(ValueError, match=message):
        spmm(plan_of(erdos_renyi()), torch.randn(rows, 4), weight)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segments(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, poison_empty: None
) -> None:
    plan = plan_of(GRAPHS[name]())
    values = torch.randn(plan.num_edges, *shape, dtype=dtype)
    total = torch.zeros(plan.num_dst, *shape, dtype=torch.float64)
    total.index_add_(0, plan.dst, values.double())
    torch.testing.assert_close(segment_sum(plan, values), total.to(dtype), rtol=1e-4, atol=1e-4)
    if len(shape) <= 1:
        largest = segment_max(plan, values, empty=-7.0)
        for i in range(min(plan.num_dst, 20)):
            mine = values[plan.dst == i]
            expected = mine.amax(0) if mine.numel() else torch.full(shape, -7.0, dtype=dtype)
            assert torch.equal(largest[i], expected)
