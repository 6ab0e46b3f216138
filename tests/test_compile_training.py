"""Training under ``torch.compile(fullgraph=True)``, on one graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.compiled_models import CLASSES, FEATURES, NODES, Model
from core.compiled_models import LAYERS as GRAPH_LAYERS
from torch import Tensor, nn
from torch_geometric.nn import APPNP

import qgnn_plugin as qgnn

SMOOTH = qgnn.SMPConfig(alpha=0.5)


class Propagation(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin, self.propagate = nn.Linear(inputs, outputs), APPNP(3, 0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(self.lin(x), edge_index)


LAYERS = {**GRAPH_LAYERS, "APPNP": Propagation}
CASES = [*((name, SMOOTH) for name in LAYERS), ("GCN", None)]  # a step with a constraint holds one without


@pytest.mark.parametrize(("name", "smp"), CASES, ids=lambda v: v if isinstance(v, str) else "smooth" if v else "plain")
def test_a_step_compiles_to_one_graph(name: str, smp: Any) -> None:
    x, edge_index = torch.randn(NODES, FEATURES), torch.randint(NODES, (2, 200))
    target = torch.randint(CLASSES, (NODES,))
    model = qgnn.quantize_model(Model(LAYERS[name]), config=qgnn.QuantConfig(bits=4, smp=smp))
    qgnn.calibrate(model, (x, edge_index))
    model.train()

    def step(run: Callable[..., Tensor]) -> list[Tensor]:
        model.zero_grad()
        loss = nn.functional.cross_entropy(run(x, edge_index), target)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    torch._dynamo.reset()
    with qgnn.fixed_graph():
        step(model)  # builds the graph's plans, and that of the backward pass
        start = {name: value.clone() for name, value in model.state_dict().items()}
        expected = step(model)
        model.load_state_dict(start)
        actual = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
