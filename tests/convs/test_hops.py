"""SGConv, SSGConv, TAGConv and LGConv: every step against dense float64 computations, and what they share."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, features, graph, quantized, relative
from torch import Tensor, nn
from torch_geometric.nn import (
    GATConv,
    GATv2Conv,
    GCNConv,
    LGConv,
    LightGCN,
    MessagePassing,
    SGConv,
    SSGConv,
    TAGConv,
)
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.convs.hops import QuantizedHops

STEPS = 3
LAYERS: dict[str, Callable[..., MessagePassing]] = {
    "SGConv": lambda **options: SGConv(WIDTH, OUT, STEPS, **options),
    "SGConv wider": lambda **options: SGConv(WIDTH, 2 * WIDTH, STEPS, **options),
    "SSGConv": lambda **options: SSGConv(WIDTH, OUT, 0.2, STEPS, **options),
    "TAGConv": lambda **options: TAGConv(WIDTH, OUT, STEPS, **options),
    "LGConv": lambda **options: LGConv(**options),
}


def operator_of(name: str, edge_index: Tensor) -> Tensor:
    """``D^-1/2 (A [+ I]) D^-1/2``, dense in float64; TAGConv and LGConv add no self-loops."""
    dense = torch.zeros(NODES, NODES, dtype=torch.float64)
    dense[edge_index[1], edge_index[0]] = 1
    if name not in ("TAGConv", "LGConv"):
        dense.fill_diagonal_(1)
    root = dense.sum(1).rsqrt().nan_to_num(posinf=0)
    return root.unsqueeze(1) * dense * root


MAPPED = ("SGConv", "SSGConv")  # maps first: OUT is less than WIDTH


def start_of(name: str, layer: Any, x: Tensor) -> Tensor:
    """What the steps start from."""
    return x @ layer.lin.weight.t() if name in MAPPED else x


def output_of(name: str, layer: Any, states: list[Tensor]) -> Tensor:
    """What the layer makes of ``H_0`` to ``H_K``, written as in the papers."""
    if name == "SGConv":
        return states[-1] + layer.lin.bias
    if name == "SGConv wider":
        return layer.lin(states[-1])
    if name == "SSGConv":
        return 0.2 * states[0] + 0.8 / STEPS * torch.stack(states[1:]).sum(0) + layer.lin.bias
    if name == "TAGConv":
        return torch.stack([lin(h) for lin, h in zip(layer.lins, states, strict=True)]).sum(0) + layer.bias
    return states[-1]


def dense_states(layer: Any, x: Tensor, operator: Tensor) -> list[Tensor]:
    """Every state by dense products, from the layer's own quantizers."""
    smp, multiplier = layer.smp, float(layer.multiplier)
    degree = (operator != 0).double().sum(1)
    root = degree.rsqrt().nan_to_num(posinf=0).unsqueeze(1)
    unscale = torch.where(root > 0, 1 / root, torch.zeros_like(root))

    def product(v: Tensor, quantizer: Any) -> Tensor:
        return operator @ (quantizer(v * root).dequantize() * unscale)

    states = [x]
    for k, quantizer in enumerate(layer.step_quantizers.values()):
        h = states[-1]
        if k > 0 and layer.state_quantizers is not None:
            h = layer.state_quantizers[str(k)](h).dequantize()
        change = proposed = product(h, quantizer) - h
        if multiplier and smp.correction == "explicit":
            change = proposed - 2 * smp.eta * multiplier * (proposed - product(proposed, layer.gap_quantizer))
        elif multiplier:
            for _ in range(smp.terms):
                lazy = (change + product(change, layer.gap_quantizer)) / 2
                change = (proposed + 4 * multiplier * lazy) / (1 + 4 * multiplier)
        states.append(h + change)
    return states


