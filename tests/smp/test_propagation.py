"""SMPropagation against APPNP and against dense float64 computations."""

from __future__ import annotations

import copy
import itertools
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.support import FORMATS, NODES, WIDTH, adjacency, features, graph
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import APPNP, GCNConv, MessagePassing
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.graph.adjacency import NormalizedGraph
from qgnn_plugin.quantizers import QLRQuantizer
from qgnn_plugin.smp.constraint import attach_constraint
from qgnn_plugin.smp.propagation import PropagationLayer


def walk(edge_index: Tensor) -> Tensor:
    """The normalized adjacency with self-loops, dense in float64."""
    dense = torch.zeros(NODES, NODES, dtype=torch.float64)
    dense[edge_index[1], edge_index[0]] = 1
    dense.fill_diagonal_(1)
    factor = dense.sum(1).rsqrt()
    return factor.unsqueeze(1) * dense * factor


def energy(x: Tensor, operator: Tensor) -> float:
    return float((x * (x - operator @ x)).sum())


def remaining(change: Tensor, operator: Tensor, config: SMPConfig, multiplier: float) -> Tensor:
    """The corrected change, by dense matrices."""
    identity = torch.eye(NODES, dtype=torch.float64)
    if config.correction == "explicit":
        return (identity - 2 * config.eta * multiplier * (identity - operator)) @ change
    lazy, weight = (identity + operator) / 2, 4 * multiplier
    result = change
    for _ in range(config.terms):
        result = (change + weight * lazy @ result) / (1 + weight)
    return result


def dense_steps(x0: Tensor, operator: Tensor, config: SMPConfig, steps: int, multiplier: float) -> list[Tensor]:
    """Every state of the propagation at a constant multiplier."""
    states = [x0]
    for _ in range(steps):
        h = states[-1]
        gradient = (h - x0) + config.mu * (h - operator @ h)
        states.append(h + remaining(-config.eta * gradient, operator, config, multiplier))
    return states


# The float layer ######################################################################################


@pytest.mark.parametrize("options", [{}, {"add_self_loops": False}, {"normalize": False}, {"cached": True}])
@pytest.mark.parametrize("fmt", FORMATS)
def test_equals_appnp(fmt: str, options: dict[str, Any]) -> None:
    x, edges = features(), adjacency(graph(self_loops=False), fmt)
    ours, theirs = SMPropagation(10, **options), APPNP(10, 0.1, **options)
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), rtol=1e-5, atol=1e-5)
    assert isinstance(ours, MessagePassing)


def test_edge_weights_and_gradients_equal_appnp() -> None:
    edge_index = graph()
    inputs = [features().double(), torch.rand(edge_index.size(1), dtype=torch.float64)]
    gradients = []
    for layer in (SMPropagation(6, 0.15, dropout=0.0), APPNP(6, 0.15)):
        x, weight = (value.clone().requires_grad_() for value in inputs)
        out = layer(x, edge_index, weight)
        gradients.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("correction", ["proximal", "explicit"])
@pytest.mark.parametrize(("eta", "mu"), [(0.1, 9.0), (0.1, 4.0), (0.3, 2.0), (0.05, 30.0)])
@pytest.mark.parametrize("multiplier", [0.0, 0.4])
def test_descends_as_the_dense_computation_does(eta: float, mu: float, multiplier: float, correction: str) -> None:
    edge_index = to_undirected(graph())
    config = SMPConfig(eta=eta, mu=mu, multiplier=multiplier, correction=correction, alpha=0.5)  # type: ignore[arg-type]
    x, operator = features().double(), walk(edge_index)
    layer = SMPropagation(5, smp=config).double()
    states = dense_steps(x, operator, config, 5, multiplier)
    torch.testing.assert_close(layer(x, edge_index), states[-1])
    torch.testing.assert_close(layer.eval()(x, edge_index), states[-1])
    measured = layer.constraint_state
    assert measured is not None
    for k, (before, after) in enumerate(itertools.pairwise(states)):
        assert float(measured.energy[k]) == pytest.approx(energy(after - before, operator), rel=1e-6)
        assert float(measured.bound[k]) == pytest.approx(0.5 * energy(before, operator), rel=1e-6)
    assert layer.constraint == pytest.approx(
        max(float(e / b) for e, b in zip(measured.energy, measured.bound, strict=True))
    )


