"""The short way of packed convolutions is the long way bit for bit, and nobody takes it who looks at the call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from cpu_support import threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import has_numba, use_backend
from qgnn_plugin.kernels.edge_order import few as small
from qgnn_plugin.kernels.plan import pinned_plans
from qgnn_plugin.packing.direct.attention import direct_gat
from qgnn_plugin.packing.direct.convs import direct_gcn, direct_gin, direct_sage
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.lazy.deferred import DeferredTensor
from qgnn_plugin.packing.lazy.sizes import FEW_RESULTS

pytestmark = pytest.mark.skipif(not has_numba(), reason="kernels of the CPU are compiled by numba")
WIDTH, CHANNELS, NODES = 19, 35, 23


@pytest.fixture(autouse=True)
def cpu_backend() -> Iterator[None]:
    with use_backend("cpu"):
        yield


class Watching(TorchDispatchMode):
    """Looks at every operation, which is then run as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def network(num_in: int, num_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_in, num_out), nn.ReLU(), nn.Linear(num_out, num_out))


FOUR_HEADS = "GAT, four heads"  # side by side, so that widths which four does not divide cannot be stacked
Layer = Callable[[int, int], nn.Module]
LAYERS: dict[str, Layer] = {
    "GCN": GCNConv,
    "GCN as it is": lambda i, o: GCNConv(i, o, normalize=False, bias=False),
    "GCN without loops": lambda i, o: GCNConv(i, o, add_self_loops=False),
    "GCN reversed": lambda i, o: GCNConv(i, o, flow="target_to_source"),
    "GraphSAGE": SAGEConv,
    "GraphSAGE, sum": lambda i, o: SAGEConv(i, o, aggr="sum", flow="target_to_source"),
    "GraphSAGE alone": lambda i, o: SAGEConv(i, o, root_weight=False, bias=False),
    "GIN": lambda i, o: GINConv(network(i, o), eps=0.3, train_eps=True),
    "GAT": lambda i, o: GATConv(i, o),
    "GAT, three heads": lambda i, o: GATConv(i, o, heads=3, concat=False, bias=False, flow="target_to_source"),
    "GAT without loops": lambda i, o: GATConv(i, o, add_self_loops=False),
    FOUR_HEADS: lambda i, o: GATConv(i, o // 4, heads=4),
    "GAT, mean of two heads": lambda i, o: GATConv(i, o, heads=2, concat=False),
    "GIN reversed": lambda i, o: GINConv(network(i, o), flow="target_to_source"),
}
KINDS = ("GCN", "GraphSAGE", "GAT", "GIN")
WIDTHS = {"wider": (WIDTH, CHANNELS), "narrower": (CHANNELS, WIDTH), "whole vectors": (64, 128)}


def random_graph(nodes: int, edges: int, seed: int = 0) -> Tensor:
    """Any nodes, with self-loops and repeated edges; the last third of them are isolated."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(max(1, nodes - nodes // 3), (2, edges), generator=generator)
    return torch.cat([edge_index, edge_index[:, : edges // 4]], 1)


@cache
def _forms(name: str, widths: str, config: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    layer = LAYERS[name](*WIDTHS[widths]).eval()
    data = torch.randn(NODES, WIDTHS[widths][0]), random_graph(NODES, 60)
    qmodel = qgnn.quantize_model(layer, config=qgnn.QuantConfig(**dict(config)))
    qmodel = qgnn.calibrate(qmodel, data, method="ranges").eval()
    return qmodel, qgnn.pack_model(qmodel)


def forms(name: str, widths: str = "wider", **config: Any) -> tuple[Any, Any]:
    """A converted layer and its packed form, which nobody may change."""
    return _forms(name, widths, tuple(sorted(config.items())))


def fresh(name: str, widths: str = "wider", **config: Any) -> Any:
    return copy.deepcopy(forms(name, widths, **config)[1])


def directly(layer: Any, x: Any, edge_index: Any, third: Any = None) -> Tensor | None:
    """The short way, :obj:`None` where it is not taken."""
    if isinstance(layer, GATConv):
        return direct_gat(layer, x, edge_index, None, third, None)
    if isinstance(layer, GINConv):
        return direct_gin(layer, x, edge_index, third)
    short = {"GCNConv": direct_gcn, "SAGEConv": direct_sage}[type(layer).__name__]
    return short(layer, x, edge_index, third)


def long_way(layer: Any, x: Tensor, edge_index: Any) -> Tensor:
    with Watching():
        assert directly(layer, x, edge_index) is None
        return layer(x, edge_index)


@torch.no_grad()
@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(LAYERS)),
    widths=st.sampled_from(list(WIDTHS)),
    bits=st.sampled_from([1, 2, 4, 8]),
    granularity=st.sampled_from(["row", "tensor"]),
    levels=st.sampled_from(["affine", "half"]),
    nodes=st.integers(1, 70),
    edges=st.integers(0, 200),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 1000),
)
def test_small_graphs(
    name: str,
    widths: str,
    bits: int,
    granularity: str,
    levels: str,
    nodes: int,
    edges: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    qmodel, layer = forms(name, widths, bits=bits, granularity=granularity, message_levels=levels)
    x = torch.randn(nodes, WIDTHS[widths][0]) * torch.rand(nodes, 1) * 3
    edge_index = random_graph(nodes, edges, seed).to(dtype)
    found = directly(layer, x, edge_index)
    assert found is not None
    assert torch.equal(found, long_way(layer, x, edge_index))
    assert torch.equal(found, layer(x, edge_index))
    torch.testing.assert_close(found, qmodel(x, edge_index), rtol=2e-6, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in LAYERS if name != FOUR_HEADS])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_default_gives_what_the_converted_model_gives(name: str, bits: int) -> None:
    torch.manual_seed(0)
    make = LAYERS[name]
    model = Stack(make(WIDTH, CHANNELS), make(CHANNELS, CHANNELS), make(CHANNELS, 3)).eval()
    x, edge_index = torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=bits), (x, edge_index), method="ranges").eval()
    packed = qgnn.pack_model(qmodel)
    assert torch.equal(packed(x, edge_index), qmodel(x, edge_index))


class Stack(nn.Module):
    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        for conv in self.convs:
            x = conv(x, edge_index).relu()
        return x


class Gathering(nn.Module):
    """What its layers give, and rows of it for every edge."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.kinds: list[type] = []

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        own = x[edge_index[0]]
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Linear) else layer(x, edge_index)
            self.kinds.append(type(x))
        found = x[edge_index[1]]
        self.kinds += [type(own), type(found)]
        return own.sum() + found


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "linear"])
def test_gathers_are_looked_for_around_the_short_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with so many edges that gathers of the model's own are noted has layers of few rows still."""
    torch.manual_seed(0)
    make: Layer = nn.Linear if kind == "linear" else LAYERS[kind]
    x, edge_index = torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    model = Gathering(make(WIDTH, CHANNELS), make(CHANNELS, 3)).eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=4), (x, edge_index), method="ranges").eval()
    packed = qgnn.pack_model(qmodel)
    expected = qmodel(x, edge_index)
    packed.kinds.clear()
    assert torch.equal(packed(x, edge_index), expected)
    assert packed.kinds == [Tensor] * 4
    monkeypatch.setattr(sizes, "FEWEST_INDICES", 1)
    monkeypatch.setattr(sizes, "FEWEST_GATHERED", 1)
    packed.kinds.clear()
    assert torch.equal(packed(x, edge_index), expected)
    assert packed.kinds == [Tensor, Tensor, DeferredTensor, DeferredTensor]


