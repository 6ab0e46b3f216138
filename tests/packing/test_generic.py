"""Packed layers without a kernel of their own: by blocks of rows, with whatever the user's functions do."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
import torch_geometric.nn.conv as pyg
from packing.layers_of_pyg import GENERIC, KERNELS, NODES, OTHERS, OUT, SAME, TARGETS, WIDTH, graph, per_edge, x
from torch import Tensor, nn
from torch_geometric.nn import FastRGCNConv, GraphConv, MessagePassing, RGCNConv, TransformerConv, to_hetero
from torch_geometric.nn.aggr import LSTMAggregation
from torch_geometric.utils import softmax

import qgnn_plugin as qgnn
from qgnn_plugin.packing import producers, propagation_call, relations, row_blocks
from qgnn_plugin.packing.plans import plan_of
from qgnn_plugin.packing.relations import edges_by_relation

ROWS = "packed: row blocks"


@pytest.fixture
def blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without message kernels, so that blocks have everything to do."""
    monkeypatch.setattr(propagation_call, "_finders", [])
    monkeypatch.delitem(relations._FORMS, FastRGCNConv.forward)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, blocks_alone: None) -> list[int]:
    """Blocks of a few edges; gives how many edges each had."""
    sizes: list[int] = []
    run = row_blocks._Runner.__call__

    def counted(self: Any, edges: Any) -> Any:
        sizes.append(edges.count)
        return run(self, edges)

    monkeypatch.setattr(row_blocks.RowBlocks, "edges_per_block", lambda self: 16)
    monkeypatch.setattr(row_blocks._Runner, "__call__", counted)
    return sizes


def pair(make: Callable[[], nn.Module], args: Any, bits: int = 4) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    qmodel = qgnn.quantize_model(make().eval(), bits)
    qgnn.calibrate(qmodel, [args], method="ranges").eval()
    return qmodel, qgnn.pack_model(qmodel)