def test_absolute_bound_counts_edges_with_loops() -> None:
    edge_index = graph(self_loops=False)
    layer = SMPropagation(2, smp=SMPConfig(bound="absolute", alpha=0.25))
    layer(features(), edge_index)
    assert layer.constraint_state is not None
    assert layer.constraint_state.bound.tolist() == [0.25 * (edge_index.size(1) + NODES)] * 2


class Largest(TorchDispatchMode):
    """The largest tensor that any operation wrote."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self.size = max(self.size, value.numel())
        return out


@pytest.mark.parametrize("multiplier", [0.0, 1.0])
def test_memory_is_linear(multiplier: float) -> None:
    nodes = 3000
    x, edge_index = torch.randn(nodes, 4), to_undirected(torch.randint(nodes, (2, 4 * nodes)))
    layer = SMPropagation(4, smp=SMPConfig(multiplier=multiplier))
    with Largest() as largest:
        layer(x.requires_grad_(), edge_index).sum().backward()
    assert largest.size <= 2 * (edge_index.size(1) + nodes)


def test_dropout_acts_on_edges_in_training_only() -> None:
    x, edge_index = features(), graph()
    layer, plain = SMPropagation(4, dropout=0.5), SMPropagation(4)
    assert not torch.allclose(layer(x, edge_index), plain(x, edge_index))
    assert layer.constraint is not None
    torch.testing.assert_close(layer.eval()(x, edge_index), plain(x, edge_index))


def test_cached_graph_is_that_of_the_first_call() -> None:
    x, edge_index = features(), graph()
    layer = SMPropagation(3, cached=True)
    expected = layer(x, edge_index)
    assert torch.equal(layer(x, graph(seed=1)), expected)
    layer.multiplier.fill_(2.0)
    layer.reset_parameters()
    assert float(layer.multiplier) == 0
    assert not torch.equal(layer(x, graph(seed=1)), expected)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\] \(got 0\)"):
        SMPropagation(3, 0)
    with pytest.raises(ValueError, match="'add'"):
        SMPropagation(3, aggr="mean")
    with pytest.raises(ValueError, match="Expected node features"):
        SMPropagation(3)(torch.randn(NODES), graph())
    layer = SMPropagation(3)
    layer.explain = True
    with pytest.raises(NotImplementedError, match="APPNP"):
        layer(features(), graph())


# The constraint #######################################################################################


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", ["SMPropagation", "APPNP"])
def test_larger_multiplier_leaves_less_and_the_bound_is_met(name: str, bits: int) -> None:
    x, edge_index = features(), to_undirected(graph())
    config = SMPConfig(alpha=0.1, eta_lambda=0.3)
    layer: Any = SMPropagation(6, smp=config) if name == "SMPropagation" else APPNP(6, 0.1)
    layer = qgnn.calibrate(qgnn.quantize_model(layer, config=QuantConfig(bits=bits, smp=config)), (x, edge_index))
    ratios = []
    for multiplier in (0.0, 0.05, 0.2, 1.0, 5.0, 50.0):
        layer.multiplier.fill_(multiplier)
        layer.train()(x, edge_index)
        ratios.append(layer.constraint)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 0.1 * ratios[0]
    layer.multiplier.fill_(0.0)
    for _ in range(150):
        layer(x, edge_index)
        state = qgnn.differential_multiplier_step(layer)[""]
    assert 0.9 < state.constraint < 1.05
    assert 0 < state.multiplier < 50


@pytest.mark.parametrize("bits", [32, 4])
def test_products_per_step(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplier of zero costs nothing, and measuring K steps one product more than they take."""
    x, edge_index = features(), graph()
    layer: Any = qgnn.calibrate(qgnn.quantize_model(SMPropagation(5), bits), (x, edge_index))
    products = []
    original = NormalizedGraph.apply

    def apply(self: NormalizedGraph, v: Tensor) -> Tensor:
        products.append(v)
        return original(self, v)

    monkeypatch.setattr(NormalizedGraph, "apply", apply)
    layer.eval()(x, edge_index)
    assert len(products) == (5 if bits == 32 else 0)  # quantized steps sum codes
    products.clear()
    layer.train()(x, edge_index)
    assert len(products) == 6


def test_default_bound_leaves_propagation_alone() -> None:
    layer = SMPropagation(8)
    layer(features(), to_undirected(graph()))
    state = qgnn.differential_multiplier_step(layer)[""]
    assert state.constraint <= 1
    assert state.multiplier == 0


