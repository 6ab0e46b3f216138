"""A small graph and what a short training of it leaves behind, shared by the tests of all commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import erdos_renyi
from torch_geometric.data import Data

from qgnn_plugin.cli import main
from qgnn_plugin.data import random_split

CLASSES = 3


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def graph(folder: Path) -> Path:
    """A saved ``Data`` with masks."""
    generator = torch.Generator().manual_seed(0)
    edges = erdos_renyi(90, 400).edge_index
    y = torch.arange(90) % CLASSES
    x = torch.rand(90, 12, generator=generator)
    x[torch.arange(90), y] += 2.0
    data = Data(x=x, edge_index=edges, y=y)
    data.update(random_split(data, 10, 10, seed=0)._asdict())
    torch.save(data, folder / "graph.pt")
    return folder / "graph.pt"


@pytest.fixture(scope="session")
def trained(folder: Path, graph: Path) -> Path:
    """The folder that ``qgnn train --out`` has written."""
    out = folder / "models"
    options = ["--dataset", graph, "--hidden", 8, "--epochs", 4, "--bits", 4, "--out", out]
    assert main(["train", *map(str, options)]) == 0
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; returns its exit code and what it printed to either stream."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
