"""Converted layers at low bits: close to the float ones, the same for every format and order of edges and nodes."""

import functools

import pytest
import torch
from core.support import (
    CONVS,
    FORMATS,
    NODES,
    OUT,
    WIDTH,
    adjacency,
    features,
    graph,
    quantized,
    relative,
)
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.layers import QuantizedLayer

pytestmark = pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")

UNWEIGHTED = [name for name in CONVS if "cached" not in name]


@functools.cache
def prepared(name: str, bits: int = 4) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A float layer, its conversion in eval mode, and what it was calibrated on; not to be changed."""
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    conv = CONVS[name]().eval()
    return conv, quantized(conv, x, edge_index, bits=bits), x, edge_index


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", CONVS)
def test_eight_bits_are_close(name: str, fmt: str) -> None:
    x, adj = features(), adjacency(graph(), fmt)
    conv = CONVS[name]().eval()
    out = quantized(conv, x, adj)(x, adj)
    expected = conv(x, adj)
    assert out.shape == expected.shape
    assert relative(out, expected) < 0.03


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_error_falls_with_the_width(name: str) -> None:
    conv, _, x, edge_index = prepared(name)
    expected = conv(x, edge_index)
    errors = [relative(prepared(name, b)[1](x, edge_index), expected) for b in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
@pytest.mark.parametrize("levels", ["affine", "symmetric", "half"])
@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "GATv2Conv", "SAGEConv", "GINConv", "APPNP", "TAGConv"])
def test_layouts_and_levels_of_ranges(name: str, levels: str, granularity: str) -> None:
    x, edge_index = features(), graph()
    conv = CONVS[name]().eval()
    config = QuantConfig(bits=8, granularity=granularity, message_levels=levels)  # type: ignore[arg-type]
    out = quantized(conv, x, edge_index, config=config)(x, edge_index)
    assert relative(out, conv(x, edge_index)) < 0.03


@pytest.mark.parametrize("truncation", ["bt", "sbt"])
@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "SAGEConv", "GINConv"])
def test_truncation(name: str, truncation: str) -> None:
    x, edge_index = features(), graph()
    conv = CONVS[name]().eval()
    config = QuantConfig(bits=4, truncation=truncation)  # type: ignore[arg-type]
    qconv = quantized(conv, x, edge_index, config=config)
    assert relative(qconv(x, edge_index), conv(x, edge_index)) < 0.3
    assert all(q.truncation == truncation for q in qgnn.quantizers(qconv).values())


# Formats and orders ##################################################################################


@pytest.mark.parametrize("name", [n for n in UNWEIGHTED if n != "GCNConv improved"])
def test_formats_agree_bitwise(name: str) -> None:
    """Where the graph has no self-loops and is not ``improved``: there PyG's own formats differ."""
    _, qconv, x, _ = prepared(name)
    edge_index = graph(self_loops=False)
    expected = qconv(x, edge_index)
    for fmt in FORMATS[1:]:
        assert torch.equal(qconv(x, adjacency(edge_index, fmt)), expected), fmt


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_order_of_edges_does_not_matter(name: str) -> None:
    """Bitwise: sums run over integers."""
    _, qconv, x, edge_index = prepared(name)
    shuffled = edge_index[:, torch.randperm(edge_index.size(1))]
    assert torch.equal(qconv(x, shuffled), qconv(x, edge_index))


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_names_of_nodes_do_not_matter(name: str) -> None:
    """Bitwise: relabelled nodes give relabelled outputs."""
    _, qconv, x, edge_index = prepared(name)
    order = torch.randperm(NODES)
    renamed = torch.empty(NODES, dtype=torch.long)
    renamed[order] = torch.arange(NODES)
    assert torch.equal(qconv(x[order], renamed[edge_index]), qconv(x, edge_index)[order])


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GINConv", "GATConv"])
def test_direction_matters(name: str) -> None:
    x, edge_index = features(), graph()
    qconv = quantized(CONVS[name](), x, edge_index)
    assert relative(qconv(x, edge_index.flip(0)), qconv(x, edge_index)) > 0.1
    backwards = CONVS[name]()
    backwards.flow = "target_to_source"
    backwards.load_state_dict(qgnn.restore_model(qconv).state_dict())
    qbackwards = quantized(backwards, x, edge_index.flip(0))
    assert torch.equal(qbackwards(x, edge_index.flip(0)), qconv(x, edge_index))