def test_inner_schedule_moves_with_the_steps() -> None:
    edge_index, steps = to_undirected(graph()), 6
    config = SMPConfig(
        alpha=0.05, schedule="inner", eta_lambda=0.2, eta_slack=0.1, damping=0.1, multiplier=0.3, slack=0.5
    )
    x, operator = features().double(), walk(edge_index)
    layer = SMPropagation(steps, smp=config).double()
    h, multiplier, slack, penalty = x, 0.3, 0.5, 0.0
    for _ in range(steps):
        force = max(0.0, multiplier + penalty)
        proposed = -config.eta * ((h - x) + config.mu * (h - operator @ h))
        change = remaining(proposed, operator, config, force)
        violation = energy(change, operator) / (0.05 * energy(h, operator)) - 1 + slack**2
        penalty = config.damping * violation
        slack -= 2 * config.eta_slack * max(0.0, multiplier + penalty) * slack
        multiplier = max(0.0, multiplier + config.eta_lambda * violation)
        h = h + change
    for _ in range(2):  # restarted in every forward
        torch.testing.assert_close(layer(x, edge_index), h)
    assert float(layer.multiplier) == pytest.approx(multiplier)
    assert float(layer.slack) == pytest.approx(slack)
    assert float(layer._buffers["penalty"]) == pytest.approx(penalty)
    torch.testing.assert_close(layer.eval()(x, edge_index), h)
    state = qgnn.differential_multiplier_step(layer)[""]
    assert state.multiplier == pytest.approx(multiplier)  # reported, and left alone


def test_carried_schedule_goes_on_where_it_ended() -> None:
    x, edge_index = features(), to_undirected(graph())
    layer = SMPropagation(3, smp=SMPConfig(alpha=0.01, schedule="inner", eta_lambda=0.01, carry=True))
    outs, values = [], []
    for _ in range(3):
        outs.append(layer(x, edge_index))
        values.append(float(layer.multiplier))
    assert 0 < values[0] < values[1] < values[2]
    assert not torch.equal(outs[0], outs[1])
    other = SMPropagation(3, smp=layer.smp)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, edge_index), layer(x, edge_index))
    before = layer.state_dict()["multiplier"].clone()
    layer.eval()(x, edge_index)
    assert torch.equal(layer.multiplier, before)


def test_reference_is_the_authors_update() -> None:
    """Written out with the incidence matrix and dense products, as in their code."""
    edge_index, steps = to_undirected(graph(self_loops=False)), 10
    x, operator = features().double().requires_grad_(), walk(edge_index)
    factor = operator.diagonal().sqrt()
    pairs = edge_index[:, edge_index[0] < edge_index[1]]
    incidence = torch.zeros(pairs.size(1), NODES, dtype=torch.float64)
    rows = torch.arange(pairs.size(1))
    incidence[rows, pairs[0]], incidence[rows, pairs[1]] = factor[pairs[0]], -factor[pairs[1]]
    torch.testing.assert_close(incidence.t() @ incidence, torch.eye(NODES, dtype=torch.float64) - operator)
    alpha, eta, eta_lambda = 0.1, 0.1, 1e-2  # a faster ascent than 1e-5, so that it shows
    h, multiplier, slack = x, torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    for _ in range(steps):
        u = (1 - (1 + 9) * eta) * h + 9 * eta * operator @ h + eta * x
        gap = u - h
        h = u + 2 * eta * multiplier * operator @ gap
        slack = slack + 2 * 1e-5 * multiplier * slack
        count = (operator != 0).sum()
        multiplier = multiplier + eta_lambda * (alpha * count - slack * slack - (incidence @ gap).square().sum())
    layer = SMPropagation(steps, smp=SMPConfig.reference(eta_lambda=eta_lambda)).double()
    out = layer(x, edge_index)
    torch.testing.assert_close(out, h)
    assert float(layer.multiplier) == pytest.approx(multiplier.item())
    assert float(layer.slack) == pytest.approx(slack.item())
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, h))
    torch.testing.assert_close(ours, theirs)


def test_reference_is_for_propagation_only() -> None:
    config = QuantConfig(smp=SMPConfig.reference())
    assert SMPConfig.from_dict(config.smp.to_dict()) == config.smp
    with pytest.raises(ValueError, match=r"propagation layer.*GCNConv"):
        qgnn.quantize_model(GCNConv(3, 3), config=config)
    with pytest.raises(ValueError, match="'bound' = 'absolute'"):
        SMPConfig.reference(bound="relative")


# Conversion ###########################################################################################


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
