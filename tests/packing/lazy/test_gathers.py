"""Rows that a model's own code gathers for its edges, and what its networks of edges make of them, by blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import quantized
from torch import Tensor, nn

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.lazy.deferred import DeferredTensor, Pending

NODES, EDGES, WIDTH, OUT = 40, 20_000, 8, 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "FEWEST_GATHERED", 1 << 12)
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 1 << 12)


@pytest.fixture
def graph() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(NODES, WIDTH), torch.randint(NODES, (2, EDGES)), torch.randn(EDGES, 3)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of results that are computed as floats."""
    found, own = [], Pending.materialize

    def materialize(self: Any) -> Tensor:
        value = own(self)
        found.append(value.shape)
        return value

    monkeypatch.setattr(Pending, "materialize", materialize)
    return found


class Network(nn.Module):
    """A network of edges, whose ends a function gathers."""

    def __init__(self, gather: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gather = gather
        self.mlp = nn.Sequential(
            nn.Linear(2 * WIDTH + 3, OUT), nn.BatchNorm1d(OUT), nn.ReLU(), nn.Linear(OUT, OUT), nn.LayerNorm(OUT),
            nn.Softplus(), nn.Linear(OUT, OUT),
        )  # fmt: skip

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        ends = [self.gather(x, index) for index in edge_index]
        return (self.mlp(torch.cat([*ends, edge_attr], -1)) * edge_attr[:, :1]).sum(-1)


def _changed(x: Tensor, index: Tensor) -> Tensor:
    """What is gathered stays what it was, whatever is written to what it is of."""
    rows = x[index]
    saved = x.clone()
    x.fill_(1000.0)
    out = rows * 2
    x.copy_(saved)
    return out


GATHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brackets": lambda x, index: x[index],
    "index_select": lambda x, index: x.index_select(0, index),
    "function": lambda x, index: torch.index_select(x, 0, index).relu(),
    "negative": lambda x, index: x[index - NODES],
    "of sums": lambda x, index: (x + x.relu())[index] - x.abs()[index],
    "changed": _changed,
}


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", GATHERS)
def test_networks_of_edges_run_by_blocks(
    name: str, backend: str, graph: tuple[Tensor, Tensor, Tensor], written: list[torch.Size]
) -> None:
    qmodel = quantized(Network(GATHERS[name]), *graph).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad(), use_backend(backend):
        assert torch.equal(packed(*graph), qmodel(*graph))
    assert not [shape for shape in written if shape.numel() >= EDGES * OUT]


def test_nothing_else_is_seen(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    seen: list[type] = []

    def gather(x: Tensor, index: Tensor) -> Tensor:
        seen.extend(type(t) for t in (x[index[:50]], x[:3], x[index].double(), x[index, 0], index[index % 5]))
        with pytest.raises(IndexError):
            x[index + NODES]
        return x[index]

    packed = qgnn.pack_model(quantized(Network(gather), *graph).eval())
    seen.clear()
    with torch.no_grad():
        packed(*graph)
    assert set(seen) == {Tensor}


def test_rows_are_gathered_in_a_packed_model_alone(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    x, edge_index, _ = graph
    assert type(x[edge_index[0]]) is Tensor
    assert not isinstance(torch.index_select(x, 0, edge_index[0]), DeferredTensor)


class Apart(nn.Module):
    """How far the ends of edges are apart, in one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(1, 4)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        first = x.sum(1, keepdim=True)
        out: Tensor = self.lin(first[edge_index[0]] - first[edge_index[1]])
        return out


def test_rows_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block gathers is no other gather of the model's, however little that has to be."""
    for name, value in (("FEWEST_GATHERED", 1), ("FEWEST_INDICES", 1), ("BLOCK_FLOATS", 1 << 9), ("FEW_RESULTS", 0)):
        monkeypatch.setattr(sizes, name, value)
    graph = torch.randn(100, 3), torch.randint(100, (2, 700))
    qmodel = qgnn.calibrate(qgnn.quantize_model(Apart(), bits=4), [graph]).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad(), use_backend("cpu"):
        assert torch.equal(packed(*graph), qmodel(*graph))