@pytest.mark.parametrize("smp", [{}, {"multiplier": 0.6}, {"multiplier": 0.6, "correction": "explicit"}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_dense_computation_step_by_step(name: str, smp: dict[str, Any]) -> None:
    x, edge_index = features().double(), to_undirected(graph(self_loops=False))
    widths = {"weight_bits": 32, "activation_bits": 32, "input_bits": 32 if name in MAPPED else 4}
    config = QuantConfig(bits=4, **widths, smp=SMPConfig(state_bits=8, gap_bits=2, **smp))
    layer: Any = quantized(LAYERS[name]().double(), x, edge_index, config=config)
    operator = operator_of(name, edge_index)
    states = dense_states(layer, start_of(name, layer, x), operator)
    torch.testing.assert_close(layer(x, edge_index), output_of(name, layer, states))
    sites = {site: q.bits for site, q in layer.own_quantizers()}
    steps = layer.num_constraints
    assert sites == {f"step_quantizers.{k}": 4 for k in range(steps)} | {"gap_quantizer": 2} | {
        f"state_quantizers.{k}": 8 for k in range(1, steps)
    }


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_every_step_has_its_constraint(name: str, bits: int) -> None:
    x, edge_index = features().double(), to_undirected(graph(self_loops=False))
    widths = {"weight_bits": 32, "activation_bits": 32, "input_bits": 32 if name in MAPPED else bits}
    config = QuantConfig(bits=bits, **widths, smp=SMPConfig(alpha=0.3))
    layer: Any = qgnn.calibrate(qgnn.quantize_model(LAYERS[name]().double(), config=config), (x, edge_index)).train()
    operator = operator_of(name, edge_index)
    states = dense_states(layer, start_of(name, layer, x), operator)
    layer(x, edge_index)

    def energy(h: Tensor) -> float:
        return float((h * (h - operator @ h)).sum())

    for k, (before, after) in enumerate(itertools.pairwise(states)):
        assert float(layer.constraint_state.energy[k]) == pytest.approx(energy(after - before), rel=1e-6)
        assert float(layer.constraint_state.bound[k]) == pytest.approx(0.3 * energy(before), rel=1e-6)
    assert len(layer.constraint_state.energy) == len(states) - 1


@pytest.mark.parametrize("name", LAYERS)
def test_the_multiplier_finds_the_bound(name: str) -> None:
    x, edge_index = features(), to_undirected(graph())
    config = QuantConfig(bits=8, smp=SMPConfig(alpha=0.1, eta_lambda=0.3))
    layer: Any = qgnn.calibrate(qgnn.quantize_model(LAYERS[name](), config=config), (x, edge_index)).train()
    ratios = []
    for multiplier in (0.0, 0.1, 1.0, 10.0):
        layer.multiplier.fill_(multiplier)
        layer(x, edge_index)
        ratios.append(layer.constraint)
    assert ratios == sorted(ratios, reverse=True)
    layer.multiplier.fill_(0.0)
    for _ in range(100):
        layer(x, edge_index)
        state = qgnn.differential_multiplier_step(layer)[""]
    assert 0.9 < state.constraint < 1.05
    assert 0 < state.multiplier < 50


@pytest.mark.parametrize("name", LAYERS)
def test_full_precision_with_a_multiplier_is_the_corrected_float_layer(name: str) -> None:
    """Nothing is quantized, yet the steps are corrected."""
    x, edge_index = features().double(), to_undirected(graph(self_loops=False))
    config = QuantConfig(bits=32, smp=SMPConfig(multiplier=0.5))
    layer: Any = qgnn.quantize_model(LAYERS[name]().double(), config=config).eval()
    operator = operator_of(name, edge_index)
    lazy = (torch.eye(NODES, dtype=torch.float64) + operator) / 2
    states = [start_of(name, layer, x)]
    for _ in range(layer.num_constraints):
        change = proposed = operator @ states[-1] - states[-1]
        for _ in range(layer.smp.terms):
            change = (proposed + 2 * lazy @ change) / 3
        states.append(states[-1] + change)
    torch.testing.assert_close(layer(x, edge_index), output_of(name, layer, states))


# What PyG caches ######################################################################################################


@pytest.mark.parametrize("name", ["SGConv", "SSGConv"])
def test_quantized_steps_do_not_come_from_a_cache(name: str) -> None:
    """A float model that has run holds its propagated features: steps taken from there would not be quantized."""
    x, edge_index = features(), graph()
    conv = LAYERS[name](cached=True)
    expected = conv(x, edge_index)
    layer = quantized(conv, x, edge_index, bits=2)
    assert all(q.is_set for site, q in layer.own_quantizers())
    assert relative(layer(x, edge_index), expected) > 0.05
    other = features()
    uncached = LAYERS[name]()
    uncached.load_state_dict(conv.state_dict())
    assert relative(layer(other, edge_index), uncached(other, edge_index)) < 0.8
    assert torch.equal(qgnn.restore_model(layer)(x, edge_index), expected)


@pytest.mark.parametrize("name", ["SGConv", "SSGConv"])
def test_steps_that_come_from_a_cache_are_measured(name: str) -> None:
    x, edge_index = features(), graph()
    conv = LAYERS[name](cached=True)
    expected = conv(x, edge_index)
    layer: Any = qgnn.quantize_model(conv, 32).train()
    assert torch.equal(layer(x, edge_index), expected)
    uncached: Any = qgnn.quantize_model(LAYERS[name](), 32).train()
    uncached.load_state_dict(layer.state_dict())
    uncached(x, edge_index)
    assert torch.equal(uncached.constraint_state.energy, layer.constraint_state.energy)


@pytest.mark.parametrize("name", MAPPED)
def test_map_and_steps_commute(name: str) -> None:
    """Codes enter the map before the steps whatever is off: its range is for the same values in every mode."""
    x, edge_index = features(), graph()
    conv = LAYERS[name]().eval()
    layer: Any = quantized(conv, x, edge_index, config=QuantConfig(bits=8, message_bits=32))
    assert layer.is_off
    assert relative(layer(x, edge_index), conv(x, edge_index)) < 0.02
    torch.testing.assert_close(layer.lin.input_quantizer(x).dequantize(), x, rtol=0, atol=0.05)
    before = layer(x, edge_index)
    layer.multiplier.fill_(1e-7)  # the path does not change as the correction starts to act
    torch.testing.assert_close(layer(x, edge_index), before, rtol=1e-4, atol=1e-4)


# Conversion ###########################################################################################################


@pytest.mark.parametrize("name", LAYERS)
def test_restoring_leaves_nothing_behind(name: str) -> None:
    x, edge_index = features(), graph()
    conv = LAYERS[name]().eval()
    layer = quantized(conv, x, edge_index, config=QuantConfig(bits=4, smp=SMPConfig(multiplier=0.3, damping=0.1)))
    assert torch.equal(copy.deepcopy(layer)(x, edge_index), layer(x, edge_index))
    plain = qgnn.restore_model(layer)
    assert type(plain) is type(conv)
    assert set(vars(plain)) == set(vars(conv))
    assert list(plain.state_dict()) == list(conv.state_dict())
    assert torch.equal(plain(x, edge_index), conv(x, edge_index))


def test_light_gcn() -> None:
    model = LightGCN(NODES, 8, num_layers=2).eval()
    edge_index = to_undirected(graph())
    qmodel = qgnn.quantize_model(model, 8)
    qgnn.calibrate(qmodel, [edge_index], forward=lambda m, e: m.get_embedding(e))
    assert all(isinstance(conv, QuantizedHops) for conv in qmodel.convs)
    out = qmodel.eval().get_embedding(edge_index)
    assert 0 < relative(out, model.get_embedding(edge_index)) < 0.02
    shuffled = edge_index[:, torch.randperm(edge_index.size(1))]
    assert torch.equal(qmodel.get_embedding(shuffled), out)  # sums run over integers
    qmodel.train()(edge_index).square().sum().backward()
    assert qmodel.embedding.weight.grad.isfinite().all()


def test_first_maps_read_the_models_input() -> None:
    """The features that enter the model go to the first step, and of TAGConv to its first map as well."""
    config = QuantConfig(bits=2, input_bits=8, activation_bits=4)
    qmodel = qgnn.quantize_model(nn.ModuleList([TAGConv(WIDTH, OUT, 1), SGConv(OUT, OUT, 1)]), config=config)
    sites = qgnn.quantizers(qmodel).items()
    assert {site: q.bits for site, q in sites if "weight" not in site and "gap" not in site} == {
        "0.step_quantizers.0": 8, "0.lins.0.input_quantizer": 8, "0.lins.1.input_quantizer": 4,
        "1.step_quantizers.0": 2, "1.lin.input_quantizer": 4,
    }  # fmt: skip
    for width, step in ((OUT, 2), (2 * WIDTH, 8)):
        layer: Any = qgnn.quantize_model(SGConv(WIDTH, width, 1), config=config)
        assert layer.step_quantizers["0"].bits == step
        assert layer.lin.input_quantizer.bits == (8 if step == 2 else 4)


def test_features_of_one_value_per_row_stay_exact() -> None:
    """Also after the scaling by ``d^-1/2``, which differs by row."""
    x, edge_index = (torch.randn(NODES, 64) > 0.5).float(), graph()
    layer: Any = quantized(LGConv(), x, edge_index, bits=2)
    assert layer.step_quantizers["0"].is_zero_one
    torch.testing.assert_close(layer(x, edge_index), qgnn.restore_model(layer)(x, edge_index), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggr", ["mean", "max", "median"])
@pytest.mark.parametrize(
    "make",
    [
        lambda aggr: SGConv(8, 8, 2, aggr=aggr),
        lambda aggr: TAGConv(8, 8, aggr=aggr),
        lambda aggr: GCNConv(8, 8, aggr=aggr),
        lambda aggr: GATConv(8, 4, 2, aggr=aggr),
        lambda aggr: GATv2Conv(8, 4, 2, aggr=aggr),
    ],
    ids=["SG", "TAG", "GCN", "GAT", "GATv2"],
)
def test_other_aggregations_are_kept(make: Callable[[str], nn.Module], aggr: str) -> None:
    """Layers whose quantized form sums are converted by what they send."""
    conv, args = make(aggr), (torch.randn(NODES, 8), graph())
    want = conv(*args)
    assert torch.equal(qgnn.quantize_model(conv, bits=32)(*args), want)
    qconv = qgnn.calibrate(qgnn.quantize_model(conv, bits=8), args).eval()
    assert (qconv(*args) - want).norm() < 0.05 * want.norm()
    torch.testing.assert_close(qgnn.pack_model(qconv)(*args), qconv(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: SGConv(8, 8, 2), lambda: SSGConv(8, 8, 0.1, 2), lambda: TAGConv(8, 8, 2)], ids=["SG", "SSG", "TAG"]
)
def test_stacks_of_equal_width_are_rewritten(make: Callable[[], nn.Module]) -> None:
    smp = SMPConfig(initial_residual=0.1, identity_map=0.5)
    stack = qgnn.quantize_model(nn.ModuleList([make() for _ in range(3)]), config=QuantConfig(bits=32, smp=smp))
    x, edge_index = torch.randn(NODES, 8), graph()
    plain = qgnn.restore_model(stack)
    h = x
    for layer in stack:
        h = layer(h, edge_index)
    expected, operator = x, operator_of("SGConv", edge_index).float()
    for depth, conv in enumerate(plain, 1):
        strength = math.log(0.5 / depth + 1)
        mixed, support = 0.9 * expected + 0.1 * x, 0.9 * operator @ expected + 0.1 * x
        expected = (1 - strength) * support + strength * conv(mixed, edge_index)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
