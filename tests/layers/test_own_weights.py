"""Weights in parameters that a layer's own code multiplies by."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import NODES, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import ARMAConv, GatedGraphConv, GCN2Conv, GMMConv, MessagePassing
from torch_geometric.nn import Linear as PyGLinear

import qgnn_plugin as qgnn
from qgnn_plugin.layers.reads import reads_of

LEAD = 3


class Kipf(nn.Module):
    """A graph convolution as its first implementation writes it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_in, num_out) / num_in**0.5)
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        return torch.spmm(adj, torch.mm(x, self.weight)) + self.bias


class Forms(nn.Module):
    """Every way to multiply."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "right": (WIDTH, 6), "left": (6, WIDTH), "stack": (LEAD, WIDTH, 6), "mapped": (6, WIDTH),
            "added": (WIDTH, 6), "turned": (6, WIDTH), "summed": (WIDTH, 2, 6),
        }.items():  # fmt: skip
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / WIDTH**0.5))

    def products(self, x: Tensor) -> dict[str, Tensor]:
        found = {"right": x @ self.right, "left": (self.left @ x.t()).t(), "mapped": F.linear(x, self.mapped)}
        found["stack"] = x @ self.stack
        found["item"] = torch.stack([x.matmul(self.stack[i]) for i in range(LEAD)])
        found["unbound"] = torch.stack([torch.mm(x, w) for w in self.stack.unbind()])
        found["batch"] = torch.bmm(x.expand(LEAD, *x.shape), self.stack)
        found["added"] = torch.addmm(x[:, :6], x, self.added, beta=0.5, alpha=2)
        found["turned"] = torch.matmul(x.view(4, -1, WIDTH), self.turned.t())
        found["summed"] = torch.einsum("nk,khf->fnh", x, self.summed)
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.products(x).values())


def test_every_form_is_a_product_of_quantized_factors() -> None:
    x, model = features().double(), Forms().double()
    names = {"right": -2, "left": -1, "stack": -2, "mapped": -1, "added": -2, "turned": -1, "summed": -3}
    assert reads_of(Forms).weights.items() >= names.items()
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(model, 4), [(x,)]).eval()
    plain: Any = Forms().double()
    with torch.no_grad():
        for name, weight in qmodel.named_parameters(recurse=False):
            site = getattr(qmodel, f"{name}_quantizer")
            rows = site(qmodel._as_matrix(qmodel, name, weight)).dequantize()
            getattr(plain, name).copy_(qmodel._of_matrix(qmodel, name, rows, weight.shape))
        rounded = {name: getattr(qmodel, f"{name}_input_quantizer")(x).dequantize() for name in model._parameters}
        found = qmodel.products(x)
        for form, value in found.items():
            name = form if form in rounded else "stack"
            expected = plain.products(rounded[name])[form]
            if form == "added":  # what is added is no factor
                expected = expected + 0.5 * (x - rounded[name])[:, :6]
            torch.testing.assert_close(value, expected, msg=form)


def test_what_is_no_product_sees_quantized_values() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert self.weight.shape == (WIDTH, 6)
            return x @ self.weight, self.weight.norm(), torch.cat([self.weight, self.weight])

    x = features()
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(Other(), 4), [(x,)]).eval()
    values = qmodel.weight_quantizer(qmodel.weight.t()).dequantize().t()
    for one in (qmodel, qgnn.pack_model(qmodel)):
        with torch.no_grad():
            product, norm, twice = one(x)
        assert type(norm) is type(twice) is Tensor
        assert torch.equal(twice, torch.cat([values, values]))
        torch.testing.assert_close(norm, values.norm())
        assert product.shape == (NODES, 6)


def _adjacency() -> Tensor:
    edge_index = graph()
    return torch.sparse_coo_tensor(edge_index, torch.rand(edge_index.size(1)), (NODES, NODES)).coalesce()


class TwoKipf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Kipf(WIDTH, 8), Kipf(8, 4)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        return self.second(self.first(x, adj).relu(), adj)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "two layers": (TwoKipf, lambda: (features(), _adjacency())),
    "forms": (Forms, lambda: (features(),)),
    "GatedGraphConv": (lambda: GatedGraphConv(WIDTH, 3), lambda: (features(), graph())),
    "ARMAConv": (
        lambda: ARMAConv(WIDTH, 6, num_stacks=2, num_layers=2, act=nn.ReLU()), lambda: (features(), graph())
    ),
    "GCN2Conv": (
        lambda: GCN2Conv(WIDTH, 0.1, 0.5, 1, shared_weights=False), lambda: (features(), features(), graph())
    ),
    "GMMConv": (
        lambda: GMMConv(WIDTH, 6, dim=2, kernel_size=3), lambda: (features(), graph(), torch.rand(graph().size(1), 2))
    ),
}  # fmt: skip


def _flat(out: Any) -> Tensor:
    return out.flatten() if isinstance(out, Tensor) else torch.cat([_flat(part) for part in out])


@pytest.mark.parametrize("name", MODELS)
def test_convert_pack_copy_save_and_restore(name: str, tmp_path: Path) -> None:
    make, arguments = MODELS[name]
    model, args = make().eval(), arguments()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [args]).eval()
    with torch.no_grad():
        expected, found = _flat(model(*args)), _flat(qmodel(*args))
    assert 0 < float((expected - found).norm() / expected.norm()) < 0.1
    assert qgnn.summary(qmodel).coverage.share > 0.9  # type: ignore[union-attr]
    packed = qgnn.pack_model(qmodel)
    qgnn.save_packed(packed, tmp_path / "packed.safetensors")
    loaded = qgnn.load_packed(tmp_path / "packed.safetensors", model)
    with torch.no_grad():
        result = _flat(packed(*args))
    if name == "GMMConv":  # exponentials of its own, in a kernel written for it
        torch.testing.assert_close(result, found, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(result, found)
    for one in (loaded, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        with torch.no_grad():
            assert torch.equal(_flat(one(*args)), result)
    for one in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert torch.equal(_flat(one(*args)), found)
    restored = qgnn.restore_model(qmodel)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(_flat(restored(*args)), expected)
    assert torch.equal(_flat(qgnn.quantize_model(model, 32)(*args)), expected)
    qmodel.train()
    _flat(qmodel(*args)).square().sum().backward()
    assert all(p.grad is not None for p in qmodel.parameters())


def test_results_of_the_model_are_those_of_their_codes_once_packed() -> None:
    args = (features(), _adjacency())
    model, config = Kipf(WIDTH, 6), qgnn.QuantConfig(bits=8, output_bits=4)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, config=config), [args]).eval()
    with torch.no_grad():
        assert len(qmodel(*args).unique()) <= 16
        assert torch.equal(qgnn.pack_model(qmodel)(*args), qmodel(*args))


def test_features_that_require_gradients_are_refused_once_packed() -> None:
    args = (features(), _adjacency())
    packed = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(TwoKipf(), 8), [args]).eval())
    with pytest.raises(RuntimeError, match=r"packed 'first'.*gradient"):
        packed(args[0].requires_grad_(), args[1])
    with pytest.raises(RuntimeError, match="training mode"):
        packed.train()(features(), args[1])


class Walks(MessagePassing):
    """Runs whatever layers it has, and multiplies by a weight of its own."""

    def __init__(self) -> None:
        super().__init__(aggr="sum")
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = x @ self.weight
        for name, layer in self.named_children():
            x = x if name == "aggr_module" else layer(x).relu()
        for layer in list(self.children())[1:]:
            x = x + layer(x)
        out: Tensor = self.propagate(edge_index, x=x)
        return out

    def message(self, x_j: Tensor) -> Tensor:
        return x_j


class Chain(nn.Sequential):
    """A container, which runs all that it holds, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x) @ self.weight


