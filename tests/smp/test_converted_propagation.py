"""Converted propagation layers: quantized steps and their constraint."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.support import WIDTH, features, graph
from smp.dense import walk
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GCNConv
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.quantizers import QLRQuantizer
from qgnn_plugin.smp.constraint import attach_constraint
from qgnn_plugin.smp.descent import PropagationLayer


@pytest.mark.parametrize("multiplier", [0.0, 0.7])
def test_full_precision_is_the_float_layer(multiplier: float) -> None:
    x, edge_index = features(), graph()
    layer = SMPropagation(4, smp=SMPConfig(alpha=0.2, multiplier=multiplier))
    qlayer = qgnn.quantize_model(layer, 32)
    assert torch.equal(qlayer(x, edge_index), layer(x, edge_index))
    assert qlayer.constraint == layer.constraint
    assert qlayer.smp == layer.smp  # its own, whatever the model's configuration says


def test_appnp_in_full_precision_measures_its_steps() -> None:
    x, edge_index = features(), graph()
    config = SMPConfig(alpha=0.3)
    layer, expected = APPNP(5, 0.1), SMPropagation(5, smp=config)
    qlayer: Any = qgnn.quantize_model(layer, config=QuantConfig(bits=32, smp=config)).train()
    assert torch.equal(qlayer(x, edge_index), layer(x, edge_index))
    expected(x, edge_index)
    torch.testing.assert_close(qlayer.constraint_state.energy, expected.constraint_state.energy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(qlayer.constraint_state.bound, expected.constraint_state.bound, rtol=1e-4, atol=1e-4)
    assert qlayer.step_meter is None


@pytest.mark.parametrize("correction", ["proximal", "explicit"])
@pytest.mark.parametrize("multiplier", [0.0, 0.6])
def test_sites_quantize_state_messages_and_gaps(multiplier: float, correction: str) -> None:
    """The whole computation once more with dense matrices, from the layer's own quantizers."""
    edge_index = to_undirected(graph())
    smp = SMPConfig(multiplier=multiplier, correction=correction, mu=4.0, state_bits=8, gap_bits=2)  # type: ignore[arg-type]
    x, operator = features().double(), walk(edge_index)
    layer: Any = qgnn.quantize_model(SMPropagation(3, smp=smp).double(), 4)
    qgnn.calibrate(layer, (x, edge_index)).eval()
    sites = {name: q.bits for name, q in layer.named_modules() if isinstance(q, QLRQuantizer)}
    assert sites == {"input_quantizer": 4, "gap_quantizer": 2, "state_quantizers.1": 8, "state_quantizers.2": 8} | {
        f"step_quantizers.{k}": 4 for k in range(3)
    }
    root = operator.diagonal().sqrt().unsqueeze(1)  # d^-1/2

    def product(v: Tensor, quantizer: QLRQuantizer) -> Tensor:
        return operator @ (quantizer(v * root).dequantize() / root)

    x0 = layer.input_quantizer(x).dequantize()
    h = x0
    for k in range(3):
        h = h if k == 0 else layer.state_quantizers[str(k)](h).dequantize()
        u = (1 - 5 * 0.1) * h + 0.4 * product(h, layer.step_quantizers[str(k)]) + 0.1 * x0
        change = proposed = u - h
        if multiplier and correction == "explicit":
            change = proposed - 2 * 0.1 * multiplier * (proposed - product(proposed, layer.gap_quantizer))
        elif multiplier:
            for _ in range(smp.terms):
                lazy = (change + product(change, layer.gap_quantizer)) / 2
                change = (proposed + 4 * multiplier * lazy) / (1 + 4 * multiplier)
        h = h + change
    torch.testing.assert_close(layer(x, edge_index), h)


def test_gap_range_is_known_before_the_multiplier_rises() -> None:
    x, edge_index = features(), graph()
    calibrated: Any = qgnn.calibrate(qgnn.quantize_model(APPNP(3, 0.1), 4), (x, edge_index))
    trained: Any = qgnn.quantize_model(APPNP(3, 0.1), 4).train()
    trained(x, edge_index)
    for layer in (calibrated, trained):
        assert layer.gap_quantizer.is_set
        layer.multiplier.fill_(1.0)
        assert layer.eval()(x, edge_index).isfinite().all()


