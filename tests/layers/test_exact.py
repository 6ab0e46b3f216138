"""At 32 bits a converted model is the original: outputs and gradients bitwise, in training too."""

import copy

import pytest
import torch
from core.support import CONVS, FORMATS, NODES, OUT, WIDTH, Plain, adjacency, features, graph
from torch import Tensor, nn
from torch_geometric.nn import (
    GAT,
    GCN,
    GIN,
    PNA,
    EdgeCNN,
    GATConv,
    GCNConv,
    GINConv,
    GraphConv,
    GraphSAGE,
    PNAConv,
    ResGatedGraphConv,
    RGCNConv,
    SAGEConv,
    SAGPooling,
    TopKPooling,
    TransformerConv,
)

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig

pytestmark = pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")

DEGREES = torch.bincount(graph()[1], minlength=NODES).bincount()

MODELS = {
    "GCN": lambda: GCN(WIDTH, 8, 3, OUT, dropout=0.5, norm="batch_norm", jk="cat"),
    "GAT": lambda: GAT(WIDTH, 8, 2, OUT, dropout=0.5, heads=2),
    "GATv2": lambda: GAT(WIDTH, 8, 2, OUT, v2=True, heads=2, jk="max"),
    "GraphSAGE": lambda: GraphSAGE(WIDTH, 8, 2, OUT, dropout=0.5, norm="layer_norm"),
    "GIN": lambda: GIN(WIDTH, 8, 2, OUT, dropout=0.5, jk="lstm"),
    "PNA": lambda: PNA(
        WIDTH, 8, 2, OUT, aggregators=["mean", "max"], scalers=["identity"], deg=DEGREES
    ),
    "EdgeCNN": lambda: EdgeCNN(WIDTH, 8, 2, OUT, dropout=0.5),
    "Plain": Plain,
    "TransformerConv": lambda: TransformerConv(WIDTH, OUT, heads=2, beta=True, dropout=0.3),
    "ResGatedGraphConv": lambda: ResGatedGraphConv(WIDTH, OUT),
}


def compare(
    model: nn.Module, args: tuple, config: QuantConfig, training: bool, **kwargs: object
) -> None:
    """Outputs, gradients of every parameter and of the features, and the state of the generator."""
    original = copy.deepcopy(model).train(training)
    qmodel = qgnn.quantize_model(original, config=config)
    results = []
    for candidate in (original, qmodel):
        torch.manual_seed(1)
        x = args[0].clone().requires_grad_()
        out = candidate(x, *args[1:], **kwargs)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), x.grad, torch.random.get_rng_state()))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    gradients = dict(qmodel.named_parameters())
    for name, parameter in original.named_parameters():
        expected, actual = parameter.grad, gradients[name].grad
        assert (expected is None) == (actual is None), name
        assert expected is None or torch.equal(actual, expected), name  # type: ignore[arg-type]
    buffers = dict(qmodel.named_buffers())
    for name, buffer in original.named_buffers():
        assert torch.equal(buffers[name], buffer), name


