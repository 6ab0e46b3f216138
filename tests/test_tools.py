"""PyG's and torch's tools on converted and on packed models: they find what they find on float ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.support import NODES, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.explain import DummyExplainer, Explainer, GNNExplainer
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import (
    GAT,
    GCN,
    GIN,
    EdgeCNN,
    GATConv,
    GatedGraphConv,
    GATv2Conv,
    GraphConv,
    GraphSAGE,
    MessagePassing,
    TransformerConv,
)

import qgnn_plugin as qgnn

OUT = 4


class Own(nn.Module):
    """A convolution and a linear map."""

    def __init__(self, conv: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.head = conv, nn.Linear(width, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(self.conv(x, edge_index).relu())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: GCN(WIDTH, 8, 2, OUT),
    "GraphSAGE": lambda: GraphSAGE(WIDTH, 8, 2, OUT),
    "GAT": lambda: GAT(WIDTH, 8, 2, OUT, heads=2),
    "GIN": lambda: GIN(WIDTH, 8, 2, OUT),
    "EdgeCNN": lambda: EdgeCNN(WIDTH, 8, 2, OUT),
    "GatedGraphConv": lambda: Own(GatedGraphConv(WIDTH, 2), WIDTH),
    "TransformerConv": lambda: Own(TransformerConv(WIDTH, 8), 8),
    "GraphConv": lambda: Own(GraphConv(WIDTH, 8), 8),
}


def forms(model: nn.Module, *args: Any) -> list[Any]:
    """The model, converted and packed."""
    qmodel = qgnn.calibrate(qgnn.quantize_model(model.eval(), 8), [args]).eval()
    return [model, qmodel, qgnn.pack_model(qmodel)]


@pytest.fixture(params=MODELS)
def models(request: pytest.FixtureRequest) -> list[Any]:
    return forms(MODELS[request.param](), features(), graph())


def test_masks_of_explanations_act(models: list[Any]) -> None:
    x, edge_index = features(), graph()
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    kept = torch.rand(edge_index.size(1)) < 0.5
    for model in models:
        explainer = Explainer(
            model, DummyExplainer(), explanation_type="model", edge_mask_type="object", model_config=config
        )
        with torch.no_grad():
            some = explainer.get_masked_prediction(x, edge_index, edge_mask=kept.float())
            no_edges = explainer.get_masked_prediction(x, edge_index, edge_mask=torch.zeros(edge_index.size(1)))
            no_nodes = explainer.get_masked_prediction(x, edge_index, node_mask=torch.zeros(NODES, 1))
            same = explainer.get_masked_prediction(x, edge_index, edge_mask=torch.ones(edge_index.size(1)))
        if model is models[0]:
            expected = some, no_edges, no_nodes, same
        for found, wanted in zip((some, no_edges, no_nodes), expected[:3], strict=True):
            # The mask's effect is the float model's: one that does not act would be off by all of it.
            assert float((found - wanted).norm() / (wanted - expected[3]).norm()) < 0.35
        assert float((same - expected[3]).norm() / expected[3].norm()) < 0.15
    explainer = Explainer(
        models[1], GNNExplainer(epochs=2), explanation_type="model", edge_mask_type="object", model_config=config
    )
    assert explainer(x, edge_index, index=1).edge_mask.shape == (edge_index.size(1),)


def test_hooks_in_message_passing_run_and_act(models: list[Any]) -> None:
    x, edge_index = features(), graph()
    for model in models[1:]:
        conv = next(module for module in model.modules() if isinstance(module, MessagePassing))
        seen: list[str] = []

        def note(name: str, seen: list[str] = seen) -> Callable[..., None]:
            return lambda *args: seen.append(name)

        hooks = [
            conv.register_propagate_forward_pre_hook(note("before propagate")),
            conv.register_message_forward_pre_hook(note("before message")),
            conv.register_message_forward_hook(note("message")),
            conv.register_aggregate_forward_hook(lambda module, inputs, out: torch.zeros_like(out)),
            conv.register_propagate_forward_hook(note("propagate")),
        ]
        with torch.no_grad():
            hooked = model(x, edge_index)
            for hook in hooks:
                hook.remove()
            assert not torch.allclose(hooked, model(x, edge_index), atol=1e-3)
        assert set(seen) == {"before propagate", "before message", "message", "propagate"}


@pytest.mark.parametrize("name", ["GraphSAGE", "GAT", "GIN", "EdgeCNN"])
def test_trimming_to_what_a_layer_needs(name: str) -> None:
    nodes, edges = [5, 15, NODES - 20], [40, 100]
    first = torch.stack([torch.randint(20, (40,)), torch.randint(5, (40,))])
    edge_index = torch.cat([first, torch.stack([torch.randint(NODES, (100,)), torch.randint(5, 20, (100,))])], 1)
    x = features()
    for model in forms(MODELS[name](), x, edge_index):
        with torch.no_grad():
            trimmed = model(x, edge_index, num_sampled_nodes_per_hop=nodes, num_sampled_edges_per_hop=edges)
            torch.testing.assert_close(trimmed[:5], model(x, edge_index)[:5], rtol=1e-5, atol=1e-5)


class AllNeighbours(NeighborLoader):
    """What a ``NeighborLoader`` with all neighbours gives, without the libraries that sample."""

    def __init__(self, data: Data) -> None:
        self.data, self.dataset = data, range(data.num_nodes)
        self.node_sampler = SimpleNamespace(num_hops=1, num_neighbors=[-1])

    def __iter__(self) -> Iterator[Data]:
        for nodes in torch.arange(NODES).split(16):
            edges = self.data.edge_index[:, torch.isin(self.data.edge_index[1], nodes)]
            others = edges[0].unique()
            n_id = torch.cat([nodes, others[~torch.isin(others, nodes)]])
            place = torch.full((NODES,), -1)
            place[n_id] = torch.arange(len(n_id))
            yield Data(n_id=n_id, edge_index=place[edges], batch_size=len(nodes))


@pytest.mark.parametrize("name", ["GraphSAGE", "GAT", "GIN"])
def test_layer_by_layer_inference(name: str) -> None:
    x, edge_index = features(), graph()
    for model in forms(MODELS[name](), x, edge_index):
        with torch.no_grad():
            out = model.inference(AllNeighbours(Data(x=x, edge_index=edge_index)), device=torch.device("cpu"))
            torch.testing.assert_close(out, model(x, edge_index), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("make", [GATConv, GATv2Conv, TransformerConv])
def test_attention_weights_in_the_edge_order_of_the_caller(make: Any, sparse: bool) -> None:
    x, edge_index = features(), graph()
    adjacency: Any = edge_index
    if sparse:
        ones = torch.ones(edge_index.size(1))
        coo = torch.sparse_coo_tensor(edge_index.flip(0), ones, (NODES, NODES), check_invariants=False)
        adjacency = coo.coalesce().to_sparse_csr()
    found = []
    for model in forms(make(WIDTH, 4, heads=2), x, adjacency):
        with torch.no_grad():
            found.append(model(x, adjacency, return_attention_weights=True)[1])
    (edges, weights), *others = found
    for other_edges, other_weights in others:
        assert other_edges.layout == edges.layout
        plain = (edges, other_edges) if not sparse else (edges.to_dense(), other_edges.to_dense())
        torch.testing.assert_close(plain[1], plain[0], rtol=0, atol=0.05)
        torch.testing.assert_close(other_weights, weights, rtol=0, atol=0.05)
        assert sparse or torch.equal(edges, other_edges)


def test_torch_script_is_refused_in_one_sentence(models: list[Any]) -> None:
    for model in models[1:]:
        with pytest.raises(TypeError, match=r"Expected a plain model for torch\.jit\.script.*restore_model"):
            torch.jit.script(model)


def test_forces_are_trained(models: list[Any]) -> None:
    x = features().double().requires_grad_()
    qmodel = qgnn.quantize_model(qgnn.restore_model(models[1]).double(), 8).train()
    (force,) = torch.autograd.grad(qmodel(x, graph()).square().sum(), x, create_graph=True)
    force.square().sum().backward()
    matrices = [p for name, p in qmodel.named_parameters() if "quantizer" not in name and p.dim() == 2]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in matrices)


@pytest.mark.slow
def test_compiling_breaks_no_more_than_the_float_model_does(models: list[Any]) -> None:
    x, edge_index = features(), graph()

    def breaks(model: nn.Module) -> int:
        torch._dynamo.reset()
        return int(torch._dynamo.explain(model)(x, edge_index).graph_break_count)

    with torch.no_grad():
        before = breaks(models[0])
        assert breaks(qgnn.quantize_model(models[0], 32)) <= before
        torch._dynamo.reset()
        for model in models[1:]:
            compiled: Any = torch.compile(model, backend="eager")
            torch.testing.assert_close(compiled(x, edge_index), model(x, edge_index), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, WIDTH, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.stack[0] + torch.matmul(x, self.stack[1]) * self.stack.norm()


def test_a_compiler_leaves_products_with_own_parameters_as_they_are() -> None:
    x = features()
    for model in forms(Products(), x):
        compiled: Any = torch.compile(model, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    torch._dynamo.reset()
