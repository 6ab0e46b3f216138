"""Each example of a task runs from its command line, for an epoch on a small data set, and tells the truth about it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# Sizes of generated data, and how many rows of the summary have to run packed.
TASKS: dict[str, tuple[dict[str, int], int]] = {
    "link_prediction": ({"users": 40, "items": 30, "each": 10}, 5),
    "graph_classification": ({"count": 150}, 10),
    "graph_regression": ({"count": 160}, 12),
    "heterogeneous": ({"papers": 60, "authors": 30, "venues": 6}, 24),
    "point_cloud": ({"count": 64}, 6),
    "potential": ({"count": 48, "atoms": 5}, 14),
    "temporal": ({"nodes": 40, "events": 400}, 9),
}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, list[str]]]:
    """Runs an example on little data in an empty folder; returns its module and the lines it printed."""

    def run(name: str, *arguments: str) -> tuple[Any, list[str]]:
        module = importlib.import_module(f"examples.{name}")
        monkeypatch.setattr(module, "generated", partial(module.generated, **TASKS[name][0]))
        monkeypatch.chdir(tmp_path)
        module.main(["--epochs", "2", *arguments])
        assert not list(tmp_path.iterdir())
        return module, capsys.readouterr().out.strip().splitlines()

    return run


@pytest.mark.parametrize("name", TASKS)
def test_task(run: Callable[..., tuple[Any, list[str]]], name: str) -> None:
    lines = run(name, "--bits", "8")[1]
    assert sum(" packed: " in line for line in lines) >= TASKS[name][1]
    assert not any(" float: " in line for line in lines)
    header, _, *rows = (re.split(r"  +", line.strip()) for line in lines[-5:])
    assert [row[0] for row in rows] == ["float", "INT8", "packed"]
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert all(0 <= float(row[header[1]]) < 10 for row in cells)
    assert float(cells[2]["smaller"].removesuffix("x")) > 1.5
    if name != "temporal":  # whose memory is of other codes once it is packed
        assert cells[1][header[1]] == cells[2][header[1]]
    else:
        assert int(cells[2]["memory bytes"].replace(",", "")) < int(cells[1]["memory bytes"].replace(",", "")) / 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 120


@pytest.mark.parametrize("name", TASKS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"examples.{name}").main(["--help"])
    assert "--bits" in capsys.readouterr().out


def test_generated_forces_are_gradients() -> None:
    """Of energies by a second path: central differences of the Morse energies in float64."""
    module = importlib.import_module("examples.potential")
    torch.manual_seed(0)
    data = module.generated(count=1, atoms=4)[0]
    pos, step = data.pos.double(), 1e-5

    def energy(pos: torch.Tensor) -> torch.Tensor:
        depth = torch.tensor([[1.0, 0.6], [0.6, 0.3]], dtype=torch.float64)
        width = torch.tensor([[1.5, 1.8], [1.8, 2.1]], dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(4):
            for j in range(i):
                pair = data.z[i], data.z[j]
                total += depth[pair] * ((1 - torch.exp(width[pair] - (pos[i] - pos[j]).norm())) ** 2 - 1)
        return total

    for atom in range(4):
        for axis in range(3):
            moved = torch.zeros_like(pos)
            moved[atom, axis] = step
            slope = (energy(pos + moved) - energy(pos - moved)) / (2 * step)
            torch.testing.assert_close(data.force[atom, axis].double(), -slope, rtol=1e-3, atol=1e-4)


def test_recall_counts_what_is_found() -> None:
    """Two users and exact embeddings: one has all its held-out items first, the other none of them in the first 20."""
    module = importlib.import_module("examples.link_prediction")
    items = 60
    pairs = module.Pairs(
        torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 5], [0, 6], [1, 50], [1, 51], [1, 52]]), 2, items
    )
    z = torch.zeros(2 + items, 2)
    z[0, 0] = z[1, 1] = 1.0
    z[2:, 0] = torch.tensor([-((item - 5.4) ** 2) for item in range(items)])
    z[2:, 1] = -torch.arange(items).float()

    class Table:
        def get_embedding(self, edge_index: torch.Tensor) -> torch.Tensor:
            assert edge_index.max() < 2 + items
            return z

    assert module.score(Table(), pairs) == pytest.approx({"recall@20": 0.5, "NDCG@20": 0.5})
