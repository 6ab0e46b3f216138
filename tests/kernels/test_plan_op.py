"""``qgnn::plan`` and ``qgnn::inverse_root``: what plans and normalization are made of in exported programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qgnn_plugin.graph.edges import Edges, LoopedPlan
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.plan_op import LOOPS, inverse_root

NODES = 12


def edges(num_edges: int, nodes: int = NODES, loops: bool = True) -> tuple[Tensor, Tensor]:
    src, dst = torch.randint(nodes, (num_edges,)), torch.randint(nodes, (num_edges,))
    if loops and num_edges > 3:
        src[1], src[2] = dst[1], dst[2] = 4, 4  # a self-loop twice
    return src, dst


def test_the_plain_plan_is_that_of_the_edges() -> None:
    src, dst = edges(50)
    rowptr, col, perm = torch.ops.qgnn.plan(src, dst, NODES, NODES)
    plan = GraphPlan.from_edges(src, dst, NODES, NODES)
    assert torch.equal(rowptr, plan.rowptr)
    assert torch.equal(col, plan.col)
    assert torch.equal(src[perm].int(), col)
    assert torch.equal(dst[perm], plan.dst)
    assert rowptr.data_ptr() != torch.ops.qgnn.plan(src, dst, NODES, NODES)[0].data_ptr()  # never the cached ones


@pytest.mark.parametrize("num_edges", [0, 1, 60])
@pytest.mark.parametrize("loops", LOOPS)
def test_self_loops_and_their_weights(loops: str, num_edges: int) -> None:
    src, dst = edges(num_edges)
    weight, fill = torch.rand(num_edges), 2.0
    rowptr, col, perm = torch.ops.qgnn.plan(src, dst, NODES, NODES, loops)
    looped = LoopedPlan.of(Edges(src, dst, None), (NODES, NODES), loops)
    assert torch.equal(rowptr, looped.plan.rowptr)
    assert torch.equal(col, looped.plan.col)
    added = torch.full((NODES,), fill)
    got = torch.cat([weight, added])[perm] if loops != "none" else weight[perm]
    assert torch.equal(got, looped.weights(weight, fill))


@pytest.mark.parametrize("loops", LOOPS)
def test_nodes_that_do_not_exist_are_refused(loops: str) -> None:
    src, dst = edges(20)
    src[7] = dst[7] = NODES
    with pytest.raises(ValueError, match=r"Expected source nodes in the interval \[0, 12\)"):
        torch.ops.qgnn.plan(src, dst, NODES, NODES, loops)


def test_wrong_arguments_are_refused() -> None:
    src, dst = edges(20)
    with pytest.raises(ValueError, match="Expected two vectors of nodes"):
        torch.ops.qgnn.plan(src, dst[:-1], NODES, NODES)
    with pytest.raises(ValueError, match="Expected 'loops' to be one of"):
        torch.ops.qgnn.plan(src, dst, NODES, NODES, "some")
    with pytest.raises(ValueError, match="'num_dst' >= 0"):
        torch.ops.qgnn.plan(src, dst, NODES, -1)
    with pytest.raises(TypeError, match="as integers"):
        torch.ops.qgnn.plan(src.float(), dst.float(), NODES, NODES)


@pytest.mark.parametrize("loops", LOOPS)
def test_opcheck(loops: str) -> None:
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.qgnn.plan.default, (*edges(20), NODES, NODES, loops), test_utils=utils)


def test_opcheck_of_the_root() -> None:
    torch.library.opcheck(torch.ops.qgnn.inverse_root.default, (torch.arange(9.0),))


def test_the_root_is_zero_without_edges() -> None:
    degree = torch.tensor([0.0, 1.0, 4.0, 7.0])
    expected = torch.tensor([0.0, 1.0, 0.5, 7.0**-0.5])
    assert torch.equal(inverse_root(degree)[:3], expected[:3])
    assert torch.allclose(torch.ops.qgnn.inverse_root(degree), expected)


def test_a_plan_of_changed_edges_is_another() -> None:
    src, dst = edges(30)
    before = torch.ops.qgnn.plan(src, dst, NODES, NODES)[0]
    dst.numpy()[...] = 3  # which no version counter sees
    after = torch.ops.qgnn.plan(src, dst, NODES, NODES)[0]
    assert not torch.equal(before, after)
    assert after.diff()[3] == 30
