"""The generic path: any other MessagePassing, the user's own included."""

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from core.support import NODES, OUT, WIDTH, adjacency, features, graph, quantized, relative
from torch import Tensor, nn
from torch_geometric.nn import (
    ARMAConv,
    CGConv,
    ChebConv,
    ClusterGCNConv,
    DirGNNConv,
    DNAConv,
    EdgeConv,
    FAConv,
    FeaStConv,
    FiLMConv,
    GatedGraphConv,
    GCN2Conv,
    GCNConv,
    GENConv,
    GeneralConv,
    GINEConv,
    GMMConv,
    GraphConv,
    HypergraphConv,
    LEConv,
    MessagePassing,
    MFConv,
    NNConv,
    PNAConv,
    PointNetConv,
    ResGatedGraphConv,
    RGATConv,
    RGCNConv,
    SuperGATConv,
    TransformerConv,
)
from torch_geometric.typing import OptTensor

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.layers import QuantizedMessagePassing

EDGES = graph().size(1)
DEGREES = torch.bincount(graph()[1], minlength=NODES).bincount()


def attributes(width: int = 4) -> Tensor:
    return torch.rand(EDGES, width, generator=torch.Generator().manual_seed(1))


def types() -> Tensor:
    return torch.randint(3, (EDGES,), generator=torch.Generator().manual_seed(1))


def mlp(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, out))


# Name to a layer and the arguments after the features and the graph.
GENERIC: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "ARMAConv": (lambda: ARMAConv(WIDTH, OUT, num_stacks=2, num_layers=2), ()),
    "CGConv": (lambda: CGConv(WIDTH, dim=4), (attributes(),)),
    "ChebConv": (lambda: ChebConv(WIDTH, OUT, K=3), ()),
    "ClusterGCNConv": (lambda: ClusterGCNConv(WIDTH, OUT), ()),
    "DirGNNConv": (lambda: DirGNNConv(GraphConv(WIDTH, OUT)), ()),
    "EdgeConv": (lambda: EdgeConv(mlp(2 * WIDTH, OUT)), ()),
    "FeaStConv": (lambda: FeaStConv(WIDTH, OUT, heads=2), ()),
    "FiLMConv": (lambda: FiLMConv(WIDTH, OUT), ()),
    "GatedGraphConv": (lambda: GatedGraphConv(WIDTH, num_layers=2), ()),
    "GENConv": (lambda: GENConv(WIDTH, OUT), ()),
    "GeneralConv": (lambda: GeneralConv(WIDTH, OUT), ()),
    "GINEConv": (lambda: GINEConv(mlp(WIDTH, OUT), edge_dim=4), (attributes(),)),
    "GMMConv": (lambda: GMMConv(WIDTH, OUT, dim=4, kernel_size=3), (attributes(),)),
    "GraphConv": (lambda: GraphConv(WIDTH, OUT), ()),
    "GraphConv max": (lambda: GraphConv(WIDTH, OUT, aggr="max"), ()),
    "LEConv": (lambda: LEConv(WIDTH, OUT), ()),
    "MFConv": (lambda: MFConv(WIDTH, OUT, max_degree=4), ()),
    "NNConv": (lambda: NNConv(WIDTH, OUT, mlp(4, WIDTH * OUT)), (attributes(),)),
    "PNAConv": (
        lambda: PNAConv(WIDTH, OUT, ["mean", "max", "std"], ["identity", "amplification"], DEGREES),
        (),
    ),
    "ResGatedGraphConv": (lambda: ResGatedGraphConv(WIDTH, OUT), ()),
    "RGATConv": (lambda: RGATConv(WIDTH, OUT, num_relations=3), (types(),)),
    "RGCNConv": (lambda: RGCNConv(WIDTH, OUT, num_relations=3), (types(),)),
    "SuperGATConv": (lambda: SuperGATConv(WIDTH, OUT, heads=2), ()),
    "TransformerConv": (lambda: TransformerConv(WIDTH, OUT, heads=2), ()),
}