OFF = QuantConfig(bits=32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_layers(name: str, training: bool) -> None:
    for fmt in FORMATS:
        compare(CONVS[name](), (features(), adjacency(graph(), fmt)), OFF, training)


@pytest.mark.parametrize(
    "name", ["GCNConv", "GCNConv improved", "GCNConv not normalized", "APPNP", "SSGConv", "TAGConv", "LGConv"]
)
def test_edge_weights(name: str) -> None:
    edge_index = graph()
    weight = torch.rand(edge_index.size(1)) + 0.1
    compare(CONVS[name](), (features(), edge_index, weight), OFF, True)
    for fmt in ("csr", "coo"):
        compare(CONVS[name](), (features(), adjacency(edge_index, fmt, weight)), OFF, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, training: bool) -> None:
    compare(MODELS[name](), (features(), graph()), OFF, training)


def test_edge_features_and_types() -> None:
    x, edge_index = features(), graph()
    attributes = torch.randn(edge_index.size(1), 4)
    types = torch.randint(3, (edge_index.size(1),))
    for conv in (GATConv(WIDTH, OUT, edge_dim=4, heads=2), TransformerConv(WIDTH, OUT, edge_dim=4)):
        compare(conv, (x, edge_index, attributes), OFF, True)
    compare(RGCNConv(WIDTH, OUT, 3, num_bases=2), (x, edge_index, types), OFF, True)
    aggregators, scalers = ["mean", "std"], ["amplification"]
    pna = PNAConv(WIDTH, OUT, aggregators, scalers, DEGREES, edge_dim=4)
    compare(pna, (x, edge_index, attributes), OFF, True)


def test_attention_weights_on_request() -> None:
    x, edge_index = features(), graph()
    conv = GATConv(WIDTH, OUT, heads=2).eval()
    qconv = qgnn.quantize_model(conv, 32)
    out, (edges, alpha) = conv(x, edge_index, return_attention_weights=True)
    qout, (qedges, qalpha) = qconv(x, edge_index, return_attention_weights=True)
    assert torch.equal(out, qout)
    assert torch.equal(edges, qedges)
    assert torch.equal(alpha, qalpha)


@pytest.mark.parametrize("pool", [TopKPooling, SAGPooling])
def test_pooling(pool: type) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = GraphConv(WIDTH, 8), pool(8, ratio=0.5)
            self.last = GCNConv(8, OUT)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x, edge_index, *_ = self.pool(self.conv(x, edge_index).relu(), edge_index)
            return self.last(x, edge_index)

    compare(Pooled(), (features(), graph()), OFF, True)


def test_bipartite() -> None:
    x_src, x_dst = torch.randn(20, WIDTH), torch.randn(9, 5)
    edge_index = torch.stack([torch.randint(20, (60,)), torch.randint(9, (60,))])
    for make in (
        lambda: SAGEConv((WIDTH, 5), OUT),
        lambda: GATConv((WIDTH, 5), OUT, add_self_loops=False),
        lambda: GINConv(nn.Linear(WIDTH, OUT)),
        lambda: GraphConv((WIDTH, 5), OUT),
    ):
        conv = make()
        qconv = qgnn.quantize_model(conv, 32)
        pair = (x_src, x_src[:9] if isinstance(conv, GINConv) else x_dst)
        assert torch.equal(conv(pair, edge_index), qconv(pair, edge_index))
        assert torch.equal(
            conv((x_src, None), edge_index, size=(20, 9)),
            qconv((x_src, None), edge_index, size=(20, 9)),
        )


@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "SAGEConv", "GINConv", "APPNP", "TAGConv"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    compare(CONVS[name]().to(dtype), (features().to(dtype), graph()), OFF, True)


def test_sparse_features() -> None:
    conv = GCNConv(WIDTH, OUT)
    x = (features() * (torch.rand(NODES, WIDTH) < 0.3)).to_sparse_csr()
    qconv = qgnn.quantize_model(conv, 32)
    assert torch.equal(conv(x, graph()), qconv(x, graph()))


@pytest.mark.parametrize("training", [True, False])
def test_constraint_with_a_multiplier_of_zero_changes_nothing(training: bool) -> None:
    config = QuantConfig(bits=32, smp=SMPConfig(alpha=1e-6, multiplier=0.0))
    for name in ("GCN", "GraphSAGE", "GIN", "GAT"):
        compare(MODELS[name](), (features(), graph()), config, training)


def test_without_a_constraint() -> None:
    compare(Plain(), (features(), graph()), QuantConfig(bits=32, smp=None), True)


def test_single_sites_off_equal_the_whole_off() -> None:
    """Weights alone, messages alone: the sites that are off stay bitwise out of the way."""
    x, edge_index = features(), graph()
    for name in ("GCNConv", "SAGEConv", "SAGEConv wider", "GINConv", "GATConv"):
        conv = CONVS[name]().eval()
        expected = conv(x, edge_index)
        for site in ("weight", "input", "activation", "message", "attention"):
            config = QuantConfig(bits=32, **{f"{site}_bits": 8})  # type: ignore[arg-type]
            qconv = qgnn.calibrate(qgnn.quantize_model(conv, config=config), (x, edge_index))
            error = (qconv.eval()(x, edge_index) - expected).norm() / expected.norm()
            assert error < 0.02, (name, site)
