"""What a new convolution takes: one module, here this one; it is told once, and both of its executions follow."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GraphConv

import qgnn_plugin as qgnn
from qgnn_plugin import extension

NODES, WIDTH, HIDDEN, OUT = 40, 12, 20, 5


class SumConv(GraphConv):
    """``W_1 x_i + W_2 sum_j w_ij x_j``, as a class of its own."""


class WeightedSum(extension.Convolution):
    message_quantizer: Any
    lin_rel: Any
    lin_root: Any

    @classmethod
    def attach(cls, layer: SumConv, sites: extension.SiteFactory) -> None:
        layer.message_quantizer = sites.message("message", layer.in_channels)
        extension.attach_constraint(layer, sites.config.smp, sites.device)

    def forward(self: Any, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        samples = extension.Samples.of(self, x)
        size, rows = (samples.num_nodes, samples.num_nodes), samples.rows(x)
        graph = extension.plain_graph(edge_index, size, self.flow, edge_weight, copies=samples.copies)
        sums = self._product(self.lin_rel, self._sums(self.message_quantizer(rows), graph))
        return samples.shaped(self._finished(self._plus(self._product(self.lin_root, rows), sums)))


class QuantizedSumConv(WeightedSum, extension.Trainable):
    forward = extension.trainable(WeightedSum.forward)


class PackedSumConv(WeightedSum, extension.Frozen):
    forward = extension.inference(WeightedSum.forward)


extension.register_layer(SumConv, QuantizedSumConv, PackedSumConv)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SumConv(WIDTH, HIDDEN), SumConv(HIDDEN, OUT)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        return self.second(self.first(x, edge_index, edge_weight).relu(), edge_index, edge_weight)


def inputs(weighted: bool = False) -> tuple[Tensor, ...]:
    edges = torch.randint(NODES, (2, 150))
    return torch.randn(NODES, WIDTH), edges, *([torch.rand(150)] if weighted else [])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_is_the_converted_model_bit_for_bit(bits: int, weighted: bool) -> None:
    args = inputs(weighted)
    qmodel = qgnn.calibrate(qgnn.quantize_model(Net(), bits=bits), args, steps=3).eval()
    packed, expected = qgnn.pack_model(qmodel), qmodel(*args)
    assert {layer.path for layer in qgnn.summary(packed).layers} == {"kernel"}
    for model in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        for _ in range(2):
            assert torch.equal(model(*args), expected)
    batch = torch.stack([args[0], args[0].flip(0)])
    assert torch.equal(packed(batch, *args[1:]), qmodel(batch, *args[1:]))


def test_it_is_the_layer_that_it_stands_for() -> None:
    args, model = inputs(weighted=True), Net()
    expected = model(*args)
    torch.testing.assert_close(qgnn.quantize_model(model, bits=32)(*args), expected)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), args, steps=3)
    assert (qmodel(*args) - expected).norm() < 0.05 * expected.norm()


def test_it_trains() -> None:
    """Features and parameters have the gradients of the float layer, but for the rounding of 8 bits and the few values
    beyond their ranges, which have none."""
    (x, *graph), layer, upstream = inputs(weighted=True), SumConv(WIDTH, OUT), torch.randn(NODES, OUT)
    qlayer = qgnn.calibrate(qgnn.quantize_model(layer, bits=8), (x, *graph), method="ranges").train()
    found = []
    for each in (layer, qlayer):
        leaf = x.clone().requires_grad_()
        (each(leaf, *graph) * upstream).sum().backward()
        found.append({"x": leaf.grad, **{name: each.get_parameter(name).grad for name, _ in layer.named_parameters()}})
    for name, expected in found[0].items():
        inside = found[1][name] != 0
        assert inside.float().mean() > 0.9, name
        assert (found[1][name] - expected)[inside].norm() < 0.1 * expected.norm(), name
