"""Small graphs computed as large ones: every layer and model of PyG, by many blocks and without short ways.

What a packed model does depends on how much there is: results are computed by blocks of rows or of edges, gathers are
noted, networks of edges are computed with the rows that read them.  Small graphs take none of these ways unless the
sizes from which on they are taken are small too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import conv as pyg

import qgnn_plugin as qgnn
from benchmarks.convolution_cases import CASES, EDGE, Case, Graph
from benchmarks.model_cases import MODELS
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.packing.lazy import sizes

pytest.importorskip("numba")

SMALL = {
    "BLOCK_FLOATS": 1 << 9, "FEWEST_GATHERED": 1, "FEWEST_INDICES": 1, "FEW_RESULTS": 0, "EDGE_BLOCK_FLOATS": 1 << 9,
    "FEWEST_EDGES": 16, "MOST_EDGES": 64,
}  # fmt: skip
WIDTH, CLASSES, TARGETS = 16, 5, 150


class Ordered(Graph):
    """Edges by their targets, which is the order that kernels take them in."""

    @cached_property
    def edge_index(self) -> Tensor:
        edges = torch.randint(self.nodes, (2, self.edges), generator=self._random(0))
        return edges[:, edges[1].argsort(stable=True)]


GRAPH, OTHER = Graph(200, 1_600), Ordered(200, 1_750, seed=1)


@pytest.fixture(autouse=True)
def as_large(reference_backend: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of a few rows or edges, on the kernels."""
    for name, value in SMALL.items():
        monkeypatch.setattr(sizes, name, value)
    with use_backend("cpu"):
        yield


def each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return {k: function(v) for k, v in value.items()} if isinstance(value, dict) else function(value)


