"""Packed and converted models as programs whose edges are an input: saved, loaded and run in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GAT, GCN, GIN, GATConv, GCNConv, GraphConv, GraphSAGE, SAGEConv, TAGConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend

FEATURES = 16
Inputs = tuple[Any, ...]


class Propagation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.propagate = nn.Linear(FEATURES, 8), APPNP(3, 0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(self.lin(x), edge_index)


def graph(nodes: int, edges: int) -> Inputs:
    return torch.randn(nodes, FEATURES), torch.randint(nodes, (2, edges))


def weighted(nodes: int, edges: int) -> Inputs:
    return (*graph(nodes, edges), torch.rand(edges))


def attributed(nodes: int, edges: int) -> Inputs:
    return (*graph(nodes, edges), torch.rand(edges, 3))


def one_bit(nodes: int, edges: int) -> Inputs:
    return (torch.rand(nodes, FEATURES) > 0.7).float(), torch.randint(nodes, (2, edges))


def samples(nodes: int, edges: int) -> Inputs:
    return torch.randn(3, nodes, FEATURES), torch.randint(nodes, (2, edges))


def pair(nodes: int, edges: int) -> Inputs:
    sources = nodes + 5
    ends = torch.stack([torch.randint(sources, (edges,)), torch.randint(nodes, (edges,))])
    return (torch.randn(sources, FEATURES), torch.randn(nodes, FEATURES)), ends


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Inputs]]] = {
    "GCN": (lambda: GCN(FEATURES, 24, 2, 5, norm="batch_norm"), graph),
    "GCN with weights": (lambda: GCNConv(FEATURES, 8, improved=True), weighted),
    "GCN of zeros and ones": (lambda: GCN(FEATURES, 24, 2, 5), one_bit),
    "GraphSAGE": (lambda: GraphSAGE(FEATURES, 24, 2, 5), graph),
    "GraphSAGE, max": (lambda: GraphSAGE(FEATURES, 24, 2, 5, aggr="max"), graph),
    "SAGE of two kinds": (lambda: SAGEConv((FEATURES, FEATURES), 8), pair),
    "GAT": (lambda: GAT(FEATURES, 24, 2, 8, heads=4), graph),
    "GAT with edge features": (lambda: GATConv(FEATURES, 4, heads=2, edge_dim=3), attributed),
    "GATv2": (lambda: GAT(FEATURES, 24, 2, 8, heads=4, v2=True), graph),
    "GIN": (lambda: GIN(FEATURES, 24, 2, 5), graph),
    "GraphConv": (lambda: GraphConv(FEATURES, 8), graph),
    "TAG": (lambda: TAGConv(FEATURES, 8, 2), graph),
    "APPNP": (Propagation, graph),
}


def models(name: str, bits: int = 4) -> tuple[dict[str, nn.Module], Callable[[int, int], Inputs]]:
    make, inputs = CASES[name]
    args = inputs(50, 300)
    qmodel = qgnn.calibrate(qgnn.quantize_model(make(), bits=bits), args, steps=5).eval()
    return {"converted": qmodel, "packed": qgnn.pack_model(qmodel)}, inputs


@pytest.mark.parametrize("name", list(CASES))
@torch.no_grad()
def test_one_program_serves_every_graph(name: str) -> None:
    found, inputs = models(name)
    for kind, model in found.items():
        program = qgnn.export_program(model, inputs(50, 300))
        run = program.module()
        for nodes, edges in ((50, 300), (33, 77), (120, 1001)):
            args = inputs(nodes, edges)
            assert torch.equal(run(*args), model(*args)), kind


@pytest.mark.parametrize("name", ["GCN", "GraphSAGE", "GIN"])
@torch.no_grad()
def test_a_program_has_no_largest_graph(name: str) -> None:
    found, inputs = models(name)
    program = qgnn.export_program(found["packed"], inputs(50, 300))
    assert {str(sizes.upper) for sizes in program.range_constraints.values()} == {"int_oo"}


@torch.no_grad()
def test_strict_export_and_own_shapes() -> None:
    found, inputs = models("GCN")
    shapes = ({0: torch.export.Dim("N", min=2)}, {1: torch.export.Dim("E", min=2)})
    args, other = inputs(50, 300), inputs(9, 20)
    for model in found.values():
        run = torch.export.export(model, args, dynamic_shapes=shapes, strict=True).module()
        assert torch.equal(run(*other), model(*other))


def test_the_edges_are_used() -> None:
    found, inputs = models("GAT")
    program = qgnn.export_program(found["packed"], inputs(50, 300))
    node = next(n for n in program.graph.nodes if n.name == "edge_index")
    assert node.users
    assert not any("holds" in str(n.target) for n in program.graph.nodes)


def test_programs_refuse_what_models_refuse() -> None:
    found, inputs = models("GCN of zeros and ones")
    x, edge_index = inputs(50, 300)
    run = qgnn.export_program(found["packed"], (x, edge_index)).module()
    with pytest.raises(ValueError, match=r"Expected source nodes in the interval \[0, 50\)"):
        run(x, edge_index + 40)
    with pytest.raises(RuntimeError, match=r"Expected 'convs.0.lin.input' to be zero or one value"):
        run(x * torch.rand_like(x), edge_index)
    found, inputs = models("GCN")
    x, edge_index = inputs(50, 300)
    run = qgnn.export_program(found["packed"], (x, edge_index)).module()
    x[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match=r"Expected finite values at 'convs.0.lin.input'"):
        run(x, edge_index)


def test_a_program_that_would_train_without_gradients_of_rounding_is_refused() -> None:
    qmodel = models("GCN")[0]["converted"].train()
    with pytest.raises(ValueError, match=r"in eval mode for torch\.export .got training mode at 'convs.0.lin"):
        torch.export.export(qmodel, graph(50, 300))


def fresh(code: str, *args: Any) -> str:
    """What ``code`` prints in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN = """
    import sys, torch, qgnn_plugin
    cases = torch.load(sys.argv[2])
    load = {"program": lambda p: torch.export.load(p).module(), "package": torch._inductor.aoti_load_package}
    run = load[sys.argv[3]](sys.argv[1])
    with torch.no_grad():
        print(max(float((run(*args) - expected).abs().max()) for args, expected in cases))
"""


