"""GraphConv: sums of codes with and without weights, gradients, and what any layer does where these are no codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, adjacency, features, graph, quantized
from torch import Tensor
from torch_geometric.nn import GraphConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.kernels.plan import GraphPlan

MESSAGES = QuantConfig(bits=32, message_bits=4)  # and nothing else is rounded


def dense(edge_index: Tensor, aggr: str, weight: Tensor | None = None) -> Tensor:
    """What the layer adds up with, ``[N, N]`` float64."""
    values = torch.ones(edge_index.size(1)) if weight is None else weight
    zeros = torch.zeros(NODES, NODES, dtype=torch.float64)
    matrix = zeros.index_put((edge_index[1], edge_index[0]), values.double(), accumulate=True)
    if aggr != "mean":
        return matrix
    return matrix / torch.bincount(edge_index[1], minlength=NODES).clamp_min(1).unsqueeze(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggr", ["add", "mean", "max"])
@pytest.mark.parametrize("bits", [2, 8])
@torch.no_grad()
def test_packed_is_the_converted_layer_bit_for_bit(bits: int, aggr: str, weighted: bool) -> None:
    x, edge_index = features(), graph()
    more = (torch.rand(edge_index.size(1)),) if weighted else ()
    qconv = quantized(GraphConv(WIDTH, OUT, aggr=aggr), x, edge_index, *more, bits=bits)
    packed = qgnn.pack_model(qconv)
    for args in ((x, edge_index, *more), (torch.stack([x, -x]), edge_index, *more)):
        assert torch.equal(packed(*args), qconv(*args))
    path = "generated kernel" if aggr == "max" else "kernel"
    assert qgnn.summary(packed).layers[0].runs.startswith(f"packed: {path}")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggr", ["add", "mean"])
def test_values_and_gradients_are_those_of_a_dense_computation(aggr: str, weighted: bool) -> None:
    x, edge_index, cotangent = features().requires_grad_(), graph(), torch.randn(NODES, OUT)
    weight = torch.rand(edge_index.size(1)).requires_grad_() if weighted else None
    layer: Any = quantized(GraphConv(WIDTH, OUT, aggr=aggr), x.detach(), edge_index, config=MESSAGES).train()
    out = layer(x, edge_index, weight)
    sent = layer.argument_quantizers["x"](x).dequantize()
    maps = [layer.lin_rel.weight, layer.lin_rel.bias, layer.lin_root.weight]
    relation, bias, root = (p.double() for p in maps)
    expected = dense(edge_index, aggr, weight) @ sent.double() @ relation.t() + bias + x.double() @ root.t()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *maps, *([] if weight is None else [weight])]
    found = torch.autograd.grad(out, leaves, cotangent)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, cotangent.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_graph_whose_weights_are_learned_is_sorted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, edge_index = features(), graph(seed=7)
    layer = quantized(GraphConv(WIDTH, OUT), x, graph()).train()
    made, counts, original = [], [], GraphPlan.from_edges
    monkeypatch.setattr(GraphPlan, "from_edges", lambda *args: made.append(1) or original(*args))
    for _ in range(2):
        weight = torch.rand(edge_index.size(1)).requires_grad_()
        layer(x, edge_index, weight).sum().backward()
        assert weight.grad is not None
        counts.append(len(made))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("fmt", ["csr", "coo", "EdgeIndex"])
@pytest.mark.parametrize("aggr", ["add", "mean"])
@torch.no_grad()
def test_values_of_a_matrix_are_its_weights(aggr: str, fmt: str) -> None:
    x, edge_index = features(), graph(self_loops=False)
    weight = torch.rand(edge_index.size(1)) + 0.1
    given = (edge_index, weight) if fmt == "EdgeIndex" else (adjacency(edge_index, fmt, weight),)
    qconv = quantized(GraphConv(WIDTH, OUT, aggr=aggr), x, edge_index, weight)
    expected = qconv(x, edge_index, weight)
    for layer in (qconv, qgnn.pack_model(qconv)):
        assert torch.equal(layer(x, *given), expected)


@torch.no_grad()
def test_maps_that_stay_float() -> None:
    x, edge_index = features(), graph()
    model = torch.nn.ModuleDict({"conv": GraphConv(WIDTH, OUT)})
    qmodel: Any = qgnn.quantize_model(model, 4, exclude=["conv.lin_rel"])
    qgnn.calibrate(qmodel.conv, (x, edge_index))
    packed: Any = qgnn.pack_model(qmodel.eval())
    assert type(packed.conv.lin_rel) is type(model["conv"].lin_rel)
    assert torch.equal(packed.conv(x, edge_index), qmodel.conv(x, edge_index))


@torch.no_grad()
def test_pairs_and_sizes() -> None:
    x, edge_index = features(), graph()
    few = edge_index[:, edge_index[1] < 9]
    qconv = quantized(GraphConv((WIDTH, 5), OUT), (x, torch.randn(NODES, 5)), edge_index)
    packed = qgnn.pack_model(qconv)
    for args in (((x, torch.randn(9, 5)), few), ((x, None), few, None, (NODES, 9)), ((x, None), few)):
        out = qconv(*args)
        assert out.size(0) == (NODES if len(args) == 2 and args[0][1] is None else 9)
        assert torch.equal(packed(*args), out)
    with pytest.raises(ValueError, match="12 source nodes"):
        qconv((x, None), few, None, (12, 9))