def parts(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [part for name in sorted(value) for part in parts(value[name])]
    if isinstance(value, (tuple, list)):
        return [part for item in value for part in parts(item)]
    return [] if value is None else [value]


def assert_same(found: Any, expected: Any) -> None:
    assert len(parts(found)) == len(parts(expected))
    for one, other in zip(parts(found), parts(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5 * float(other.abs().max() + 1))


def runs(packed: nn.Module) -> set[str]:
    return {layer.runs for layer in qgnn.summary(packed).layers}


def test_every_convolution_is_here() -> None:
    named = {n for n in dir(pyg) if isinstance(getattr(pyg, n), type) and issubclass(getattr(pyg, n), nn.Module)}
    assert named == OTHERS | set(SAME) & named | KERNELS | {name.split(" ")[0] for name in GENERIC}


@pytest.mark.filterwarnings("ignore:Only .* of the weights")
@pytest.mark.parametrize("name", GENERIC)
def test_blocks_compute_what_the_converted_layer_computes(name: str, tiny: list[int]) -> None:
    make, args = GENERIC[name]
    qmodel, packed = pair(make, args)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a layer of PyG that ran unblocked would say so
        assert_same(packed(*args), qmodel(*args))
    assert not any("unblocked" in how for how in runs(packed)), runs(packed)
    assert len(tiny) > 10
    assert max(tiny) < graph().size(1) // 2 + 10  # a hub's edges stay together


@pytest.mark.filterwarnings("ignore:Only .* of the weights")
@pytest.mark.parametrize("name", GENERIC)
def test_whatever_way_is_taken_gives_the_same(name: str) -> None:
    """Message kernels where there are any, PyG's own way on a graph of one block where there is none."""
    make, args = GENERIC[name]
    qmodel, packed = pair(make, args)
    with torch.no_grad():
        assert_same(packed(*args), qmodel(*args))


# A user's own #########################################################################################################


class Own(MessagePassing):
    """Several features at both ends, an edge update with a softmax, a tuple as a message, another update."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.value, self.key = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        key = self.key(x)
        alpha = self.edge_updater(edge_index, key=key)
        value, spread = self.propagate(edge_index, value=self.value(x), key=key, alpha=alpha, scale=2.0)
        return torch.cat([value, spread], -1)

    def edge_update(self, key_j: Tensor, key_i: Tensor, index: Tensor, size_i: Optional[int]) -> Tensor:  # noqa: UP045
        return softmax((key_i * key_j).sum(-1, keepdim=True), index, num_nodes=size_i)

    def message(self, value_j: Tensor, key_i: Tensor, key_j: Tensor, alpha: Tensor, scale: float) -> Any:
        return alpha * value_j * scale, (key_j - key_i).abs()

    def aggregate(self, inputs: Any, index: Tensor, dim_size: Optional[int] = None) -> Any:  # noqa: UP045
        return tuple(self.aggr_module(part, index, dim_size=dim_size, dim=self.node_dim) for part in inputs)

    def update(self, inputs: Any, key: Tensor) -> Any:
        return inputs[0] + key, inputs[1]


class Keeps(MessagePassing):
    """Stores its attention on itself, as many layers of PyG do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.last = nn.Linear(WIDTH, OUT), None

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.propagate(edge_index, x=self.lin(x)), self.last

    def message(self, x_i: Tensor, x_j: Tensor, index: Tensor) -> Tensor:
        self.last = softmax((x_i * x_j).sum(-1), index)
        return x_j * self.last.unsqueeze(-1)


@pytest.mark.parametrize("make", [Own, Keeps])
def test_own_layers(make: Callable[[], nn.Module], tiny: list[int]) -> None:
    qmodel, packed = pair(make, (x(), graph()))
    with torch.no_grad():
        assert_same(packed(x(), graph()), qmodel(x(), graph()))
    assert ROWS in runs(packed)
    assert len(tiny) > 10


def test_attention_comes_in_the_callers_order_of_edges(tiny: list[int]) -> None:
    args = (x(), graph())
    qmodel, packed = pair(lambda: TransformerConv(WIDTH, OUT, heads=2), args)
    with torch.no_grad():
        out, (edges, alpha) = packed(*args, return_attention_weights=True)
        expected, (_, weights) = qmodel(*args, return_attention_weights=True)
        assert torch.equal(edges, graph())
        assert_same((out, alpha), (expected, weights))
        assert packed._alpha is None
    assert len(tiny) > 10


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_flows(flow: str, tiny: list[int]) -> None:
    args = (x(), graph(), per_edge())
    qmodel, packed = pair(lambda: GraphConv(WIDTH, OUT, flow=flow), args)
    with torch.no_grad():
        assert_same(packed(*args), qmodel(*args))
    assert len(tiny) > 10


def test_two_sides(tiny: list[int]) -> None:
    edges = graph(NODES, TARGETS)
    for make, args in (
        (lambda: GraphConv((WIDTH, 5), OUT), ((x(), x(TARGETS, 5)), edges)),
        (lambda: TransformerConv((WIDTH, 5), OUT), ((x(), x(TARGETS, 5)), edges)),
        (lambda: pyg.SimpleConv("max"), ((x(), None), edges, None, (NODES, TARGETS))),
    ):
        qmodel, packed = pair(make, args)
        with torch.no_grad():
            out = packed(*args)
            assert out.size(0) == TARGETS
            assert_same(out, qmodel(*args))
    assert len(tiny) > 10


def test_features_of_several_samples(tiny: list[int]) -> None:
    batch = torch.stack([x(), x() * 0.5, x() - 1])
    qmodel, packed = pair(lambda: GraphConv(WIDTH, OUT), (batch, graph(), per_edge()))
    with torch.no_grad():
        assert_same(packed(batch, graph(), per_edge()), qmodel(batch, graph(), per_edge()))
    assert ROWS in runs(packed)
    assert len(tiny) > 10


@pytest.mark.parametrize("granularity", ["tensor", "node", "row"])
@pytest.mark.parametrize("bits", [2, 8])
def test_ranges(bits: int, granularity: str, tiny: list[int]) -> None:
    config = qgnn.QuantConfig(bits=bits, granularity=granularity)
    for make in (lambda: GraphConv(WIDTH, OUT), lambda: TransformerConv(WIDTH, OUT, heads=2)):
        qmodel = qgnn.quantize_model(make().eval(), config=config)
        qgnn.calibrate(qmodel, [(x(), graph())], method="ranges").eval()
        with torch.no_grad():
            assert_same(qgnn.pack_model(qmodel)(x(), graph()), qmodel(x(), graph()))
    assert len(tiny) > 10


# Layers that break the contract #######################################################################################


class Centred(MessagePassing):
    """Looks across rows: a mean over all edges."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor) -> Tensor:
        return x_j - x_j.mean(0)


class Placed(Centred):
    """Goes by the position of an edge among all."""

    def message(self, x_j: Tensor) -> Tensor:
        return x_j * torch.linspace(0, 1, x_j.size(0)).unsqueeze(1)


class Largest(Centred):
    """Scales by the largest of all messages."""

    def message(self, x_j: Tensor) -> Tensor:
        return x_j / x_j.abs().max()


class Indexing(Centred):
    """Reads a table of all nodes by the numbers of targets."""

    def message(self, x_j: Tensor, index: Tensor) -> Tensor:
        return x_j * torch.arange(NODES).float()[index].unsqueeze(1)


class Held(Centred):
    """Reads weights of all edges that it holds itself."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        self.held = torch.linspace(0, 1, edge_index.size(1))
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor) -> Tensor:
        return x_j * self.held.unsqueeze(1)


class OfEdges(Centred):
    """Gives one row per edge."""

    def aggregate(self, inputs: Tensor) -> Tensor:
        return inputs


class Counting(Centred):
    """Keeps a number that depends on all edges."""

    def message(self, x_j: Tensor) -> Tensor:
        self.count = x_j.size(0)
        return x_j


BREAKING = {
    "Centred": (Centred, "look across rows"),
    "Placed": (Placed, "look across rows"),
    "Largest": (Largest, "look across rows"),
    "Indexing": (Indexing, "look across rows"),
    "Held": (Held, "do not take some edges alone"),
    "OfEdges": (OfEdges, "one row per node"),
    "Counting": (Counting, "write 'count'"),
    "LSTM": (lambda: pyg.SimpleConv(LSTMAggregation(WIDTH, WIDTH), combine_root=None), "pads the neighbours"),
}


@pytest.mark.parametrize("name", BREAKING)
def test_what_breaks_the_contract_runs_unblocked_and_is_named(name: str, tiny: list[int]) -> None:
    make, reason = BREAKING[name]
    edges = graph()
    edges = edges[:, edges[1].argsort(stable=True)]  # as the LSTM wants them
    qmodel, packed = pair(make, (x(), edges))
    with torch.no_grad():
        with pytest.warns(UserWarning, match=reason):
            out = packed(x(), edges)
        assert_same(out, qmodel(x(), edges))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            assert_same(packed(x(), edges), qmodel(x(), edges))
    assert any("unblocked" in how and reason in how for how in runs(packed)), runs(packed)


def test_as_many_edges_as_nodes() -> None:
    """Nothing tells what is given per edge: the layer runs unblocked, and is right."""
    edges = graph(edges=NODES)
    weight = torch.rand(NODES)
    qmodel, packed = pair(lambda: GraphConv(WIDTH, OUT), (x(), edges, weight))
    with torch.no_grad():
        assert_same(packed(x(), edges, weight), qmodel(x(), edges, weight))


# Around it ############################################################################################################


def test_hooks_and_masks_act(tiny: list[int]) -> None:
    qmodel, packed = pair(lambda: GraphConv(WIDTH, OUT), (x(), graph()))
    with torch.no_grad():
        seen = []
        handle = packed.register_message_forward_hook(lambda module, inputs, out: seen.append(out.shape) or out * 0)
        hooked = packed(x(), graph())
        handle.remove()
        assert seen == [(graph().size(1), WIDTH)]
        assert not torch.equal(hooked, packed(x(), graph()))
        masked = []
        for model in (qmodel, packed):
            model.explain = True
            model._edge_mask, model._apply_sigmoid = per_edge(), False
            masked.append(model(x(), graph()))
            model.explain, model._edge_mask = False, None
        assert_same(*masked)
        assert_same(packed(x(), graph()), qmodel(x(), graph()))


def test_copies_and_files(tmp_path: Any, tiny: list[int]) -> None:
    make, args = GENERIC["GINEConv"]
    torch.manual_seed(0)
    model = make().eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 4), [args]).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        expected = packed(*args)
        qgnn.save_packed(packed, tmp_path / "packed")
        loaded = qgnn.load_packed(tmp_path / "packed", model)
        for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), loaded):
            assert torch.equal(other(*args), expected)
            assert ROWS in runs(other)