def test_copies_pickles_and_restoring_keep_the_constraint() -> None:
    x, edge_index = features(), graph()
    layer = SMPropagation(3, 0.2, smp=SMPConfig(multiplier=0.5, damping=0.3))
    layer._buffers["penalty"].fill_(0.25)
    qlayer: Any = qgnn.calibrate(qgnn.quantize_model(layer, 4), (x, edge_index)).eval()
    assert qlayer.multiplier_value == pytest.approx(0.75)
    expected = qlayer(x, edge_index)
    for other in (copy.deepcopy(qlayer), pickle.loads(pickle.dumps(qlayer))):
        assert torch.equal(other(x, edge_index), expected)
    plain = qgnn.restore_model(qlayer)
    assert type(plain) is SMPropagation
    assert list(plain.state_dict()) == ["multiplier", "slack", "penalty"]
    assert torch.equal(plain.eval()(x, edge_index), layer.eval()(x, edge_index))


def test_constraint_is_measured_in_compiled_training() -> None:
    torch._dynamo.reset()
    x, edge_index = features(), graph()
    model = nn.ModuleDict({"conv": GCNConv(WIDTH, 6), "prop": SMPropagation(3, smp=SMPConfig(alpha=0.1))})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = qgnn.quantize_model(model, config=QuantConfig(bits=4, smp=SMPConfig(alpha=0.1)))

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.inner["prop"](self.inner["conv"](x, edge_index), edge_index)

    net = qgnn.calibrate(Net(), (x, edge_index)).train()
    compiled = torch.compile(net, backend="eager")
    for multiplier in (0.0, 0.5):  # the correction is compiled in when it starts to act
        for layer in qgnn.smp_layers(net).values():
            layer.multiplier.fill_(multiplier)
            layer.constraint_state = None
            assert layer.is_smoothing == (multiplier > 0)
        out = compiled(x, edge_index)
        measured = {name: layer.constraint for name, layer in qgnn.smp_layers(net).items()}
        torch.testing.assert_close(out, net(x, edge_index))
        for name, layer in qgnn.smp_layers(net).items():
            assert measured[name] == pytest.approx(layer.constraint, rel=1e-4)


class DenseGraph(nn.Module):
    """A propagation over a dense matrix: what is compiled is the method alone, without kernels."""

    source = None

    def __init__(self, operator: Tensor) -> None:
        super().__init__()
        self.operator, self.plan = operator, SimpleNamespace(num_edges=operator.numel())

    def apply(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.operator @ x


class DensePropagation(PropagationLayer, nn.Module):
    def __init__(self, operator: Tensor, smp: SMPConfig) -> None:
        super().__init__()
        self.K, self.smp, self.graph = 3, smp, DenseGraph(operator)
        attach_constraint(self, smp, None)

    def forward(self, x: Tensor) -> Tensor:
        apply = self.graph.apply
        x = self.propagate_steps(x, self.graph, lambda k, h: apply(h), lambda k, d: apply(d), exact=True)  # type: ignore[arg-type]
        steps = self.constraint_state
        x = self.smooth(x, apply(x), apply, 1)
        self.constraint_state, self.last = steps, self.constraint_state
        return x


@pytest.mark.parametrize("schedule", ["step", pytest.param("inner", marks=pytest.mark.slow)])
@pytest.mark.parametrize("multiplier", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_measuring_breaks_no_graph(multiplier: float, schedule: Any) -> None:
    torch._dynamo.reset()
    smp = SMPConfig(alpha=0.1, multiplier=multiplier, schedule=schedule)
    layer = DensePropagation(walk(graph()).float(), smp)
    x = features()
    expected = layer(x)
    measured = [layer.constraint_state, layer.last]
    layer.constraint_state = layer.last = None
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x.requires_grad_())
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    for found, wanted in zip((layer.constraint_state, layer.last), measured, strict=True):
        assert found is not None
        assert wanted is not None
        assert not found.energy.requires_grad
        torch.testing.assert_close(found.energy, wanted.energy)
        torch.testing.assert_close(found.bound, wanted.bound)
