"""The benchmark of graph-level tasks: its data, its folds, a run of it, and what its table says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch_geometric.utils import to_dense_adj

from benchmarks import graph_tasks, graphs
from benchmarks.graph_tasks import TASKS, circular_skip_links


def test_circular_skip_links() -> None:
    """150 4-regular graphs of 41 nodes; classes differ in how many closed walks of each length there are."""
    data = circular_skip_links()
    assert len(data) == 150
    closed = {}
    for graph in data:
        adjacency = to_dense_adj(graph.edge_index, max_num_nodes=41)[0].double()
        assert bool((adjacency.sum(0) == 4).all())
        assert torch.equal(adjacency, adjacency.t())
        walks, counts = adjacency, []
        for _ in range(7):
            walks = walks @ adjacency
            counts.append(round(float(walks.trace())))
        closed.setdefault(int(graph.y), set()).add(tuple(counts))
        # Eigenvectors of the Laplacian: orthogonal to each other and to constants, sqrt(41) long.
        torch.testing.assert_close(graph.x.t() @ graph.x, 41 * torch.eye(20), rtol=1e-3, atol=1e-2)
        assert float(graph.x.sum(0).abs().max()) < 1e-2
    assert {len(counts) for counts in closed.values()} == {1}
    assert len(set().union(*closed.values())) == 10


def test_folds_share_nothing_and_are_stratified() -> None:
    data, task = circular_skip_links(), TASKS["CSL"]
    tested = []
    for run in range(task.runs):
        split = task.split(data, run)
        assert [len(part) for part in (split.train, split.val, split.test)] == [90, 30, 30]
        assert len({id(graph) for part in (split.train, split.val, split.test) for graph in part}) == 150
        assert torch.bincount(torch.cat([graph.y for graph in split.test])).tolist() == [3] * 10
        tested += [id(graph) for graph in split.test]
    assert len(set(tested)) == 150


def test_a_run_is_kept_and_its_table_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(TASKS["CSL"], float_epochs=2, epochs=1)
    monkeypatch.setitem(graph_tasks.TASKS, "CSL", small)
    monkeypatch.setattr(graphs, "COLUMNS", ("FP32", "INT2"))
    path = tmp_path / "graphs-runs" / "CSL--0.json"
    path.parent.mkdir()
    assert graphs._work(("CSL", 0, "", path)).startswith("CSL 0: FP32 0.")
    cell = json.loads(path.read_text())
    assert set(cell["results"]) == {"FP32", "INT2"}
    table = graphs.report(tmp_path)
    assert "| CSL | accuracy | 1 of 5 |" in table
    path.unlink()  # what a report holds is not run again
    assert [(c["task"], c["run"]) for c in graphs._load(tmp_path)] == [("CSL", 0)]
    monkeypatch.setitem(graph_tasks.TASKS, "CSL", dataclasses.replace(small, epochs=3))
    assert graphs._load(tmp_path) == []  # of other settings


def test_aims_of_accuracy_and_of_errors() -> None:
    def cell(task: str, **tests: float) -> dict:
        return {"task": task, "run": 0, "results": {column: {"test": value} for column, value in tests.items()}}

    table = graphs.markdown(
        [
            cell("CSL", FP32=0.99, INT8=0.99, INT4=0.99, INT2=0.97),
            cell("ESOL", FP32=0.500, INT8=0.5, INT4=0.505, INT2=0.6),
        ]
    )
    assert "- CSL, INT2: loses 2.0 points (aim: at most 1), missed" in table
    assert "- ESOL, INT4: loses 1.0 % (aim: at most 2), met" in table