@pytest.mark.parametrize("make", [Walks, Chain])
def test_code_that_goes_through_its_layers_finds_its_own(make: type[nn.Module]) -> None:
    model, args = make(), (features(), graph())
    want = model(*args)
    assert torch.equal(qgnn.quantize_model(model, bits=32)(*args), want)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), args).eval()
    assert (qmodel(*args) - want).norm() < 0.1 * want.norm()
    torch.testing.assert_close(qgnn.pack_model(qmodel)(*args), qmodel(*args), rtol=1e-4, atol=1e-4)
    qmodel.double().train()  # which torch passes on to children
    assert {q.log_scale.dtype for q in qgnn.quantizers(qmodel).values()} == {torch.float64}
    assert all(q.training for q in qgnn.quantizers(qmodel).values())


class Dense(nn.Linear):
    """A linear map with its activation."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class Scaled(Dense):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(PyGLinear):
    def forward(self, x: Tensor) -> Tensor:
        return pyg.dense.Linear.forward(self, x).relu()


class Masked(nn.Linear):
    """Its weight is written before each product."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data *= torch.ones_like(self.weight).tril()
        return super().forward(input)


@pytest.mark.parametrize("cls", [Dense, Scaled, Named])
def test_products_of_a_parent_are_products_of_the_layer(cls: type[nn.Module]) -> None:
    x = features()
    model = nn.Sequential(cls(WIDTH, 6), cls(6, 4)).eval()
    exact = qgnn.quantize_model(model, bits=32).eval()
    assert torch.equal(exact(x), model(x))
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), [x], forward=lambda m, batch: m(batch)).eval()
    assert qgnn.summary(qmodel).coverage.share == 1
    expected = qmodel(x)
    assert not torch.equal(expected, model(x))
    assert torch.allclose(expected, model(x), atol=0.02 * float(model(x).abs().max()))
    assert torch.equal(qgnn.pack_model(qmodel)(x), expected)


def test_weights_that_are_written_where_they_are_factors_stay_parameters() -> None:
    x = features()
    model = nn.Sequential(nn.Linear(WIDTH, 6), Masked(6, 4)).eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), [x], forward=lambda m, batch: m(batch)).eval()
    assert any("Masked" in line for line in str(qgnn.summary(qmodel)).splitlines() if line.startswith("float:"))
    assert torch.equal(qgnn.pack_model(qmodel)(x), qmodel(x))
    assert not qmodel[1].weight.triu(1).any()
