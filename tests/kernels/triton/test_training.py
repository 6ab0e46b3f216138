"""Training on the Triton backend: sums and their gradients over the transposed plan, and a whole training step."""

import pytest
import torch
import torch.nn.functional as F
from torch_geometric.nn import GATConv, GCNConv
from triton_support import SMALL, both, plan_of

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.spmm import edge_products, segment_sum, spmm
from qgnn_plugin.kernels.triton.launch import debug_checks


@pytest.mark.parametrize("name", ["isolated_nodes", "power_law", "no_edges"])
@pytest.mark.parametrize(("heads", "width"), [(1, 33), (3, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_and_its_gradients(name: str, heads: int, width: int, weighted: bool) -> None:
    plan = plan_of(SMALL[name]())
    x, grad = torch.randn(plan.num_src, heads, width), torch.randn(plan.num_dst, heads, width)
    weight = torch.rand(plan.num_edges, heads) if weighted else None

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [v.clone().requires_grad_() for v in (x, weight) if v is not None]
        y = spmm(plan, *leaves)
        y.backward(grad)
        return y.detach(), *(leaf.grad for leaf in leaves)

    for want, got in zip(*both(run), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_edge_products_and_segment_sums() -> None:
    plan = plan_of(SMALL["power_law"]())
    a, b = torch.randn(plan.num_dst, 2, 12), torch.randn(plan.num_src, 2, 12)
    per_edge = torch.randn(plan.num_edges, 3)
    for want, got in zip(*both(lambda: (edge_products(plan, a, b), segment_sum(plan, per_edge))), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_debug_mode_checks_sums_as_well() -> None:
    plan = plan_of(SMALL["self_loops"]())
    plan.col = plan.col + 1
    with debug_checks(), use_backend("interpret"), pytest.raises(ValueError, match="source nodes"):
        spmm(plan, torch.randn(plan.num_src, 4))


@pytest.mark.parametrize("conv", ["GCN", "GAT"])
def test_a_step_with_compressed_activations(conv: str) -> None:
    graph = SMALL["erdos_renyi"]()
    layer = GCNConv(6, 8) if conv == "GCN" else GATConv(6, 4, heads=2)
    x = torch.randn(graph.num_nodes, 6)
    model = qgnn.quantize_model(layer, bits=4)
    qgnn.calibrate(model, (x, graph.edge_index))
    model.train()

    def run() -> tuple[torch.Tensor, ...]:
        model.zero_grad()
        with qgnn.compressed_activations():
            out = model(x, graph.edge_index)
        F.mse_loss(out, torch.ones_like(out)).backward()
        return out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)

    expected, actual = both(run)
    assert len(expected) > 3
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
