"""What attention layers make of the caller's edges: features, self-loops and returned weights, as in PyG."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GATv2Conv

import qgnn_plugin as qgnn

NODES, WIDTH, EDGE = 14, 8, 3
LAYERS = [GATConv, GATv2Conv]
FORMS = ["edge_index", "EdgeIndex", "sorted EdgeIndex", "coo", "csr"]


def _edges(form: str, features: bool) -> tuple[Any, Tensor | None]:
    """Edges in no order, with features of their own: of a matrix, its values; some are self-loops."""
    generator = torch.Generator().manual_seed(2)
    edge_index = torch.unique(torch.randint(NODES, (2, 50), generator=generator), dim=1)
    edge_index = edge_index[:, torch.randperm(edge_index.size(1), generator=generator)]
    edge_attr = torch.rand(edge_index.size(1), EDGE, generator=generator) if features else None
    if form == "edge_index":
        return edge_index, edge_attr
    if "EdgeIndex" in form:
        edges = EdgeIndex(edge_index, sparse_size=(NODES, NODES))
        if form == "EdgeIndex":
            return edges, edge_attr
        edges, order = edges.sort_by("col")
        return edges, None if edge_attr is None else edge_attr[order]
    values = torch.ones(edge_index.size(1)) if edge_attr is None else edge_attr
    size = (NODES, NODES, *values.shape[1:])
    coo = torch.sparse_coo_tensor(edge_index.flip(0), values, size, check_invariants=False).coalesce()
    if form == "coo":
        return coo, None
    crow = torch._convert_indices_from_coo_to_csr(coo.indices()[0], NODES)
    return torch.sparse_csr_tensor(crow, coo.indices()[1], coo.values(), size), None


def _forms(conv: nn.Module, *args: Any) -> dict[str, nn.Module]:
    qconv = qgnn.calibrate(qgnn.quantize_model(conv, bits=8), args).eval()
    return {"32 bits": qgnn.quantize_model(conv, bits=32), "8 bits": qconv, "packed": qgnn.pack_model(qconv)}


@pytest.mark.parametrize("options", [{}, {"add_self_loops": False}, {"fill_value": 0.5}, {"fill_value": "max"}])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_edges_are_those_of_pyg(layer: type[nn.Module], form: str, features: bool, options: dict[str, Any]) -> None:
    """Outputs, and the returned weights in the caller's form and order; asked for with ``False`` there are none."""
    torch.manual_seed(0)
    edges, edge_attr = _edges(form, features)
    conv = layer(WIDTH, 4, heads=2, edge_dim=EDGE if features else None, **options).eval()
    x = torch.randn(NODES, WIDTH)
    expected = conv(x, edges, edge_attr)
    weights = None
    if not (features and form in ("coo", "csr")):  # PyG has no form for weights in place of features
        weights = conv(x, edges, edge_attr, return_attention_weights=True)[1]
    for name, form_of in _forms(conv, x, edges, edge_attr).items():
        close = {"atol": 0.0, "rtol": 0.0} if name == "32 bits" else {"atol": 0.03, "rtol": 0.05}
        assert isinstance(form_of(x, edges, edge_attr, return_attention_weights=False), Tensor)
        torch.testing.assert_close(form_of(x, edges, edge_attr), expected, **close)
        if weights is None:
            continue
        expected_edges, expected_alpha = weights
        out, (returned, alpha) = form_of(x, edges, edge_attr, return_attention_weights=True)
        torch.testing.assert_close(out, expected, **close)
        torch.testing.assert_close(alpha, expected_alpha, **close)
        assert type(returned) is type(expected_edges)
        if returned.layout == torch.strided:
            assert torch.equal(torch.as_tensor(returned), torch.as_tensor(expected_edges))
        else:
            assert returned.layout == expected_edges.layout
            assert returned.shape == expected_edges.shape
            torch.testing.assert_close(returned.to_dense(), expected_edges.to_dense(), **close)


@pytest.mark.parametrize("layer", LAYERS)
def test_refusals(layer: type[nn.Module]) -> None:
    """What PyG asserts is refused by name: several samples on one graph, edge features beside a matrix with loops."""
    edges, edge_attr = _edges("edge_index", True)
    conv = layer(WIDTH, 4, edge_dim=EDGE)
    x = torch.randn(NODES, WIDTH)
    for form in list(_forms(conv, x, edges, edge_attr).values())[1:]:
        with pytest.raises(AssertionError, match="static graphs"):
            form(x.expand(3, NODES, WIDTH), edges, edge_attr)
        with pytest.raises(ValueError, match=r"values of its sparse adjacency.*add_self_loops=False"):
            form(x, _edges("csr", False)[0], edge_attr)


@pytest.mark.parametrize("layer", LAYERS)
def test_repeated_entries_of_a_matrix_are_edges(layer: type[nn.Module]) -> None:
    """Where no self-loops are added; where they are, PyG merges them."""
    crow, col = torch.tensor([0, 3, 3, 5]), torch.tensor([1, 1, 2, 0, 1])
    adj = torch.sparse_csr_tensor(crow, col, torch.ones(5), (3, 3), check_invariants=False)
    x = torch.randn(3, WIDTH)
    for loops in (False, True):
        conv = layer(WIDTH, 4, add_self_loops=loops).eval()
        for form in _forms(conv, x, adj).values():
            torch.testing.assert_close(form(x, adj), conv(x, adj), atol=0.03, rtol=0.05)