def expected(model: nn.Module, inputs: Callable[[int, int], Inputs], path: Path) -> None:
    with torch.no_grad(), use_backend("auto"):
        cases = [(args, model(*args)) for args in (inputs(50, 300), inputs(31, 90))]
    torch.save(cases, path)


@pytest.mark.parametrize("name", ["GCN", "GAT"])
def test_a_fresh_process_runs_a_saved_program(name: str, tmp_path: Path) -> None:
    found, inputs = models(name)
    expected(found["packed"], inputs, tmp_path / "cases.pt")
    torch.export.save(qgnn.export_program(found["packed"], inputs(50, 300)), tmp_path / "model.pt2")
    assert float(fresh(RUN, tmp_path / "model.pt2", tmp_path / "cases.pt", "program")) == 0


@pytest.mark.slow
def test_a_fresh_process_runs_a_package(tmp_path: Path) -> None:
    found, inputs = models("GCN")
    expected(found["packed"], inputs, tmp_path / "cases.pt")
    path = qgnn.export_package(found["packed"], inputs(50, 300), tmp_path / "model.pt2")
    assert float(fresh(RUN, path, tmp_path / "cases.pt", "package")) <= 1e-5


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    found, inputs = models("GCN")
    packed, args = found["packed"], inputs(50, 300)
    with pytest.raises(TypeError, match=r"made by pack_model or quantize_model .got GCN"):
        qgnn.export_program(GCN(4, 4, 1), args)
    with pytest.raises(TypeError, match="as a tuple"):
        qgnn.export_program(packed, args[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in eval mode.*model\.eval"):
        qgnn.export_program(found["converted"].train(), args)
    matrix = torch.sparse_coo_tensor(args[1], torch.ones(300), (50, 50)).coalesce()
    with pytest.raises(ValueError, match=r"an edge_index \[2, E\]"):
        qgnn.export_program(packed, (args[0], matrix))
    with pytest.raises(ValueError, match=r"an edge_index \[2, E\].*export with an edge_index"):
        torch.export.export(packed, (args[0], matrix))
    with pytest.raises(ValueError, match="two nodes, edges"):
        qgnn.export_program(packed, (args[0][:1], args[1]))
    with qgnn.fixed_graph(), pytest.raises(ValueError, match="no context of 'fixed_graph'"):
        qgnn.export_program(packed, args)
    with pytest.raises(ValueError, match=r"ends in '\.pt2'"):
        qgnn.export_package(packed, args, tmp_path / "model.so")
    with pytest.raises(RuntimeError, match=r"no torch\.jit\.trace.*torch\.export"):
        torch.jit.trace(packed, args)


def test_compiled_inference_takes_any_graph() -> None:
    torch._dynamo.reset()
    found, inputs = models("GCN")
    with torch.no_grad():
        for model in found.values():
            run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
            for nodes, edges in ((50, 300), (33, 77), (34, 90)):
                args = inputs(nodes, edges)
                assert torch.equal(run(*args), model(*args))
