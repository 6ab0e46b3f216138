"""Graph breaks under ``torch.compile`` of models that take any graph: no more than PyG's own."""

from collections.abc import Callable

import pytest
import torch
from core.compiled_models import CLASSES, FEATURES, LAYERS, NODES, Model
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qgnn_plugin as qgnn


def edges(num_edges: int, num_loops: int) -> Tensor:
    """Edges, ``num_loops`` of them self-loops: how many edges a plan has depends on what they hold."""
    edge_index = torch.randint(NODES, (2, num_edges))
    edge_index[1] = (edge_index[0] + torch.randint(1, NODES, (num_edges,))) % NODES
    edge_index[1, :num_loops] = edge_index[0, :num_loops]
    return edge_index


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend="aot_eager")


def breaks() -> int:
    """Graph breaks of what was compiled since."""
    return sum(counters["graph_break"].values())


def converted(name: str, x: Tensor, edge_index: Tensor) -> nn.Module:
    return qgnn.calibrate(qgnn.quantize_model(Model(LAYERS[name]), bits=4), (x, edge_index))


@pytest.mark.parametrize("name", list(LAYERS))
@torch.no_grad()
def test_no_graph_break_where_the_graph_is_an_argument(name: str) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), edges(200, 7)
    qmodel = converted(name, x, edge_index).eval()
    for model in (qmodel, qgnn.pack_model(qmodel)):
        run = compiled(model)
        for other in (edge_index, edges(200, 0), edges(200, 60)):
            torch.testing.assert_close(run(x, other), model(x, other), rtol=0, atol=0)
        assert breaks() == 0


@pytest.mark.parametrize("name", ["SAGE", "GIN"])
def test_no_graph_break_in_training_without_new_self_loops(name: str) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), edges(200, 7)
    target = torch.randint(CLASSES, (NODES,))
    model = converted(name, x, edge_index).train()

    def step(run: Callable[..., Tensor]) -> list[Tensor]:
        model.zero_grad()
        loss = nn.functional.cross_entropy(run(x, edge_index), target)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step(model)
    model.load_state_dict(start)
    actual = step(compiled(model))
    assert breaks() == 0
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_as_many_graph_breaks_as_float_at_32_bits() -> None:
    x, edge_index = torch.randn(NODES, FEATURES), edges(200, 7)
    model, found = Model(LAYERS["GCN"]).eval(), []
    for each in (model, qgnn.quantize_model(model, config=qgnn.QuantConfig(bits=32)).eval()):
        torch._dynamo.reset()
        found.append(torch._dynamo.explain(each)(x, edge_index).graph_break_count)
    assert found[1] <= found[0]