@pytest.mark.parametrize("name", GENERIC)
def test_convert_calibrate_run_and_learn(name: str) -> None:
    make, extra = GENERIC[name]
    torch.manual_seed(0)
    conv, args = make().eval(), (features(), graph(), *extra)
    expected = conv(*args)
    errors = []
    for bits in (2, 4, 8):
        qconv = quantized(conv, *args, bits=bits)
        assert any(isinstance(m, QuantizedMessagePassing) for m in qconv.modules())
        sites = {k: q for k, q in qgnn.quantizers(qconv).items() if "argument_quantizers" in k}
        assert any(q.is_set for q in sites.values()), "no message was quantized"
        errors.append(relative(qconv(*args), expected))
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.05
    trained = qgnn.quantize_model(conv, 4).train()
    trained(*args).square().sum().backward()
    for parameter_name, parameter in trained.named_parameters():
        if conv.state_dict().get(parameter_name) is not None and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), parameter_name
    assert any(q.log_scale.grad is not None for q in qgnn.quantizers(trained).values())


def test_layers_with_arguments_of_their_own() -> None:
    x, edge_index = features(), graph()
    start = torch.randn(NODES, WIDTH)
    history = torch.randn(NODES, 3, WIDTH)
    position = torch.rand(NODES, 3)
    hyperedges = torch.stack([torch.randint(NODES, (60,)), torch.randint(12, (60,))])
    for conv, args in (
        (GCN2Conv(WIDTH, alpha=0.1), (x, start, edge_index)),
        (FAConv(WIDTH), (x, start, edge_index)),
        (DNAConv(WIDTH, heads=2), (history, edge_index)),
        (PointNetConv(mlp(WIDTH + 3, OUT)), (x, position, edge_index)),
        (HypergraphConv(WIDTH, OUT), (x, hyperedges)),
    ):
        conv = conv.eval()
        qconv = quantized(conv, *args)
        error = relative(qconv(*args), conv(*args))
        assert 0 < error < 0.05, type(conv).__name__
        qgnn.quantize_model(conv, 4).train()(*args).sum().backward()


# A user's own ########################################################################################


class Own(MessagePassing):
    """Two quantities sent, one of them through an edge update, another kept at the target."""

    def __init__(self) -> None:
        super().__init__(aggr="mean")
        self.value, self.key = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)
        self.gate = nn.Parameter(torch.ones(OUT))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        key = self.key(x)
        alpha = self.edge_updater(edge_index, key=key)
        return self.propagate(edge_index, value=self.value(x), own=key, alpha=alpha)

    def edge_update(self, key_j: Tensor, key_i: Tensor) -> Tensor:
        return (key_i * key_j).sum(-1, keepdim=True).sigmoid()

    def message(self, value_j: Tensor, own_i: Tensor, alpha: Tensor) -> Tensor:
        return alpha * value_j + self.gate * own_i


class OwnUpdate(MessagePassing):
    """Overrides aggregate and update, sends features and a scalar normalization."""

    def __init__(self) -> None:
        super().__init__(aggr="sum")
        self.lin = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        degree = torch.bincount(edge_index[1], minlength=x.size(0)).clamp_min(1)
        norm = degree.float().rsqrt().unsqueeze(1)
        return self.propagate(edge_index, x=self.lin(x), norm=norm)

    def message(self, x_j: Tensor, norm_j: Tensor, norm_i: Tensor) -> Tensor:
        return norm_i * norm_j * x_j

    def aggregate(self, inputs: Tensor, index: Tensor, dim_size: Optional[int] = None) -> Tensor:  # noqa: UP045
        return super().aggregate(inputs, index, dim_size=dim_size)

    def update(self, inputs: Tensor, x: Tensor) -> Tensor:
        return inputs - x


class Masked(GCNConv):
    """A GCNConv that computes something else."""

    def message(self, x_j: Tensor, edge_weight: OptTensor) -> Tensor:
        return super().message(x_j, edge_weight).clamp(-0.5, 0.5)


