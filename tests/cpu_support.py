"""Shared by the tests of the CPU kernels: the reference against the kernels, on several threads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from graphs import GRAPHS
from torch import Tensor

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import pack_codes, top_code
from qgnn_plugin.kernels.plan import GraphPlan

THREADS = (1, 2, 3)
WIDTHS = (1, 7, 40, 64, 257)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plan_of(name: str) -> GraphPlan:
    graph = GRAPHS[name]()
    return GraphPlan.from_edges(*graph.edge_index, graph.num_nodes, graph.num_nodes)


def random_words(rows: int, features: int, bits: int) -> Tensor:
    return pack_codes(torch.randint(0, top_code(bits) + 1, (rows, features)), bits)


def random_range(kind: str, rows: int, features: int) -> dict[str, Tensor]:
    """``scale`` and ``offset``, one per tensor, per column or per row."""
    shape = {"tensor": (1,), "column": (features,), "row": (rows, 1)}[kind]
    return {"scale": torch.rand(shape) + 0.1, "offset": torch.randn(shape)}


def output_range(kind: str, rows: int, features: int, bits: int, spread: float) -> dict[str, Any]:
    """An output range whose codes vary for results of about ``spread``."""
    found = random_range(kind, rows, features)
    step = found["scale"] * spread / top_code(bits)
    return {"out_scale": step, "out_offset": found["offset"] - spread / 2, "out_bits": bits}


def assert_equal(function: Callable[..., Any], *args: Any, tolerance: float = 0.0, **kwargs: Any) -> None:
    """The kernels return what the reference returns: bit for bit, or floats to a tolerance.

    On every number of threads the kernels' own results are the same, bit for bit.
    """
    with use_backend("torch"):
        expected = _tuple(function(*args, **kwargs))
    first = None
    for count in THREADS:
        with threads(count), use_backend("cpu"):
            actual = _tuple(function(*args, **kwargs))
        for want, got in zip(expected, actual, strict=True):
            assert want.dtype == got.dtype
            assert want.shape == got.shape
            if tolerance and want.is_floating_point():
                size = want.abs().max() if want.numel() else 0.0
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(size))
            else:
                wrong = (want != got).nonzero()
                assert not wrong.numel(), f"{len(wrong)} differ, first at {wrong[:5].tolist()}"
        first = first or actual
        for mine, other in zip(first, actual, strict=True):
            assert torch.equal(mine, other), f"differs between 1 and {count} threads"


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
