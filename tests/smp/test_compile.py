"""``torch.compile`` of converted models whose multipliers move, against eager execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch_geometric.nn import GCN, SGConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig

pytestmark = pytest.mark.slow

VIOLATED: dict[str, Any] = {"alpha": 1e-3, "eta_lambda": 1e-3}  # multipliers rise with every update
MODELS: dict[str, tuple[Callable[[], nn.Module], SMPConfig]] = {
    "deep GCN": (
        lambda: GCN(WIDTH, 8, 4, OUT),
        SMPConfig(initial_residual=0.1, identity_map=0.5, **VIOLATED),
    ),
    "SGConv": (lambda: SGConv(WIDTH, OUT, 2), SMPConfig(**VIOLATED)),
}


def step(model: Any, call: Any, args: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Output, gradients and measured energies of a training step."""
    model.zero_grad()
    out = call(*args)
    out.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [out.detach(), *gradients, *(m.constraint_state.energy.clone() for m in qgnn.smp_layers(model).values())]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_training_follows_the_multipliers(name: str) -> None:
    """They start at zero; the first update compiles the correction in, and none after it compiles anything."""
    torch._dynamo.reset()
    make, smp = MODELS[name]
    args = (features(), graph())
    model: Any = qgnn.calibrate(qgnn.quantize_model(make(), config=QuantConfig(bits=4, smp=smp)), args).train()
    compiled = torch.compile(model, backend="eager")
    layers, graphs = qgnn.smp_layers(model).values(), []
    for update in range(3):
        actual = step(model, compiled, args)  # before anything runs eagerly
        assert all((layer.multiplier_value > 0) == (update > 0) for layer in layers)
        for found, expected in zip(actual, step(model, model, args), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums in float32
        graphs.append(counters["stats"]["unique_graphs"])
        qgnn.differential_multiplier_step(model)
    assert graphs[0] < graphs[1] == graphs[2]
