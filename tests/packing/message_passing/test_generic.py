"""Packed layers without a kernel of their own: by blocks of rows, with whatever the user's functions do."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn.conv as pyg
from core.support import Summed
from packing.layers_of_pyg import GENERIC, KERNELS, NODES, OTHERS, OUT, SAME, TARGETS, WIDTH, graph, per_edge, x
from packing.row_block_support import ROWS, assert_same, pair, runs
from torch import Tensor, nn
from torch_geometric.nn import FastRGCNConv, MessagePassing, RGCNConv, to_hetero
from torch_geometric.utils import softmax

import qgnn_plugin as qgnn
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.message_passing import row_blocks
from qgnn_plugin.packing.message_passing.plans import plan_of
from qgnn_plugin.packing.message_passing.relations import edges_by_relation


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


def test_hooks_and_masks_act(tiny: list[int]) -> None:
    qmodel, packed = pair(lambda: Summed(WIDTH, OUT), (x(), graph()))
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
    from qgnn_plugin.packing.message_passing import generic

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
    _, packed = pair(lambda: Summed(WIDTH, OUT), (x(), graph(), per_edge()))
    calls: list[int] = []
    original = row_blocks.Runner.__call__
    try:
        row_blocks.Runner.__call__ = lambda self, edges: calls.append(1) or original(self, edges)  # type: ignore
        with torch.no_grad():
            packed(x(), graph(), per_edge())
    finally:
        row_blocks.Runner.__call__ = original  # type: ignore[method-assign]
    assert not calls


def test_gradients_are_refused() -> None:
    _, packed = pair(lambda: Summed(WIDTH, OUT), (x(), graph()))
    with pytest.raises(RuntimeError, match="no gradient through the packed"):
        packed(x().requires_grad_(), graph())


def test_edges_that_do_not_exist(tiny: list[int]) -> None:
    _, packed = pair(lambda: Summed(WIDTH, OUT), (x(), graph(), per_edge()))
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
            self.conv = Summed((WIDTH, WIDTH), OUT)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.conv(x, edge_index).relu()

    model = to_hetero(Net(), (["a", "b"], kinds))
    qmodel, packed = pair(lambda: model, args)
    with torch.no_grad():
        assert_same(packed(*args), qmodel(*args))
    layers = [layer for layer in qgnn.summary(packed).layers if layer.type == "Summed"]
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
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)
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