@pytest.mark.parametrize("name", ["GCNConv", "GCNConv improved", "GCNConv not normalized", "APPNP", "SSGConv"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_edge_weights(name: str, fmt: str) -> None:
    x, edge_index = features(), graph()
    weight = torch.rand(edge_index.size(1)) + 0.1
    adj = adjacency(edge_index, fmt, weight)
    args = (x, adj, weight) if fmt in ("edge_index", "EdgeIndex") else (x, adj)
    conv = CONVS[name]().eval()
    qconv = quantized(conv, *args)
    assert relative(qconv(*args), conv(*args)) < 0.03
    assert relative(qconv(*args), qconv(x, edge_index)) > 0.05


@pytest.mark.parametrize("name", ["SAGEConv", "SAGEConv wider", "SAGEConv max", "GINConv"])
def test_values_of_a_sparse_matrix_count_as_in_pyg(name: str) -> None:
    x, edge_index = features(), graph()
    adj = adjacency(edge_index, "csr", torch.rand(edge_index.size(1)) + 0.1)
    conv = CONVS[name]().eval()
    assert relative(quantized(conv, x, adj)(x, adj), conv(x, adj)) < 0.03


def test_parallel_edges_count_twice_in_sums() -> None:
    x, edge_index = features(), graph().repeat(1, 2)
    for name in ("GCNConv", "GINConv", "SAGEConv sum", "GATConv"):
        conv = CONVS[name]().eval()
        assert relative(quantized(conv, x, edge_index)(x, edge_index), conv(x, edge_index)) < 0.03


# Odd graphs and inputs ###############################################################################


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_graph_without_edges_and_without_nodes(name: str) -> None:
    x, none = features(), torch.empty(2, 0, dtype=torch.long)
    conv = CONVS[name]().eval()
    qconv = quantized(conv, x, none)
    expected = conv(x, none)
    assert (qconv(x, none) - expected).norm() <= 0.03 * expected.norm() + 1e-6
    assert qconv(x[:0], none).shape == conv(x[:0], none).shape
    training = qgnn.quantize_model(conv, 4).train()
    training(x[:0], none)  # nothing to see: the ranges wait
    assert not any(q.is_set for n, q in qgnn.quantizers(training).items() if "weight" not in n)


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_isolated_nodes_stay_with_themselves(name: str) -> None:
    """Node 3 has no edge: nothing another node holds reaches it."""
    _, qconv, x, edge_index = prepared(name)
    other = torch.where(torch.arange(NODES).unsqueeze(1) == 3, x, -x)
    assert torch.equal(qconv(x, edge_index)[3], qconv(other, edge_index)[3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "GATv2Conv", "SAGEConv", "GINConv", "APPNP"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    x, edge_index = features().to(dtype), graph()
    conv = CONVS[name]().to(dtype).eval()
    qconv = quantized(conv, x, edge_index)
    out = qconv(x, edge_index)
    assert out.dtype == dtype
    assert relative(out, conv(x, edge_index)) < (0.03 if dtype == torch.float64 else 0.04)
    qgnn.quantize_model(conv, 8).train()(x, edge_index).sum().backward()


BIPARTITE = {
    "SAGEConv": lambda: SAGEConv((WIDTH, 5), OUT),
    "SAGEConv wider": lambda: SAGEConv((WIDTH, 5), 2 * WIDTH),
    "SAGEConv max": lambda: SAGEConv((WIDTH, 5), OUT, aggr="max"),
    "SAGEConv project": lambda: SAGEConv((WIDTH, 5), OUT, project=True),
    "SAGEConv one width": lambda: SAGEConv(WIDTH, OUT),
    "GATConv": lambda: GATConv((WIDTH, 5), OUT, heads=2, add_self_loops=False),
    "GATConv residual": lambda: GATConv((WIDTH, 5), OUT, residual=True),
    "GATv2Conv": lambda: GATv2Conv((WIDTH, 5), OUT, heads=2, add_self_loops=False),
    "GATv2Conv shared": lambda: GATv2Conv(WIDTH, OUT, share_weights=True),
    "GINConv": lambda: GINConv(nn.Linear(WIDTH, OUT)),
}


@pytest.mark.parametrize("name", BIPARTITE)
@pytest.mark.parametrize("training", [False, True])
def test_bipartite_graphs(name: str, training: bool) -> None:
    conv = BIPARTITE[name]().eval()
    x_src = torch.randn(20, WIDTH)
    width = 5 if "(WIDTH, 5)" in repr(conv) or "(12, 5)" in repr(conv) else WIDTH
    x_dst = x_src[:9] if name in ("GINConv", "SAGEConv one width") else torch.randn(9, width)
    adj = (torch.rand(9, 20) < 0.3).float()
    sparse, edge_index = adj.to_sparse_csr(), adj.nonzero().t().flip(0)
    size = (20, 9)
    qconv = quantized(conv, (x_src, x_dst), edge_index)
    out, expected = qconv((x_src, x_dst), edge_index), conv((x_src, x_dst), edge_index)
    assert relative(out, expected) < 0.03
    if training:
        qgnn.quantize_model(conv, 4).train()((x_src, x_dst), edge_index).sum().backward()
    if "GAT" not in name:
        assert relative(qconv((x_src, x_dst), sparse), conv((x_src, x_dst), sparse)) < 0.03
    if "v2" not in name:
        targets = {"size": size}
        out = qconv((x_src, None), edge_index, **targets)
        assert relative(out, conv((x_src, None), edge_index, **targets)) < 0.05  # never calibrated so
        if "GAT" not in name:
            assert out.shape == qconv((x_src, None), sparse).shape


@pytest.mark.parametrize("make", [GATConv, GATv2Conv])
@pytest.mark.parametrize("fill", ["mean", 2.0])
def test_edge_features_of_attention(make: type, fill: object) -> None:
    x, edge_index = features(), graph()
    attributes = torch.randn(edge_index.size(1), 4)
    conv = make(WIDTH, OUT, heads=2, edge_dim=4, fill_value=fill).eval()
    qconv = quantized(conv, x, edge_index, attributes)
    assert relative(qconv(x, edge_index, attributes), conv(x, edge_index, attributes)) < 0.03
    order = torch.randperm(edge_index.size(1))
    shuffled = qconv(x, edge_index[:, order], attributes[order])
    torch.testing.assert_close(shuffled, qconv(x, edge_index, attributes), rtol=0, atol=0.02)
    one = make(WIDTH, OUT, edge_dim=1, add_self_loops=False).eval()
    flat = torch.rand(edge_index.size(1))
    out = quantized(one, x, edge_index, flat)(x, edge_index, flat)
    assert relative(out, one(x, edge_index, flat)) < 0.03


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_attention_weights_on_request(name: str) -> None:
    x, edge_index = features(), graph()
    conv = CONVS[name]().eval()
    qconv = quantized(conv, x, edge_index)
    out, (edges, alpha) = qconv(x, edge_index, return_attention_weights=True)
    assert torch.equal(out, qconv(x, edge_index))
    _, (expected_edges, expected) = conv(x, edge_index, return_attention_weights=True)

    def dense(edges: Tensor, alpha: Tensor) -> Tensor:
        return torch.zeros(NODES, NODES, 3).index_put((edges[1], edges[0]), alpha.detach())

    torch.testing.assert_close(
        dense(edges, alpha), dense(expected_edges, expected), rtol=0.1, atol=0.01
    )
    sums = torch.zeros(NODES, 3).index_add(0, edges[1], alpha.detach())
    torch.testing.assert_close(sums, torch.ones(NODES, 3))


def test_sparse_features_equal_dense_ones() -> None:
    x, edge_index = features() * (torch.rand(NODES, WIDTH) < 0.3), graph()
    for values in (x, x.abs(), (x != 0).float()):
        for name in ("GCNConv", "SAGEConv", "GATConv"):
            qconv = quantized(CONVS[name](), values, edge_index, bits=4)
            sparse = qconv(values.to_sparse_csr(), edge_index)
            torch.testing.assert_close(sparse, qconv(values, edge_index), rtol=1e-5, atol=1e-5)


def test_cached_layers_follow_the_graph_they_are_given() -> None:
    """PyG's ``cached`` freezes the first graph; plans are cached by graph, so nothing goes stale."""
    x, first, second = features(), graph(seed=0), graph(seed=1)
    qconv = quantized(GCNConv(WIDTH, OUT, cached=True), x, first)
    conv = qgnn.restore_model(qconv)
    assert relative(qconv(x, first), conv(x, first)) < 0.03
    conv._cached_edge_index = None
    assert relative(qconv(x, second), conv(x, second)) < 0.03


@pytest.mark.parametrize("name", CONVS)
def test_training_learns_weights_and_ranges(name: str) -> None:
    """Every parameter that took part gets a finite gradient; descending lowers the loss."""
    torch.manual_seed(3)
    x, edge_index = features(), graph()
    qconv = qgnn.quantize_model(CONVS[name](), config=QuantConfig(learn_input_ranges=True)).train()
    qgnn.calibrate(qconv, (x, edge_index))
    target = torch.randn_like(qconv(x, edge_index).detach())
    optimizer = torch.optim.Adam(qconv.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (qconv(x, edge_index) - target).square().mean()
        loss.backward()
        for parameter_name, parameter in qconv.named_parameters():
            if "target" not in parameter_name and parameter.requires_grad:
                assert parameter.grad is not None, parameter_name
                assert parameter.grad.isfinite().all(), parameter_name
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "APPNP"])
def test_eval_and_training_arithmetic_agree(name: str) -> None:
    """Training may sum in another order; dropout apart, it computes the same function."""
    x, edge_index = features(), graph()
    qconv = quantized(CONVS[name](), x, edge_index, bits=4)
    expected = qconv(x, edge_index)
    torch.testing.assert_close(qconv.train()(x, edge_index), expected, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    x, edge_index = features(), graph()
    for conv in (GATConv(WIDTH, OUT, dropout=0.5), APPNP(3, 0.1, dropout=0.5)):
        qconv = quantized(conv, x, edge_index)
        assert torch.equal(qconv(x, edge_index), qconv(x, edge_index))
        qconv.train()
        assert not torch.equal(qconv(x, edge_index), qconv(x, edge_index))
    qconv = quantized(GATConv(WIDTH, OUT, dropout=0.5), x, edge_index).train()
    mean = sum(qconv(x, edge_index) for _ in range(100)) / 100
    assert relative(mean, qconv.eval()(x, edge_index)) < 0.15


def test_unset_ranges_name_their_site() -> None:
    qconv = qgnn.quantize_model(nn.Sequential(GCNConv(WIDTH, OUT)), 4).eval()
    assert isinstance(qconv[0], QuantizedLayer)
    with pytest.raises(RuntimeError, match=r"range of '0\.lin\.input' is unset: call .*calibrate"):
        qconv[0](features(), graph())
