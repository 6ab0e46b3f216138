"""Shared by the Triton tests: small graphs, and reference against interpreted kernels."""

from collections.abc import Callable
from typing import Any

import torch
from graphs import GRAPHS, Graph, power_law

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.plan import GraphPlan

# The interpreter takes milliseconds per edge: the same shapes of graph, smaller.
SMALL = {
    **{name: build for name, build in GRAPHS.items() if name != "star"},
    "power_law": lambda: power_law(40, 160),
    "erdos_renyi": lambda: power_law(20, 70, seed=1),
    "duplicate_edges": lambda: _repeated(power_law(12, 30)),
}


def _repeated(graph: Graph) -> Graph:
    return Graph(graph.edge_index.repeat(1, 3), graph.num_nodes)


def plan_of(graph: Graph) -> GraphPlan:
    return GraphPlan.from_edges(*graph.edge_index, graph.num_nodes, graph.num_nodes)


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What the reference and the interpreted kernels return."""
    with use_backend("torch"):
        expected = run()
    with use_backend("interpret"):
        actual = run()
    return expected, actual


def assert_same(run: Callable[[], Any], exact: bool = True, tolerance: float = 1e-5) -> None:
    """Interpreted kernels return what the reference returns, bit for bit where ``exact``."""
    expected, actual = both(run)
    expected, actual = (v if isinstance(v, tuple) else (v,) for v in (expected, actual))
    for want, got in zip(expected, actual, strict=True):
        assert want.dtype == got.dtype
        if exact or not want.is_floating_point():
            assert torch.equal(want, got), f"differ at {(want != got).nonzero()[:5].tolist()}"
        else:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 10)


def ranges(kind: str, rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = {"tensor": (1,), "column": (features,), "row": (rows, 1)}[kind]
    return torch.rand(shape) + 0.1, torch.randn(shape)
