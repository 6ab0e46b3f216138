"""The float32 kernels against the float64 path, for every shape of head that has code of its own."""

from __future__ import annotations

import pytest
import torch

from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.spmm import segment_max, segment_sum, spmm

SHAPES = [(1, 1), (1, 7), (1, 16), (1, 64), (1, 65), (1, 200), (8, 8), (16, 8), (3, 8), (4, 64), (3, 33), (2, 16)]


def _plan() -> GraphPlan:
    generator = torch.Generator().manual_seed(0)
    src = torch.randint(0, 50, (300,), generator=generator)
    dst = torch.randint(0, 35, (300,), generator=generator)  # the last five destinations have no edge
    return GraphPlan.from_edges(src, dst, 50, 40)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("heads", "width"), SHAPES)
def test_products_and_gradients(heads: int, width: int, weighted: bool, poison_empty: None) -> None:
    torch.manual_seed(1)
    plan = _plan()
    x, weight, seed = torch.randn(50, heads, width), torch.rand(300, heads), torch.randn(40, heads, width)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype, copy=True).requires_grad_()
        edge = weight.to(dtype, copy=True).requires_grad_() if weighted else None
        out = spmm(plan, leaf, edge)
        (out * seed.to(dtype)).sum().backward()
        results.append([out.detach(), leaf.grad] + ([edge.grad] if edge is not None else []))
    for got, expected in zip(*results, strict=True):
        assert got is not None
        assert expected is not None
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3, 8, 17])
def test_segments(heads: int, poison_empty: None) -> None:
    torch.manual_seed(2)
    plan, values = _plan(), torch.randn(300, heads)
    expected = segment_sum(plan, values.double())
    torch.testing.assert_close(segment_sum(plan, values).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(segment_max(plan, values).double(), segment_max(plan, values.double()))
    assert torch.equal(segment_max(plan, values, empty=-3.0)[35:], torch.full((5, heads), -3.0))
