"""Code arithmetic does not follow autocast: every layer, converted, packed and in training, in bfloat16 and float16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_geometric.nn as pyg
from core.support import CONVS, OUT, WIDTH, features, graph, quantized, relative
from torch import Tensor, nn

import qgnn_plugin as qgnn

HALVES = (torch.bfloat16, torch.float16)


def _edge_conv() -> nn.Module:
    return pyg.EdgeConv(nn.Sequential(nn.Linear(2 * WIDTH, OUT), nn.ReLU(), nn.Linear(OUT, OUT)))


# Layers on the generic path: what is theirs follows autocast, their quantizers and linear maps do not.
GENERIC: dict[str, Callable[[], nn.Module]] = {
    "GraphConv max": lambda: pyg.GraphConv(WIDTH, OUT, aggr="max"),
    "TransformerConv": lambda: pyg.TransformerConv(WIDTH, OUT, heads=2),
    "ResGatedGraphConv": lambda: pyg.ResGatedGraphConv(WIDTH, OUT),
    "EdgeConv": _edge_conv,
    "GatedGraphConv": lambda: pyg.GatedGraphConv(WIDTH, 2),
    "ChebConv": lambda: pyg.ChebConv(WIDTH, OUT, 3),
    "ARMAConv": lambda: pyg.ARMAConv(WIDTH, OUT),
    "FiLMConv": lambda: pyg.FiLMConv(WIDTH, OUT),
    "GENConv": lambda: pyg.GENConv(WIDTH, OUT),
    "LEConv": lambda: pyg.LEConv(WIDTH, OUT),
    "EGConv": lambda: pyg.EGConv(WIDTH, OUT, num_heads=2),
}
LINEAR = {"Linear": lambda: nn.Linear(WIDTH, OUT), "PyG Linear": lambda: pyg.Linear(WIDTH, OUT)}
NATIVE = {**CONVS, **LINEAR}


def _arguments(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = features().to(dtype).float()
    return (x,) if name in LINEAR else (x, graph())


def _in_half(args: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same values as a layer before leaves them under autocast."""
    return args[0].to(dtype), *args[1:]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NATIVE)
def test_native_layers_compute_the_same_under_autocast(name: str, dtype: torch.dtype) -> None:
    args = _arguments(name, dtype)
    qmodel = quantized(NATIVE[name](), *args)
    with torch.no_grad():
        for model in (qmodel, qgnn.pack_model(qmodel)):
            expected = model(*args)
            with torch.autocast("cpu", dtype=dtype):
                assert torch.equal(model(*args), expected)
                assert torch.equal(model(*_in_half(args, dtype)), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NATIVE)
def test_native_layers_train_the_same_under_autocast(name: str, dtype: torch.dtype) -> None:
    args = _arguments(name, dtype)
    learned = qgnn.QuantConfig(bits=8, learn_input_ranges=True)  # of an LGConv nothing else learns
    model = quantized(NATIVE[name](), *args, config=learned).train()
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = model(*(_in_half(args, dtype) if enabled else args))
        out.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "SAGEConv", "GINConv", "APPNP", "TransformerConv"])
def test_layers_in_32_bits_follow_autocast_as_their_originals_do(name: str, dtype: torch.dtype) -> None:
    args = _arguments(name, dtype)
    model = {**NATIVE, **GENERIC}[name]().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = model(*args)
        assert torch.equal(qgnn.quantize_model(model, 32)(*args), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", GENERIC)
def test_generic_layers_change_as_little_as_float_ones(name: str, dtype: torch.dtype) -> None:
    args = _arguments(name, dtype)
    model = GENERIC[name]().eval()
    qmodel = quantized(model, *args)
    step = 1 / (2**8 - 1)  # a value that the layer computes in half precision may fall on the next code
    with torch.no_grad():
        expected = model(*args)
        with torch.autocast("cpu", dtype=dtype):
            allowed = 4 * relative(model(*_in_half(args, dtype)), expected) + step
        for converted in (qmodel, qgnn.pack_model(qmodel)):
            expected = converted(*args)
            for given in (args, _in_half(args, dtype)):
                with torch.autocast("cpu", dtype=dtype):
                    assert relative(converted(*given), expected) <= allowed
    qmodel.train()
    with torch.autocast("cpu", dtype=dtype):
        loss = qmodel(*args).float().square().mean()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in qmodel.parameters() if p.grad is not None)


def test_sums_that_float16_cannot_hold_stay_finite() -> None:
    hub = torch.stack([torch.arange(600), torch.zeros(600, dtype=torch.long)])
    model = nn.Sequential(nn.Linear(WIDTH, OUT), nn.ReLU())
    x = 50 * torch.rand(600, WIDTH)
    qmodel = quantized(pyg.GCNConv(WIDTH, OUT, normalize=False), x, hub)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert bool(qmodel(x, hub).isfinite().all())
        assert bool(qgnn.pack_model(qmodel)(x, hub).isfinite().all())
        assert bool(quantized(model, x)(x).isfinite().all())


@pytest.mark.parametrize("dtype", HALVES)
def test_compressed_activations_and_a_gradient_scaler(dtype: torch.dtype) -> None:
    x, edge_index = features(), graph()
    model = pyg.GCN(WIDTH, 8, 2, OUT)
    qmodel = quantized(model, x, edge_index, bits=4).train()
    gradients = []
    for enabled in (False, True):
        qmodel.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled and dtype == torch.float16)
        optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.0)
        with qgnn.compressed_activations(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = qmodel(x, edge_index).square().mean()
            scaler.scale(loss).backward()  # inside of autocast
        scaler.unscale_(optimizer)
        gradients.append([p.grad.clone() for p in qmodel.parameters() if p.grad is not None])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