class Stack(nn.Module):
    """Two convolutions with what models have around them: norm, ReLU, dropout, residual, and all results joined."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([make(), make()])
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)])
        self.dropout, self.out = nn.Dropout(0.5), nn.Linear(2 * WIDTH, CLASSES)
        for norm in self.norms:
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Any, *rest: Any) -> Any:
        first = self._after(0, self.convs[0](x, *rest))
        if isinstance(first, dict):
            second = self.convs[1](first, *rest)
            second = self._after(1, {k: second[k] + first[k] for k in second})
            return {k: self.out(torch.cat([first[k], second[k]], dim=-1)) for k in second}, second
        # Layers of layers: the first's result is the newest.
        h = first if x.dim() == 2 else torch.cat([x[:, 1:], first.unsqueeze(1)], dim=1)
        second = self._after(1, self.convs[1](h, *rest) + first)
        return self.out(torch.cat([first, second], dim=-1)), second

    def _after(self, k: int, h: Any) -> Any:
        return each(lambda y: self.dropout(self.norms[k](y).relu()), h)


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, (dict, list, tuple)):
        return [t for part in (out.values() if isinstance(out, dict) else out) for t in tensors(part)]
    return [out] if isinstance(out, Tensor) else []


def copies(out: Any) -> list[Tensor]:
    return [t.clone() for t in tensors(out)]


def expect(found: Any, expected: Any) -> None:
    assert len(tensors(found)) == len(tensors(expected)) > 0
    for got, want in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def compare(model: nn.Module, *graphs: tuple[Any, ...], writes: bool = True) -> None:
    """Packed with converted, on calls one after another; results and arguments belong to whoever calls."""
    model.eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=4), [graphs[0]], method="ranges").eval()
    packed = qgnn.pack_model(qmodel)
    expected, given = [qmodel(*args) for args in graphs], copies(graphs)
    first = packed(*graphs[0])
    kept = copies(first)
    expect(first, expected[0])
    second = packed(*graphs[0])
    assert all(map(torch.equal, tensors(second), kept))
    for t in tensors(second) if writes else ():
        t.zero_()
    for args, wanted in zip(graphs[::-1], expected[::-1], strict=True):
        expect(packed(*args), wanted)
    assert all(map(torch.equal, tensors(first), kept))
    assert all(map(torch.equal, tensors(graphs), given))


@pytest.mark.parametrize("name", CASES)
def test_stacks_of_every_convolution(name: str) -> None:
    case = CASES[name]
    compare(Stack(lambda: case.make(WIDTH, GRAPH)), *(case.arguments(graph, WIDTH) for graph in (GRAPH, OTHER)))


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str) -> None:
    case: Case = MODELS[name]
    model, given = case.model(WIDTH, GRAPH), [case.arguments(graph, WIDTH) for graph in (GRAPH, OTHER)]
    compare(model, *given, writes=name != "MetaPath2Vec")  # which returns its packed table, to be read only


def _mlp(*widths: int) -> nn.Module:
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2]))


PAIR = (WIDTH, WIDTH)
# Between two sets of nodes; the names of what they are called with beside the features and edges.
BIPARTITE: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "CGConv": (lambda: pyg.CGConv(PAIR, EDGE), ("edge_attr",)),
    "EdgeConv": (lambda: pyg.EdgeConv(_mlp(2 * WIDTH, WIDTH, WIDTH)), ()),
    "FeaStConv": (lambda: pyg.FeaStConv(WIDTH, WIDTH, heads=2), ()),
    "FiLMConv": (lambda: pyg.FiLMConv(PAIR, WIDTH), ()),
    "GATConv": (lambda: pyg.GATConv(PAIR, WIDTH // 4, heads=4, add_self_loops=False), ()),
    "GATv2Conv": (lambda: pyg.GATv2Conv(PAIR, WIDTH // 4, heads=4, add_self_loops=False), ()),
    "GENConv": (lambda: pyg.GENConv(PAIR, WIDTH, edge_dim=EDGE), ("edge_attr",)),
    "GeneralConv": (lambda: pyg.GeneralConv(PAIR, WIDTH, EDGE, attention=True), ("edge_attr",)),
    "GINConv": (lambda: pyg.GINConv(_mlp(WIDTH, WIDTH, WIDTH)), ()),
    "GINEConv": (lambda: pyg.GINEConv(_mlp(WIDTH, WIDTH, WIDTH), edge_dim=EDGE), ("edge_attr",)),
    "GMMConv": (lambda: pyg.GMMConv(PAIR, WIDTH, EDGE, 3), ("edge_attr",)),
    "GraphConv": (lambda: pyg.GraphConv(PAIR, WIDTH), ("edge_weight",)),
    "LEConv": (lambda: pyg.LEConv(PAIR, WIDTH), ()),
    "MFConv": (lambda: pyg.MFConv(PAIR, WIDTH, max_degree=4), ()),
    "NNConv": (lambda: pyg.NNConv(PAIR, WIDTH, _mlp(EDGE, 4, WIDTH * WIDTH)), ("edge_attr",)),
    "ResGatedGraphConv": (lambda: pyg.ResGatedGraphConv(PAIR, WIDTH, edge_dim=EDGE), ("edge_attr",)),
    "SAGEConv": (lambda: pyg.SAGEConv(PAIR, WIDTH), ()),
    "TransformerConv": (lambda: pyg.TransformerConv(PAIR, WIDTH // 4, heads=4, edge_dim=EDGE), ("edge_attr",)),
}


class Bipartite(nn.Module):
    """A convolution from one set of nodes to another, of features that two linear maps give."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv, self.out = conv, nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        h = self.target(y).relu()
        sent = self.conv((self.source(x).relu(), h), *rest)
        return self.out(torch.cat([h, sent.relu()], dim=-1)), sent


@pytest.mark.parametrize("name", BIPARTITE)
def test_from_one_set_of_nodes_to_another(name: str) -> None:
    make, more = BIPARTITE[name]
    given = []
    for graph in (GRAPH, OTHER):
        edges = torch.stack([graph.edge_index[0], graph.edge_index[1] * TARGETS // graph.nodes])
        rest = [value() if callable(value) else value for value in (getattr(graph, name) for name in more)]
        given.append((graph.x(WIDTH), graph.x(WIDTH)[:TARGETS] + 0.5, edges, *rest))
    compare(Bipartite(make()), *given)


def test_no_size_is_copied_into_a_module_that_reads_it() -> None:
    """One place to set it: what is imported by name keeps its value."""
    package, names = Path(qgnn.__file__).parent, {name for name in vars(sizes) if name.isupper()}
    assert SMALL.keys() <= names
    copied = [
        (path.name, alias.name)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in names and (node.module or "").endswith("sizes")
    ]
    assert copied == []