# Who looks ############################################################################################################

WATCHED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Watching,
    "profiler": torch.profiler.profile,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another backend": lambda: use_backend("torch"),
    "a fixed graph": qgnn.fixed_graph,
    "pinned plans": pinned_plans,
}
FEATURES: dict[str, Callable[[Tensor], Any]] = {
    "a gradient": lambda x: x.requires_grad_(),
    "doubles": Tensor.double,
    "other strides": lambda x: x.t().contiguous().t(),
    "sparse rows": Tensor.to_sparse_csr,
    "NaN": lambda x: x.fill_(float("nan")),
    "an infinity": lambda x: x.index_fill_(0, torch.tensor([2]), float("inf")),
    "no row": lambda x: x[:0],
    "another width": lambda x: x[:, 1:].contiguous(),
    "samples": lambda x: x.expand(2, -1, -1).contiguous(),
    "another device": lambda x: x.to("meta"),
    "a pair": lambda x: (x, x),
    "many rows": lambda x: x.repeat(FEW_RESULTS // x.numel() + 1, 1),
}
GRAPHS: dict[str, Callable[[Tensor], Any]] = {
    "an EdgeIndex": lambda e: EdgeIndex(e, sparse_size=(NODES, NODES)),
    "a matrix": lambda e: torch.sparse_coo_tensor(e, torch.ones(e.size(1)), (NODES, NODES)).to_sparse_csr(),
    "other strides": lambda e: e.t().contiguous().t(),
    "three rows": lambda e: e[[0, 1, 1]],
    "floats": Tensor.float,
    "bytes": Tensor.byte,
    "a node too many": lambda e: e.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(NODES)),
    "a node before the first": lambda e: e.index_fill(1, torch.tensor([0]), -1),
    "many edges": lambda e: e.repeat(1, small.MOST_EDGES // e.size(1) + 1),
    "another device": lambda e: e.to("meta"),
    "no tensor": Tensor.numpy,
}


# Sums of GIN are of any width; its network tells.
LONG = [(kind, name) for kind in KINDS for name in (*WATCHED, *FEATURES) if (kind, name) != ("GIN", "another width")]


@pytest.mark.parametrize(("kind", "name"), LONG)
def test_the_long_way(kind: str, name: str) -> None:
    layer, x, edge_index = forms(kind)[1], torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    assert directly(layer, x, edge_index) is not None
    around, value = WATCHED.get(name, nullcontext)(), FEATURES.get(name, lambda x: x)(x)
    with around:
        assert directly(layer, value, edge_index) is None


@torch.no_grad()
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_found_wherever_it_is(kind: str, value: str) -> None:
    layer, edge_index = forms(kind, "whole vectors")[1], random_graph(NODES, 60)
    for rows in (1, NODES, 100):  # blocks of rows are looked at one after another
        for place in ((0, 0), (rows - 1, 63), (rows // 2, 17)):
            x = torch.randn(rows, 64)
            edges = edge_index if rows >= NODES else edge_index[:, :0]
            assert directly(layer, x, edges) is not None
            x[place] = float(value)
            assert directly(layer, x, edges) is None


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_the_long_way(kind: str, name: str) -> None:
    layer, x, edge_index = forms(kind)[1], torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    assert directly(layer, x, GRAPHS[name](edge_index)) is None
    assert directly(layer, x, edge_index, (NODES, NODES) if kind != "GCN" else torch.ones(75)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_is_refused_alike(kind: str) -> None:
    layer, x, edge_index = forms(kind)[1], torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    wrong = [(FEATURES[name](x.clone()), edge_index) for name in ("NaN", "doubles", "another width")]
    wrong += [(x, GRAPHS[name](edge_index)) for name in ("three rows", "floats", "a node too many", "no tensor")]
    for args in wrong:
        with pytest.raises((ValueError, TypeError)) as short:
            layer(*args)
        with pytest.raises((ValueError, TypeError)) as long, Watching():
            layer(*args)
        assert str(short.value) == str(long.value)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_their_calls(kind: str) -> None:
    x, edge_index = torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    expected = forms(kind)[1](x, edge_index)
    inner = {
        "GCN": ("lin.input_quantizer",),
        "GAT": ("lin.input_quantizer",),
        "GraphSAGE": ("input_quantizer",),
        "GIN": ("message_quantizer",),
    }[kind]
    for name in inner:
        layer, seen = fresh(kind), []
        layer.get_submodule(name).register_forward_hook(lambda *args, seen=seen: seen.append(args))
        assert torch.equal(layer(x, edge_index), expected)
        assert len(seen) == 1
    layer, seen = fresh(kind), []
    layer.register_message_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(layer(x, edge_index), expected)
    assert len(seen) == 1
    layer = fresh(kind)
    layer.register_forward_hook(lambda layer, args, out: out + 1)
    assert torch.equal(layer(x, edge_index), expected + 1)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        assert torch.equal(forms(kind)[1](x, edge_index), expected)
    finally:
        handle.remove()
    assert forms(kind)[1].get_submodule(inner[0]) in seen
    with pytest.raises(RuntimeError, match="eval mode"):
        fresh(kind).train()(x, edge_index)


# What is written over #################################################################################################


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_read_anew(kind: str) -> None:
    layer, x, edge_index = forms(kind)[1], torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    before = layer(x, edge_index)
    edge_index.numpy()[1, :7] = 3  # which no version counts
    found = directly(layer, x, edge_index)
    assert found is not None
    assert not torch.equal(found, before)
    assert torch.equal(found, long_way(layer, x, edge_index))
    fewer = directly(layer, x[: NODES - 3].contiguous(), edge_index)
    assert fewer is not None
    assert torch.equal(fewer, long_way(layer, x[: NODES - 3].contiguous(), edge_index))


def numbers(layer: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in layer.modules():
        held = {**module._parameters, **module._buffers}
        yield from ((module, name, value) for name, value in held.items() if value is not None)


@torch.no_grad()
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_read_anew(kind: str, widths: str) -> None:
    layer = fresh(kind, widths)
    x, edge_index = torch.randn(NODES, WIDTHS[widths][0]), random_graph(NODES, 60)
    for module, name, value in numbers(layer):
        other = torch.randint_like(value, 1 << 30) if value.dtype is torch.int32 else value * 0.75 + 0.01
        changed = 0
        for write in (value.copy_, lambda new, m=module, n=name, v=value: setattr(m, n, _like(v, new))):
            before = layer(x, edge_index)
            write(other)
            found = directly(layer, x, edge_index)
            assert found is not None, name
            assert torch.equal(found, long_way(layer, x, edge_index)), name
            changed += not torch.equal(found, before)
            other = other ^ 5 if value.dtype is torch.int32 else other * 1.5
        assert changed == 2, name


def _like(value: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new.clone(), requires_grad=False) if isinstance(value, nn.Parameter) else new.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_have_prepared_calls_of_their_own(kind: str) -> None:
    layer, x, edge_index = fresh(kind), torch.randn(NODES, WIDTH), random_graph(NODES, 60)
    expected = layer(x, edge_index)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._packed.last.direct is None
        for _, name, value in numbers(layer):
            if name != "words":
                value.data.mul_(1.1)
        assert torch.equal(other(x, edge_index), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_what_is_worth_it(kind: str) -> None:
    layer, x, edge_index = forms(kind)[1], torch.randn(9_000, WIDTH), random_graph(9_000, 20_000)
    with threads(1):
        alone = directly(layer, x, edge_index)
    assert alone is not None
    with threads(2):
        assert directly(layer, x, edge_index) is None
        assert torch.equal(layer(x, edge_index), alone)


def test_graphs_are_forgotten() -> None:
    layer, x, kept = forms("GCN")[1], torch.randn(NODES, WIDTH), []
    for seed in range(3 * small.REMEMBERED):
        kept.append(random_graph(NODES, 60, seed))
        layer(x, kept[-1])
    assert len(small._graphs) <= small.REMEMBERED
    for edge_index in kept:
        assert torch.equal(layer(x, edge_index), long_way(layer, x, edge_index))
