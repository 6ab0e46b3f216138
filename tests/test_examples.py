"""Each example runs from its command line, for two epochs on a small graph."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import erdos_renyi
from torch_geometric.data import Data

from qgnn_plugin.data import random_split

NUM_CLASSES = 3


def _small_graph(name: str, root: str | None, *, seed: int = 0) -> Data:
    assert (name, root, seed) == ("Cora", "somewhere", 1)
    graph = erdos_renyi(120, 600)
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(120) % NUM_CLASSES
    x = (torch.rand(120, 64, generator=generator) < 0.04).float()
    x[torch.arange(120), y] = 1.0
    data = Data(x=x, edge_index=graph.edge_index, y=y)
    data.update(random_split(data, 10, 10, seed=seed)._asdict())
    return data


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example with the given arguments in an empty folder; returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        module = importlib.import_module(f"examples.{name}")
        monkeypatch.setattr(module, "load_dataset", _small_graph)
        monkeypatch.chdir(tmp_path)
        common = ["--dataset", "Cora", "--root", "somewhere", "--epochs", "2", "--seed", "1"]
        module.main([*common, *arguments])
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["gcn", "gat", "graphsage"])
@pytest.mark.parametrize("bits", ["2", "8"])
def test_example(run: Callable[..., str], name: str, bits: str) -> None:
    printed = run(name, "--bits", bits)
    assert f"weight:{bits}" in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("test accuracy: 0.")
    assert last.endswith(f"in {bits} bits")


def test_graphsage_neighbours(run: Callable[..., str]) -> None:
    assert "SAGEConv" in run("graphsage", "--num-neighbors", "3", "2")


def test_demo_prints_one_table(run: Callable[..., str]) -> None:
    header, _, *rows = run("demo", "--hidden", "16").strip().splitlines()[-6:]
    assert "test accuracy" in header
    assert [row.split()[0] for row in rows] == ["FP32", "INT8", "INT4", "INT2"]
    assert [int(row.split()[3]) for row in rows] == [32, 8, 4, 2]
    sizes = [int(row.split()[4].replace(",", "")) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row.split()[1].endswith("%") for row in rows)


@pytest.mark.parametrize("name", ["gcn", "gat", "graphsage", "demo"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"examples.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert "--dataset" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gcn", "gat", "graphsage"])
def test_examples_stay_short(name: str) -> None:
    source = Path(__file__).parents[1] / "examples" / f"{name}.py"
    assert len(source.read_text().splitlines()) < 120
