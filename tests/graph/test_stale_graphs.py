"""A graph that is changed in any way is another graph, on converted and on packed models."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv, TAGConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.edge_order import few
from qgnn_plugin.kernels.plan import plan_cache

NODES, EDGES, FEATURES = 40, 200, 12


def edges(seed: int) -> Tensor:
    return torch.randint(NODES, (2, EDGES), generator=torch.Generator().manual_seed(seed))


def through_numpy(tensor: Tensor, new: Tensor) -> Tensor:
    tensor.numpy()[...] = new.numpy()
    return tensor


def through_data(tensor: Tensor, new: Tensor) -> Tensor:
    tensor.data.copy_(new)
    return tensor


def assigned_data(tensor: Tensor, new: Tensor) -> Tensor:
    tensor.data = new.clone()
    return tensor


def through_set(tensor: Tensor, new: Tensor) -> Tensor:
    return tensor.set_(new.clone())  # type: ignore[call-overload]


def through_resize(tensor: Tensor, new: Tensor) -> Tensor:
    tensor.resize_(4 * new.numel())  # moves the storage
    tensor.resize_(new.shape)
    tensor.data.copy_(new)
    return tensor


def through_shared_memory(tensor: Tensor, new: Tensor) -> Tensor:
    tensor.share_memory_()
    torch.utils.dlpack.from_dlpack(tensor).copy_(new)  # as another process writes it
    return tensor


def through_dlpack(tensor: Tensor, new: Tensor) -> Tensor:
    np.from_dlpack(tensor)[...] = new.numpy()
    return tensor


def through_torch(tensor: Tensor, new: Tensor) -> Tensor:
    return tensor.copy_(new)


def one_edge(tensor: Tensor, new: Tensor) -> Tensor:
    tensor.numpy()[-1, 17] = (tensor[-1, 17] + 1) % NODES
    return tensor


def two_edges_swapped(tensor: Tensor, new: Tensor) -> Tensor:
    array = tensor.numpy()
    array[0, 3], array[0, 4] = int(array[0, 4]), int(array[0, 3])
    return tensor


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    change.__name__: change
    for change in (
        through_numpy, through_data, assigned_data, through_set, through_resize, through_shared_memory,
        through_dlpack, through_torch, one_edge, two_edges_swapped,
    )
}  # fmt: skip


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: GCNConv(FEATURES, 8),
    "SAGE": lambda: SAGEConv(FEATURES, 8),
    "GIN": lambda: GINConv(nn.Linear(FEATURES, 8)),
    "GAT": lambda: GATConv(FEATURES, 4, heads=2),
    "GATv2": lambda: GATv2Conv(FEATURES, 4, heads=2),
    "APPNP": lambda: APPNP(3, 0.1),
    "TAG": lambda: TAGConv(FEATURES, 8, K=2),
}
WEIGHTED = ("GCN", "APPNP", "TAG")


def models(layer: nn.Module, *args: Any) -> dict[str, nn.Module]:
    qmodel = qgnn.calibrate(qgnn.quantize_model(layer, bits=8), args).eval()
    return {"converted": qmodel, "packed": qgnn.pack_model(qmodel)}


@torch.no_grad()
def check_follows(model: nn.Module, x: Tensor, tensor: Tensor, change: Any, new: Tensor, call: Any) -> None:
    old = call(model, x, tensor).clone()
    tensor = change(tensor, new)
    got, expected = call(model, x, tensor), call(model, x, tensor.clone())
    assert torch.equal(got, expected)
    assert not torch.equal(expected, old)  # or the test shows nothing


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_sees_a_refilled_buffer(layer: str) -> None:
    x = torch.randn(NODES, FEATURES)
    for model in models(LAYERS[layer](), x, edges(0)).values():
        check_follows(model, x, edges(0), through_numpy, edges(1), lambda model, x, e: model(x, e))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_graph_is_seen(change: str, is_sorted: bool, dtype: torch.dtype) -> None:
    x, first, new = torch.randn(NODES, FEATURES), edges(0), edges(1)
    if is_sorted:
        first = first[:, first[1].argsort(stable=True)]
    first, new = first.to(dtype), new.to(dtype)
    for model in models(GCNConv(FEATURES, 8, add_self_loops=False), x, edges(0)).values():
        check_follows(model, x, first.clone(), CHANGES[change], new, lambda model, x, e: model(x, e))


@pytest.mark.parametrize("change", [c for c in CHANGES if "edge" not in c])
@pytest.mark.parametrize("layer", WEIGHTED)
def test_every_change_of_edge_weights_is_seen(layer: str, change: str) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), edges(0)
    weight, new = torch.rand(EDGES) + 0.1, torch.rand(EDGES) + 0.1
    for model in models(LAYERS[layer](), x, edge_index, weight).values():
        check_follows(model, x, weight.clone(), CHANGES[change], new, lambda m, x, w: m(x, edge_index, w))


@pytest.mark.parametrize("fmt", ["csr", "csc", "coo"])
def test_changed_matrices_are_seen(fmt: str) -> None:
    x = torch.randn(NODES, FEATURES)
    dense = (torch.rand(NODES, NODES) < 0.2) * torch.rand(NODES, NODES)
    adj = {"csr": dense.to_sparse_csr, "csc": dense.to_sparse_csc, "coo": dense.to_sparse_coo}[fmt]()
    values = adj._values() if fmt == "coo" else adj.values()
    model = models(GCNConv(FEATURES, 8), x, adj)["packed"]
    with torch.no_grad():
        old = model(x, adj)
        values.numpy()[...] *= np.linspace(0.5, 2, values.numel(), dtype=np.float32)
        got = model(x, adj)
        assert torch.equal(got, model(x, adj.clone()))
    assert not torch.equal(got, old)


def test_a_new_graph_at_an_old_address_is_new() -> None:
    """Moving the old one gives its memory back."""
    x = torch.randn(NODES, FEATURES)
    model = models(GCNConv(FEATURES, 8), x, edges(0))["packed"]
    addresses: set[int] = set()
    met = 0
    for seed in range(40):
        edge_index = edges(seed)
        met += edge_index.data_ptr() in addresses
        addresses.add(edge_index.data_ptr())
        with torch.no_grad():
            assert torch.equal(model(x, edge_index), model(x, edge_index.clone())), seed
        edge_index.share_memory_()
        del edge_index
    assert met > 0


def test_learned_edge_weights_are_followed() -> None:
    x, edge_index = torch.randn(NODES, FEATURES), edges(0)
    weight = torch.rand(EDGES).requires_grad_()
    model = models(GCNConv(FEATURES, 8), x, edge_index, weight.detach())["converted"]
    for _ in range(2):
        out = model(x, edge_index, weight)
        assert torch.equal(out, model(x, edge_index.clone(), weight.detach().clone()))
        weight.data.mul_(torch.linspace(0.5, 2, EDGES))


def test_a_plan_holds_no_memory_of_the_callers() -> None:
    """A sorted int32 edge index, whose columns would be the plan's as they are, written while the plan lives."""
    from qgnn_plugin.graph.adjacency import gcn_graph

    edge_index = edges(0)
    edge_index = edge_index[:, edge_index[1].argsort(stable=True)].to(torch.int32).contiguous()
    weight = torch.rand(EDGES)
    graph = gcn_graph(edge_index, weight, NODES, add_self_loops=False)
    before = graph.apply(torch.eye(NODES))
    edge_index.numpy()[...] = 1 << 30
    weight.numpy()[...] = float("nan")
    assert torch.equal(graph.apply(torch.eye(NODES)), before)
    with pytest.raises(ValueError, match="in the interval"):
        gcn_graph(edge_index, None, NODES, add_self_loops=False)


