"""Moves between devices and precisions, hooks, explanations and compilation of converted models."""

import copy
from typing import Any

import pytest
import torch
from core.support import MODELS, OUT, WIDTH, Plain, Summed, features, graph, quantized, relative, through_pickle
from torch import Tensor, nn
from torch_geometric.nn import GraphConv, MessagePassing

import qgnn_plugin as qgnn


def test_hooks_are_kept_and_run() -> None:
    model, seen = Plain(), []
    model.convs[0].register_forward_hook(lambda m, a, o: seen.append("after"))
    model.convs[1].register_forward_pre_hook(lambda m, a: seen.append("before"))
    model.encoder.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    model.convs[1].register_propagate_forward_pre_hook(lambda m, i: seen.append("propagate"))
    model.convs[1].register_message_forward_hook(lambda m, i, o: seen.append("message"))
    qmodel = qgnn.quantize_model(model, 4).train()
    qmodel(features(), graph()).sum().backward()
    assert seen == ["after", "before", "propagate", "message", "backward"]
    assert isinstance(qmodel.convs[1], MessagePassing)
    seen.clear()
    qgnn.restore_model(qmodel)(features(), graph()).sum().backward()
    assert seen == ["after", "before", "propagate", "message", "backward"]


# Explanation #########################################################################################


def masked(layer: Any, edges: int, value: float = 1.0) -> None:
    layer.explain = True
    layer._edge_mask = torch.full((edges,), value)
    layer._loop_mask = torch.ones(edges, dtype=torch.bool)
    layer._apply_sigmoid = False


def test_explaining_keeps_the_generic_path_quantized() -> None:
    """PyG binds another ``propagate`` to the instance while explaining."""
    x, edge_index = features(), graph()
    conv = GraphConv(WIDTH, OUT).eval()
    qconv: Any = quantized(conv, x, edge_index, bits=2)
    expected = qconv(x, edge_index)
    masked(qconv, edge_index.size(1))
    torch.testing.assert_close(qconv(x, edge_index), expected)
    masked(qconv, edge_index.size(1), 0.5)
    assert relative(qconv(x, edge_index), expected) > 0.01
    for candidate in (copy.deepcopy(qconv), through_pickle(qconv)):
        assert torch.equal(candidate(x, edge_index), qconv(x, edge_index))
    qconv.explain = False
    assert torch.equal(qconv(x, edge_index), expected)
    restored: Any = qgnn.restore_model(qconv)
    assert torch.equal(restored(x, edge_index), conv(x, edge_index))


def test_explaining_before_conversion_and_after_restoring() -> None:
    x, edge_index = features(), graph()
    conv: Any = GraphConv(WIDTH, OUT).eval()
    reference = quantized(conv, x, edge_index, bits=2)(x, edge_index)
    masked(conv, edge_index.size(1))
    qconv: Any = quantized(conv, x, edge_index, bits=2)
    torch.testing.assert_close(qconv(x, edge_index), reference)
    for candidate in (conv, qconv):
        candidate._edge_mask.fill_(0.5)
    expected = conv(x, edge_index)
    assert relative(qconv(x, edge_index), expected) > 0.01
    assert relative(qconv(x, edge_index), reference) > 0.01
    restored = qgnn.restore_model(qconv)
    assert torch.equal(restored(x, edge_index), expected)
    qconv.explain = False
    assert torch.equal(qconv(x, edge_index), reference)


# Compilation #########################################################################################


@pytest.mark.parametrize(
    "name", ["generic", *(pytest.param(n, marks=pytest.mark.slow) for n in ("GCN", "GraphSAGE", "GAT", "GIN"))]
)
def test_compiled_models_stay_quantized(name: str) -> None:
    """PyG's generated ``propagate`` skips its hooks while compiling; ours has none to skip."""

    class Generic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin = Summed(WIDTH, 8), nn.Linear(8, OUT)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.lin(self.conv(x, edge_index).relu())

    torch.manual_seed(0)
    torch._dynamo.reset()
    x, edge_index = features(), graph()
    model = (MODELS.get(name, Generic))().eval()
    qmodel = quantized(model, x, edge_index, bits=2)
    expected = qmodel(x, edge_index)
    assert relative(expected, model(x, edge_index)) > 0.05
    compiled = torch.compile(qmodel, backend="eager", fullgraph=False)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, edge_index), expected, rtol=1e-4, atol=1e-5)
    # In training as well: the same loss and the same gradients.
    losses = []
    for candidate in (qmodel, torch.compile(qmodel, backend="eager")):
        qmodel.zero_grad()
        loss = candidate.train()(x, edge_index).square().mean()
        loss.backward()
        losses.append((loss.detach(), [p.grad for p in qmodel.parameters() if p.grad is not None]))
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
