"""The benchmark's fast float layers are PyG's own, to rounding."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.models import MODELS, build_model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparse", [False, True])
def test_fast_layers_compute_what_pyg_computes(name: str, sparse: bool) -> None:
    torch.manual_seed(0)
    edge_index = torch.randint(0, 40, (2, 150))  # with self-loops, duplicates and isolated nodes
    x = torch.rand(50, 30) * (torch.rand(50, 30) < 0.2)
    model = build_model(name, 30, 4, fast=False).double().eval()
    fast = build_model(name, 30, 4).double().eval()
    fast.load_state_dict(model.state_dict())
    expected = model(x.double(), edge_index)
    got = fast(x.double().to_sparse_csr() if sparse else x.double(), edge_index)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_fast_layers_have_pygs_gradients(name: str) -> None:
    torch.manual_seed(0)
    edge_index = torch.randint(0, 40, (2, 150))
    x = torch.rand(50, 30).double()
    model = build_model(name, 30, 4, fast=False).double().eval()
    fast = copy.deepcopy(build_model(name, 30, 4)).double().eval()
    fast.load_state_dict(model.state_dict())
    weight = torch.randn(50, 4).double()
    (model(x, edge_index) * weight).sum().backward()
    (fast(x, edge_index) * weight).sum().backward()
    for (key, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