@pytest.mark.parametrize("form", ["converted", "packed"])
def test_a_refilled_buffer_takes_one_place_in_the_cache(form: str) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), edges(0)
    model = models(GCNConv(FEATURES, 8), x, edge_index)[form]
    plan_cache.clear()
    few._graphs.clear()
    for seed in range(5):
        through_numpy(edge_index, edges(seed))
        with torch.no_grad():
            model(x, edge_index)
    assert len(plan_cache) + len(few._graphs) == 1


def test_packed_words_written_without_a_trace_are_read_again() -> None:
    x = torch.randn(NODES, FEATURES)
    packed = models(nn.Linear(FEATURES, 8), x)["packed"]
    packed(x)
    with torch.no_grad():
        packed.words.data.copy_(packed.words.flip(0))  # type: ignore[operator, union-attr]
        got = packed(x)
        packed.words = packed.words.clone()  # type: ignore[operator]
        assert torch.equal(got, packed(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_during_a_lookup_does_not_deadlock() -> None:
    program = """
        import os, sys, torch
        from qgnn_plugin.kernels.plan import graph_plan, plan_cache
        edge_index = torch.tensor([[0, 1], [1, 0]])
        graph_plan(edge_index, (2, 2))
        plan_cache._lock.acquire()  # as another thread would hold it
        child = os.fork()
        if child == 0:
            graph_plan(edge_index, (2, 2))
            os._exit(0)
        sys.exit(os.waitpid(child, 0)[1])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=60, check=True)
