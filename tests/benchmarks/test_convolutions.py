"""The benchmark of all convolutions: which there are, that each runs, and what its figures say."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.nn import conv as pyg

from benchmarks.convolution_cases import CASES, LEFT_OUT, Graph, Twice
from benchmarks.convolutions import Figures, markdown, measure


def test_every_exported_convolution_is_measured_or_left_out_for_a_reason():
    measured = {name.partition(" of ")[0] for name in CASES}
    assert measured | set(LEFT_OUT) == set(pyg.__all__)
    assert not measured & set(LEFT_OUT)


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_in_floats(name):
    case, graph, width = CASES[name], Graph(400, 2_000), 16
    with torch.no_grad():
        out = Twice(lambda: case.make(width, graph)).eval()(*case.arguments(graph, width))
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
    assert all(part.isfinite().all() for part in parts)


def test_figures_of_a_small_graph():
    found = measure("GINEConv", nodes=300, edges=1_500, width=16, memory_width=16, rounds=2)
    assert found.path == "generated kernel"
    assert found.speed > 0
    assert found.float_ms > 0
    assert 0 < found.error < 1


def test_memory_is_packed_over_float():
    figures = Figures("A", "kernel", 2.0, 10.0, 5.0, 4_000_000, 1_000_000, 0.1)
    assert figures.memory == 0.25
    line = "| A | kernel | 2.00 | 10 | 5 | 0.25 (1 / 4 MB) | 0.100 |"
    assert markdown([figures])[2:] == [line]