def test_features_are_packed_once_for_all_relations(monkeypatch: pytest.MonkeyPatch) -> None:
    types = torch.randint(3, (graph().size(1),))
    _, packed = pair(lambda: RGCNConv(WIDTH, OUT, 3), (x(), graph(), types))
    count: list[str] = []
    from qgnn_plugin.packing import generic

    pack = generic.packed_nodes
    monkeypatch.setattr(generic, "packed_nodes", lambda site, *rest: count.append(site.site) or pack(site, *rest))
    with torch.no_grad():
        packed(x(), graph(), types)
        assert len(count) == 1
        features = x()
        features.mul_(2)
        packed(features, graph(), types)
    assert len(count) == 2


@pytest.mark.parametrize("options", [{}, {"num_bases": 2}, {"num_blocks": 2}, {"aggr": "sum", "bias": False}])
@pytest.mark.parametrize("granularity", ["row", "tensor", "node"])
def test_products_of_nodes_in_the_place_of_those_of_edges(options: Any, granularity: Any) -> None:
    """FastRGCNConv, whose float form multiplies every edge by a matrix; a relation without an edge among them."""
    types = torch.randint(3, (graph().size(1),), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    model = FastRGCNConv(WIDTH, 6, 4, **options).eval()
    qmodel = qgnn.quantize_model(model, config=qgnn.QuantConfig(bits=4, granularity=granularity))
    qgnn.calibrate(qmodel, [(x(), graph(), types)], method="ranges").eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        for edges, kinds in ((graph(), types), (graph()[:, :40], types[:40])):
            assert_same(packed(x(), edges, kinds), qmodel(x(), edges, kinds))
            targets = edges[1] % TARGETS
            assert_same(
                packed((x(), x()[:TARGETS]), torch.stack([edges[0], targets]), kinds),
                qmodel((x(), x()[:TARGETS]), torch.stack([edges[0], targets]), kinds),
            )
        assert runs(packed) == {"packed: kernel"}
        with pytest.raises((IndexError, RuntimeError)):
            packed(x(), graph(), types + 4)


def test_features_written_between_two_calls_are_packed_again() -> None:
    class Twice(MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x = x.clone()
            first = self.propagate(edge_index, x=x)
            x += 1
            return first + self.propagate(edge_index, x=x)

    qmodel, packed = pair(Twice, (x(), graph()))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(packed(x(), graph()), qmodel(x(), graph()))


def test_a_plan_is_found_by_what_its_edges_hold() -> None:
    edges = graph()
    plan = plan_of(edges, (NODES, NODES), "source_to_target")
    assert plan_of(edges.clone(), (NODES, NODES), "source_to_target") is plan
    assert plan_of(edges, (NODES, NODES + 1), "source_to_target") is not plan
    edges[0, 0] = (edges[0, 0] + 1) % NODES
    changed = plan_of(edges, (NODES, NODES), "source_to_target")
    assert changed is not plan
    assert torch.equal(changed.sort(edges[0]).int(), changed.col)


def test_a_small_graph_is_not_cut() -> None:
    _, packed = pair(lambda: GraphConv(WIDTH, OUT), (x(), graph(), per_edge()))
    calls: list[int] = []
    original = row_blocks._Runner.__call__
    try:
        row_blocks._Runner.__call__ = lambda self, edges: calls.append(1) or original(self, edges)  # type: ignore
        with torch.no_grad():
            packed(x(), graph(), per_edge())
    finally:
        row_blocks._Runner.__call__ = original  # type: ignore[method-assign]
    assert not calls


def test_gradients_are_refused() -> None:
    _, packed = pair(lambda: GraphConv(WIDTH, OUT), (x(), graph()))
    with pytest.raises(RuntimeError, match="no gradient through the packed"):
        packed(x().requires_grad_(), graph())


def test_edges_that_do_not_exist(tiny: list[int]) -> None:
    _, packed = pair(lambda: GraphConv(WIDTH, OUT), (x(), graph(), per_edge()))
    edges = graph()
    edges[0, 0] = NODES
    with pytest.raises(ValueError, match="interval"):
        packed(x(), edges, per_edge())


def test_models_of_several_types(tiny: list[int]) -> None:
    """``to_hetero``: one copy of a layer per relation, each packed."""
    args: Any = GENERIC["HeteroConv"][1]
    kinds = list(args[1])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = GraphConv((WIDTH, WIDTH), OUT)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.conv(x, edge_index).relu()

    model = to_hetero(Net(), (["a", "b"], kinds))
    qmodel, packed = pair(lambda: model, args)
    with torch.no_grad():
        assert_same(packed(*args), qmodel(*args))
    layers = [layer for layer in qgnn.summary(packed).layers if layer.type == "GraphConv"]
    assert [layer.runs for layer in layers] == [ROWS] * len(kinds)
    last = str(qgnn.summary(packed)).splitlines()[-1]
    assert last.startswith("under torch.compile")
    assert all(layer.name in last for layer in layers)
    assert len(tiny) > 10


def test_relations_of_a_graph_are_cut_out_once() -> None:
    types = torch.randint(3, (graph().size(1),), generator=torch.Generator().manual_seed(4))
    found = edges_by_relation(graph(), types, 3)
    again = edges_by_relation(graph().clone(), types.clone(), 3)
    assert all(one is other for one, other in zip(found, again, strict=True))
    for relation, edges in enumerate(found):
        assert torch.equal(edges, graph()[:, types == relation])
    types[0] = (types[0] + 1) % 3
    assert edges_by_relation(graph(), types, 3)[0] is not found[0]


@pytest.mark.parametrize("name", ["AGNNConv", "ARMAConv", "EdgeConv", "GENConv", "GraphConv", "TransformerConv"])
@pytest.mark.parametrize(("nodes", "edges"), [(5, 0), (0, 0), (1, 0)])
def test_graphs_of_nothing(name: str, nodes: int, edges: int) -> None:
    made: dict[str, Callable[[], nn.Module]] = {
        "AGNNConv": pyg.AGNNConv, "ARMAConv": lambda: pyg.ARMAConv(8, 4),
        "EdgeConv": lambda: pyg.EdgeConv(nn.Linear(16, 4)), "GENConv": lambda: pyg.GENConv(8, 4),
        "GraphConv": lambda: pyg.GraphConv(8, 4), "TransformerConv": lambda: pyg.TransformerConv(8, 4),
    }  # fmt: skip
    args = torch.randn(20, 8), torch.randint(0, 20, (2, 60))
    qmodel, packed = pair(made[name], args, bits=8)
    few = args[0][:nodes], args[1][:, :edges]
    with torch.no_grad():
        torch.testing.assert_close(packed(*few), qmodel(*few))


@pytest.mark.parametrize("options", [{}, {"num_bases": 2}, {"num_blocks": 2}])
@pytest.mark.parametrize("num_relations", [3, 20])
def test_sums_of_relations_by_blocks_of_rows(options: Any, num_relations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden features in two ranges, and more relations than codes of them would be held of."""
    types = torch.randint(num_relations, (graph().size(1),), generator=torch.Generator().manual_seed(3))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = RGCNConv(WIDTH, WIDTH, num_relations, **options)
            self.second = RGCNConv(WIDTH, 6, num_relations, **options)

        def forward(self, x: Tensor, edges: Tensor, types: Tensor) -> Tensor:
            return self.second(self.first(x, edges, types).relu(), edges, types)

    qmodel, packed = pair(Twice, (x(), graph(), types))
    monkeypatch.setattr(producers, "BLOCK_FLOATS", 64 * WIDTH)
    with torch.no_grad():
        for _ in range(3):
            assert_same(packed(x(), graph(), types), qmodel(x(), graph(), types))
    assert packed.first._packed.defers


class Untyped(MessagePassing):
    """Whose methods say of `ptr`, as most users' do, nothing; PyG's own say that it may be None."""

    def __init__(self) -> None:
        super().__init__(aggr="add", node_dim=0)
        self.key, self.value = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, key=self.key(x), value=self.value(x))

    def message(self, key_i, key_j, value_j, index, ptr, size_i):  # type: ignore[no-untyped-def]
        return softmax((key_i * key_j).sum(-1, keepdim=True), index, ptr, size_i) * value_j


class OtherDefaults(MessagePassing):
    """Whose methods have defaults of their own for what nobody gives."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=self.lin(x))

    def message(self, x_j: Tensor, scale: float = 2.0) -> Tensor:
        return scale * x_j

    def aggregate(self, inputs: Tensor, index: Tensor, dim_size: int | None = None, scale: float = 2.0) -> Tensor:
        return scale * super().aggregate(inputs, index, dim_size=dim_size)


@pytest.mark.parametrize("make", [Untyped, OtherDefaults])
def test_methods_that_annotate_arguments_in_their_own_way(make: Callable[[], nn.Module]) -> None:
    args = (x(), graph())
    qmodel, packed = pair(make, args)
    with torch.no_grad():
        assert_same(packed(*args), qmodel(*args))
