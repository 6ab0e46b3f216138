"""Modes of torch and transforms of functions: what converted layers do in them, or refuse."""

from typing import Any

import pytest
import torch
from core.support import CONVS, NODES, OUT, WIDTH, features, graph, quantized
from torch import nn
from torch.autograd import forward_ad
from torch_geometric.nn import LGConv

import qgnn_plugin as qgnn


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "GINConv", "APPNP", "SGConv", "TAGConv"])
@pytest.mark.parametrize("sparse", [False, True])
def test_graphs_that_inference_mode_sees_first_are_trained_on(name: str, sparse: bool) -> None:
    """As a validation loop does, before the graph is trained on."""
    x, edge_index = features(), graph()
    qmodel = quantized(CONVS[name](), x, edge_index)
    edges: Any = edge_index.flip(0).clone()
    if sparse:
        edges = torch.sparse_coo_tensor(edges, torch.ones(edges.size(1)), (NODES, NODES)).coalesce().to_sparse_csr()
    with torch.inference_mode():
        expected = qmodel.eval()(x, edges)
    where = x.clone().requires_grad_()
    torch.testing.assert_close(qmodel(where, edges).detach(), expected.clone())
    (gradient,) = torch.autograd.grad(qmodel.train()(where, edges).square().sum(), where)
    (again,) = torch.autograd.grad(qmodel(where, edges.clone()).square().sum(), where)
    assert torch.equal(gradient, again)


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "GINConv", "APPNP"])
def test_jacobians(name: str) -> None:
    x, edge_index = features(), graph()
    qmodel = quantized(CONVS[name](), x, edge_index).eval()
    found = torch.func.jacrev(lambda v: qmodel(v, edge_index).sum(0))(x)
    where = x.clone().requires_grad_()
    rows = qmodel(where, edge_index).sum(0)
    for row, out in zip(found, rows, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(out, where, retain_graph=True)[0])


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "GINConv", "APPNP"])
def test_what_a_transform_sees_first_is_of_no_transform(name: str) -> None:
    """Plans are kept: those that torch.func asks for first serve calls outside of it, and inside of others."""
    x, edge_index = features(), graph()
    qmodel = quantized(CONVS[name](), x, edge_index).eval()
    edges = edge_index.clone()
    call = torch.func.grad(lambda v: qmodel(v, edges).square().sum())
    inside = call(x)
    where = x.clone().requires_grad_()
    outside = torch.autograd.grad(qmodel(where, edges).square().sum(), where)[0]
    torch.testing.assert_close(inside, outside)
    assert torch.equal(call(x), inside)


def test_samples_of_vmap_are_refused() -> None:
    x, edge_index = features(), graph()
    qmodel = quantized(CONVS["GCNConv"](), x, edge_index).eval()
    samples = torch.stack([x, 2 * x])
    for call in (lambda v: qmodel(v, edge_index), torch.func.grad(lambda v: qmodel(v, edge_index).sum())):
        with pytest.raises(ValueError, match=r"no torch\.func\.vmap over a quantized layer \(got one at 'lin.input'"):
            torch.func.vmap(call)(samples)


def test_batches_of_parameters_are_refused() -> None:
    """An ensemble by :func:`torch.func.functional_call` under ``vmap``: ranges are batches, features are not."""
    x, edge_index = features(), graph()
    qmodel = qgnn.calibrate(qgnn.quantize_model(CONVS["GCNConv"](), 8), (x, edge_index)).eval()
    state = {name: p.detach() for name, p in qmodel.named_parameters()}
    call = lambda state: torch.func.functional_call(qmodel, state, (x, edge_index))  # noqa: E731
    assert torch.equal(call(state), qmodel(x, edge_index))
    with pytest.raises(ValueError, match=r"no torch\.func\.vmap over a quantized layer .*in a loop"):
        torch.func.vmap(call)({name: torch.stack([p, p]) for name, p in state.items()})


def test_features_made_in_inference_mode() -> None:
    x, edge_index = features(), graph()
    qmodel = quantized(LGConv(), x, edge_index).eval()
    with torch.inference_mode():
        made = x.clone()
    assert torch.equal(qmodel(made, edge_index), qmodel(x, edge_index))


@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "SAGEConv", "GINConv"])
def test_batches_of_gradients(name: str) -> None:
    """``is_grads_batched`` and ``jacobian(vectorize=True)``: one pass for several gradients, the same values."""
    x, edge_index = features(), graph()
    qmodel = quantized(CONVS[name](), x, edge_index).eval()
    entry = x.clone().requires_grad_()
    row = qmodel(entry, edge_index)[3]
    units = torch.eye(row.numel())
    batched = torch.autograd.grad(row, entry, units, is_grads_batched=True, retain_graph=True)[0]
    single = [torch.autograd.grad(row, entry, unit, retain_graph=True)[0] for unit in units]
    assert batched.abs().sum() > 0
    assert torch.equal(batched, torch.stack(single))
    found = torch.autograd.functional.jacobian(lambda v: qmodel(v, edge_index)[3], x, vectorize=True)
    torch.testing.assert_close(found, batched)


@pytest.mark.parametrize("packs", [False, True])
def test_transforms_that_codes_do_not_have_are_refused(packs: bool) -> None:
    """Forward-mode derivatives, which would be zero, and batches of ``vmap``."""
    x = features()
    model: Any = quantized(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, OUT)), x).eval()
    model = qgnn.pack_model(model) if packs else model
    where = r"through the packed '0'" if packs else r"a quantized layer \(got one at '0\.input'"
    error = RuntimeError if packs else ValueError
    with pytest.raises(error, match=f"no forward-mode derivative .*{where}"):
        torch.func.jvp(model, (x,), (torch.ones_like(x),))
    with torch.no_grad(), forward_ad.dual_level():
        assert forward_ad.unpack_dual(model(x)).tangent is None  # of what has none
        with pytest.raises(error, match=f"no forward-mode derivative .*{where}"):
            model(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(error, match=rf"no torch\.func\.vmap .*{where}"):
        torch.func.vmap(model)(torch.stack([x, x]))


@pytest.mark.parametrize("name", ["GCNConv", "GATConv"])
def test_kernels_take_no_tensors_without_memory(name: str) -> None:
    x, edge_index = features(), graph()
    packed = qgnn.pack_model(quantized(CONVS[name](), x, edge_index))
    with pytest.raises(RuntimeError, match=r"Expected no torch\.func\.functionalize through the packed"):
        torch.func.functionalize(lambda v: packed(v, edge_index))(x)
    with torch.no_grad():
        assert packed(x, edge_index).isfinite().all()
