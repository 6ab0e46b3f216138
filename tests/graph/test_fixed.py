"""A graph that is a constant of compiled or exported code: other graphs, and other edge weights, are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph.test_stale_graphs import EDGES, FEATURES, LAYERS, NODES, WEIGHTED, edges, models
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.plan import plan_cache

REFUSED = r"compile it again inside a new 'with qgnn_plugin\.fixed_graph\(\):'"


def compiled(model: nn.Module, backend: str = "eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def exported(model: nn.Module, *args: Any, strict: bool = False) -> Any:
    return torch.export.export(model, args, strict=strict).module()


def check_refuses_others(call: Any, *args: Any, others: dict[int, Any]) -> None:
    for position, other in others.items():
        changed = (*args[:position], other, *args[position + 1 :])
        with pytest.raises(ValueError, match=REFUSED):
            call(*changed)


@pytest.mark.parametrize("kind", ["converted", "packed"])
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_inference_refuses_another_graph(layer: str, kind: str) -> None:
    torch._dynamo.reset()
    x, weighted = torch.randn(NODES, FEATURES), layer in WEIGHTED
    args = (x, edges(0), torch.rand(EDGES)) if weighted else (x, edges(0))
    others = {1: edges(1), 2: torch.rand(EDGES)} if weighted else {1: edges(1)}
    model = models(LAYERS[layer](), *args)[kind]
    with qgnn.fixed_graph():
        expected = model(*args)
        calls = [compiled(model), exported(model, *args)]
        fresh = [arg.clone() for arg in args]
        for call in calls:
            assert torch.equal(call(*args), expected)
            assert torch.equal(call(*fresh), expected)  # the same graph elsewhere
            check_refuses_others(call, *args, others=others)
    for call in calls:  # outside as inside
        assert torch.equal(call(*args), expected)
        check_refuses_others(call, *args, others=others)


@pytest.mark.parametrize(("layer", "backend"), [*((layer, "eager") for layer in LAYERS), ("GCN", "aot_eager")])
def test_training_refuses_another_graph(layer: str, backend: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(NODES, FEATURES)
    model = models(LAYERS[layer](), x, edges(0))["converted"].train()
    with qgnn.fixed_graph():
        model(x.requires_grad_(), edges(0)).sum().backward()
        step = compiled(model, backend)
        step(x, edges(0)).sum().backward()
        with pytest.raises(ValueError, match=REFUSED):
            step(x, edges(1)).sum().backward()


@torch.no_grad()
def test_a_buffer_refilled_without_a_trace_is_refused() -> None:
    torch._dynamo.reset()
    x, edge_index = torch.randn(NODES, FEATURES), edges(0)
    model = models(GCNConv(FEATURES, 8), x, edge_index)["packed"]
    with qgnn.fixed_graph():
        model(x, edge_index)
        calls = [compiled(model), exported(model, x, edge_index)]
        calls[0](x, edge_index)
        edge_index.numpy()[0, 5] = (edge_index[0, 5] + 1) % NODES
        for call in calls:
            with pytest.raises(ValueError, match=REFUSED):
                call(x, edge_index)


@pytest.mark.parametrize(("nodes", "num_edges"), [(NODES, EDGES), (NODES + 7, EDGES), (NODES, EDGES - 9)])
@torch.no_grad()
def test_a_new_context_compiles_anew(nodes: int, num_edges: int) -> None:
    torch._dynamo.reset()
    x = torch.randn(nodes, FEATURES)
    model = models(GCNConv(FEATURES, 8), x, edges(0))["packed"]
    first = (torch.randn(NODES, FEATURES), edges(0))
    second = (x, edges(1)[:, :num_edges].contiguous())
    for args in (first, second):
        with qgnn.fixed_graph():
            expected = model(*args)
            assert torch.equal(compiled(model)(*args), expected)
        assert torch.equal(compiled(model)(*args), expected)


@torch.no_grad()
def test_an_exported_program_is_guarded_after_it_is_saved(tmp_path: Any) -> None:
    x = torch.randn(NODES, FEATURES)
    model = models(GCNConv(FEATURES, 8), x, edges(0))["packed"]
    with qgnn.fixed_graph():
        expected = model(x, edges(0))
        program = torch.export.export(model, (x, edges(0)))
    torch.export.save(program, tmp_path / "model.pt2")
    for loaded in (torch.export.load(tmp_path / "model.pt2"), program.run_decompositions()):
        assert torch.equal(loaded.module()(x, edges(0)), expected)
        with pytest.raises(ValueError, match=REFUSED):
            loaded.module()(x, edges(1))


@pytest.mark.parametrize("kind", ["converted", "packed"])
def test_what_cannot_be_traced_says_what_to_do(kind: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(NODES, FEATURES)
    model = models(GCNConv(FEATURES, 8), x, edges(0))[kind]
    with pytest.raises(RuntimeError, match=r"no torch\.jit\.trace.*use torch\.export.*edge_index as an input"):
        torch.jit.trace(model, (x, edges(0)), check_trace=False)
    if kind == "converted":  # for training; for inference the plan is part of the program
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call the model once.*fixed_graph"):
            compiled(model)(x, edges(0))
        torch._dynamo.reset()
    broken = torch.compile(model, backend="eager")  # looks graphs up in Python
    for seed in range(2):
        assert torch.equal(broken(x, edges(seed)), model(x, edges(seed)))


# Eager calls inside ###################################################################################################


def test_one_graph_of_a_size_is_accepted_wherever_it_is() -> None:
    x, edge_index = torch.randn(NODES, FEATURES), edges(0)
    model = models(GCNConv(FEATURES, 8), x, edge_index)["packed"]
    with qgnn.fixed_graph():
        expected = model(x, edge_index)
        plan_cache.clear()  # as other graphs push a plan out
        assert torch.equal(model(x, edge_index), expected)
        assert torch.equal(model(x, edge_index.clone()), expected)
        with pytest.raises(ValueError, match="one graph inside 'fixed_graph'"):
            model(x, edges(1))
        model(x, edge_index, torch.rand(EDGES))  # with weights it is another kind


def test_learned_edge_weights_are_no_constant() -> None:
    torch._dynamo.reset()
    x, edge_index = torch.randn(NODES, FEATURES), edges(0)
    weight = (torch.rand(EDGES) + 0.1).requires_grad_()
    model = models(GCNConv(FEATURES, 8), x, edge_index, weight.detach())["converted"].train()

    def gradient(call: Callable[..., Tensor], edge_index: Tensor) -> Tensor:
        return torch.autograd.grad(call(x, edge_index, weight).square().sum(), weight)[0]

    with qgnn.fixed_graph():
        for _ in range(2):
            gradient(model, edge_index)
        step = compiled(model, "aot_eager")
        for factor in (1.0, 1.5):
            with torch.no_grad():
                weight.mul_(factor)
            torch.testing.assert_close(gradient(step, edge_index), gradient(model, edge_index))
        with pytest.raises(ValueError, match=REFUSED):
            gradient(step, edges(1))


def test_another_thread_has_its_own_context() -> None:
    x = torch.randn(NODES, FEATURES)
    model = models(GCNConv(FEATURES, 8), x, edges(0))["packed"]
    errors: list[Exception] = []

    def serve() -> None:
        try:
            for seed in range(3):
                assert torch.equal(model(x, edges(seed)), model(x, edges(seed).clone()))
        except Exception as error:
            errors.append(error)

    with qgnn.fixed_graph():
        model(x, edges(0))
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    assert errors == []


@torch.no_grad()
def test_code_compiled_in_one_thread_runs_in_another() -> None:
    torch._dynamo.reset()
    x = torch.randn(NODES, FEATURES)
    model = models(GCNConv(FEATURES, 8), x, edges(0))["packed"]
    with qgnn.fixed_graph():
        expected = model(x, edges(0))
        call = compiled(model)
        call(x, edges(0))
    found: list[Any] = []

    @torch.no_grad()
    def serve() -> None:
        try:
            found.append(call(x, edges(0)))
            call(x, edges(1))
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)
    assert "fixed_graph" in found[1]


@pytest.mark.parametrize("kind", ["converted", "packed"])
@torch.no_grad()
def test_graphs_in_other_formats_are_guarded(kind: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(NODES, FEATURES)
    model = models(SAGEConv(FEATURES, 8), x, edges(0))[kind]

    def matrix(edge_index: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(edge_index.flip(0), torch.ones(EDGES), (NODES, NODES)).coalesce()

    formats: dict[str, Callable[[Tensor], Any]] = {
        "EdgeIndex": lambda e: EdgeIndex(e, sparse_size=(NODES, NODES)),
        "coo": matrix,
        "csr": lambda e: matrix(e).to_sparse_csr(),
    }
    for name, make in formats.items():
        first = make(edges(0))
        with qgnn.fixed_graph():
            expected = model(x, first)
            calls = [exported(model, x, first), *([compiled(model)] if name == "EdgeIndex" else [])]
            for call in calls:  # compilers take no sparse matrices
                assert torch.equal(call(x, first), expected)
                with pytest.raises(ValueError, match=REFUSED):
                    call(x, make(edges(1)) if name == "EdgeIndex" else _permuted(first))


def _permuted(matrix: Tensor) -> Tensor:
    """A matrix of as many entries in other places."""
    coo = matrix.to_sparse_coo().coalesce()
    moved = torch.sparse_coo_tensor((coo.indices() + 1) % NODES, coo.values(), coo.shape).coalesce()
    return moved if matrix.layout == torch.sparse_coo else moved.to_sparse_csr()