@pytest.mark.parametrize("make", [Own, OwnUpdate, lambda: Masked(WIDTH, OUT)])
def test_own_layers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    conv = make().eval()
    expected = conv(x, edge_index)
    errors = [relative(quantized(conv, x, edge_index, bits=b)(x, edge_index), expected) for b in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.05
    assert torch.equal(qgnn.quantize_model(conv, 32)(x, edge_index), expected)


def test_only_what_is_sent_is_quantized() -> None:
    """Scalars of a normalization and what stays at the target keep full precision."""
    def sites(conv: nn.Module) -> set[str]:
        names = dict(qgnn.quantize_model(conv, 4).own_quantizers())
        return {name.removeprefix("argument_quantizers.") for name in names}

    assert sites(Own()) == {"value"}
    assert sites(OwnUpdate()) == {"x"}
    assert sites(TransformerConv(WIDTH, OUT)) == {"key", "value"}
    assert sites(ResGatedGraphConv(WIDTH, OUT)) == {"q", "v"}


def test_messages_take_few_values() -> None:
    """Whatever reaches ``message`` came from codes of the width asked for, times the multiplier of its row."""
    seen = []

    class Watching(GraphConv):
        def message(self, x_j: Tensor, edge_weight: OptTensor) -> Tensor:
            seen.append(x_j)
            return super().message(x_j, edge_weight)

    x, edge_index = features(), graph()
    for bits in (2, 4):
        qconv = quantized(Watching(WIDTH, OUT), x, edge_index, bits=bits)
        seen.clear()
        qconv(x, edge_index)
        assert max(row.unique().numel() for row in seen[0]) <= 2**bits


def test_sparse_adjacency_takes_the_fused_path() -> None:
    x, edge_index = features(), graph()
    conv = GraphConv(WIDTH, OUT).eval()
    qconv = quantized(conv, x, edge_index)
    adj = adjacency(edge_index, "csr")
    assert conv.fuse
    assert relative(qconv(x, adj), conv(x, adj)) < 0.03
    torch.testing.assert_close(qconv(x, adj), qconv(x, edge_index), rtol=1e-4, atol=1e-4)


def test_edge_weights_and_bipartite_graphs() -> None:
    x, edge_index = features(), graph()
    weight = torch.rand(EDGES)
    conv = GraphConv(WIDTH, OUT).eval()
    assert relative(quantized(conv, x, edge_index, weight)(x, edge_index, weight), conv(x, edge_index, weight)) < 0.03
    pair, edges = (torch.randn(20, WIDTH), torch.randn(9, 5)), torch.stack(
        [torch.randint(20, (60,)), torch.randint(9, (60,))]
    )
    for conv in (GraphConv((WIDTH, 5), OUT), TransformerConv((WIDTH, 5), OUT), ResGatedGraphConv((WIDTH, 5), OUT)):
        conv = conv.eval()
        assert relative(quantized(conv, pair, edges)(pair, edges), conv(pair, edges)) < 0.03


def test_decomposed_layers() -> None:
    """PyG binds another ``propagate`` to the instance for these."""
    x, edge_index = features(), graph()
    conv = ClusterGCNConv(WIDTH, OUT, decomposed_layers=3).eval()
    assert "propagate" in vars(conv)
    qconv = quantized(conv, x, edge_index, bits=2)
    plain = quantized(ClusterGCNConv(WIDTH, OUT), x, edge_index, bits=2)
    plain.load_state_dict(qconv.state_dict())
    torch.testing.assert_close(qconv(x, edge_index), plain(x, edge_index))
    assert relative(qconv(x, edge_index), conv(x, edge_index)) > 0.01
    restored = qgnn.restore_model(qconv)
    assert "propagate" in vars(restored)
    assert torch.equal(restored(x, edge_index), conv(x, edge_index))
    qconv.decomposed_layers = 1
    torch.testing.assert_close(qconv(x, edge_index), plain(x, edge_index))
    qconv.decomposed_layers = 2
    assert relative(qconv(x, edge_index), conv(x, edge_index)) > 0.01


def test_constraint_of_the_generic_path() -> None:
    """Measured in training; corrects where the multiplier is positive and shapes allow."""
    x, edge_index = features(), graph()
    config = QuantConfig(bits=8, smp=SMPConfig(alpha=1e-4))
    qconv = qgnn.quantize_model(GraphConv(WIDTH, WIDTH), config=config)
    qgnn.calibrate(qconv, (x, edge_index))
    before = qconv.train()(x, edge_index)
    assert qconv.constraint > 1
    energy = qconv.constraint
    qconv.multiplier.fill_(5.0)
    after = qconv(x, edge_index)
    assert not torch.equal(before, after)
    assert qconv.constraint < energy
    # A bipartite layer of two equally large sides has no change from node to node.
    sides = (x, torch.randn(NODES, WIDTH))
    qconv = qgnn.quantize_model(GraphConv((WIDTH, WIDTH), WIDTH), config=config)
    qgnn.calibrate(qconv, [(sides, edge_index)])
    qconv.train()(sides, edge_index)
    assert qconv.constraint is None
