"""Whole models: PyG's own, Sequential, heterogeneous graphs, pooling, shared layers, arbitrary forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import (
    NODES,
    OUT,
    WIDTH,
    Plain,
    adjacency,
    features,
    graph,
    quantized,
    relative,
)
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import (
    APPNP,
    GAT,
    GCN,
    GIN,
    MLP,
    PNA,
    DeepGCNLayer,
    EdgeCNN,
    GATConv,
    GCNConv,
    GENConv,
    GPSConv,
    GraphConv,
    GraphSAGE,
    GraphUNet,
    HeteroConv,
    JumpingKnowledge,
    SAGEConv,
    SAGPooling,
    Sequential,
    TopKPooling,
    global_mean_pool,
    to_hetero,
)

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, QuantizedLayer

DEGREES = torch.bincount(graph()[1], minlength=NODES).bincount()


class Jumping(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList([GCNConv(WIDTH, 8), GCNConv(8, 8)])
        self.jump = JumpingKnowledge(mode, channels=8, num_layers=2)
        self.last = nn.Linear(16 if mode == "cat" else 8, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        states = []
        for conv in self.convs:
            x = conv(x, edge_index).relu()
            states.append(x)
        return self.last(self.jump(states))


class Recurrent(nn.Module):
    """One convolution, three times: one set of ranges serves all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.conv = nn.Linear(WIDTH, 8), GCNConv(8, 8)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.encode(x).tanh()
        for _ in range(3):
            x = self.conv(x, edge_index).tanh()
        return x


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(WIDTH, 8)
        self.layers = nn.ModuleList(
            DeepGCNLayer(GENConv(8, 8), nn.LayerNorm(8), nn.ReLU(), block="res+") for _ in range(2)
        )

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.encode(x)
        for layer in self.layers:
            x = layer(x, edge_index)
        return x


class InPlace(nn.Module):
    """Overwrites activations that a site has already seen: fine in eval mode, which is what calibration runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.conv = GCNConv(8, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = x.clone()
        left = self.a(x)
        right = self.b(x.relu_())
        return self.conv(left.add_(right), edge_index)


class Propagating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2, self.prop = nn.Linear(WIDTH, 8), nn.Linear(8, OUT), APPNP(4, 0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.prop(self.lin2(self.lin1(x).relu()), edge_index)


def sequential() -> nn.Module:
    return Sequential(
        "x, edge_index",
        [
            (GCNConv(WIDTH, 8), "x, edge_index -> x1"),
            nn.ReLU(inplace=True),
            (SAGEConv(8, 8), "x1, edge_index -> x2"),
            (lambda a, b: a + b, "x1, x2 -> x"),
            nn.Linear(8, OUT),
        ],
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: GCN(WIDTH, 8, 3, OUT, norm="batch_norm", jk="cat"),
    "GAT": lambda: GAT(WIDTH, 8, 2, OUT, heads=2),
    "GATv2": lambda: GAT(WIDTH, 8, 2, OUT, v2=True, heads=2),
    "GraphSAGE": lambda: GraphSAGE(WIDTH, 8, 2, OUT),
    "GIN": lambda: GIN(WIDTH, 8, 2, OUT),
    "PNA": lambda: PNA(WIDTH, 8, 2, OUT, aggregators=["mean", "max"], scalers=["identity"], deg=DEGREES),
    "EdgeCNN": lambda: EdgeCNN(WIDTH, 8, 2, OUT),
    "MLP": lambda: MLP([WIDTH, 16, OUT]),
    "GraphUNet": lambda: GraphUNet(WIDTH, 8, OUT, depth=2, pool_ratios=0.5),
    "JumpingKnowledge cat": lambda: Jumping("cat"),
    "JumpingKnowledge lstm": lambda: Jumping("lstm"),
    "Recurrent": Recurrent,
    "Deep": Deep,
    "Propagating": Propagating,
    "Sequential": sequential,
    "Plain": Plain,
    "GPSConv": lambda: GPSConv(WIDTH, GraphConv(WIDTH, WIDTH), heads=2),
}


def arguments(name: str) -> tuple[Tensor, ...]:
    return (features(),) if name == "MLP" else (features(), graph())


@pytest.mark.parametrize("name", MODELS)
def test_convert_calibrate_run_and_learn(name: str) -> None:
    torch.manual_seed(0)
    model, args = MODELS[name]().eval(), arguments(name)
    expected = model(*args)
    errors = [relative(quantized(model, *args, bits=bits)(*args), expected) for bits in (2, 8)]
    # Pooling and maxima jump where two scores are close.
    assert errors[0] > errors[1] > 0
    assert errors[1] < (0.3 if name == "GraphUNet" else 0.06)
    trained = qgnn.quantize_model(model, 4).train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        trained(*args).square().mean().backward()
        optimizer.step()
    assert trained.eval()(*args).isfinite().all()
    assert torch.equal(qgnn.restore_model(qgnn.quantize_model(model, 4))(*args), expected)


def test_calibration_sees_values_as_they_were() -> None:
    model, x, edge_index = InPlace().eval(), features(), graph()
    qmodel = quantized(model, x, edge_index)
    assert relative(qmodel(x, edge_index), model(x, edge_index)) < 0.03
    assert qgnn.quantizers(qmodel)["a.input_quantizer"].range_kind.name == "FREE"
    assert qgnn.quantizers(qmodel)["b.input_quantizer"].range_kind.name == "NONNEGATIVE"


def test_shared_layer_has_one_set_of_sites() -> None:
    qmodel = quantized(Recurrent(), features(), graph())
    assert list(qgnn.quantizers(qmodel)) == [
        "encode.input_quantizer",
        "encode.weight_quantizer",
        "conv.lin.input_quantizer",
        "conv.lin.weight_quantizer",
        "conv.message_quantizer",
    ]


def test_shared_parameters_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    qmodel = quantized(Tied(), features())
    assert qmodel.a.weight is qmodel.b.weight
    assert qmodel.a.weight_quantizer is not qmodel.b.weight_quantizer
    restored = qgnn.restore_model(qmodel)
    assert restored.a.weight is restored.b.weight


# Pooling and graph-level models ######################################################################


class Graphs(nn.Module):
    """Graph-level, with pooling."""

    def __init__(self, pool: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.pool, self.conv2 = GCNConv(WIDTH, 16), pool(), GraphConv(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.conv1(x, edge_index).relu()
        x, edge_index, _, batch, *_ = self.pool(x, edge_index, batch=batch)
        x = self.conv2(x, edge_index).relu()
        return self.head(global_mean_pool(x, batch))


@pytest.mark.parametrize("pool", [lambda: TopKPooling(16, 0.8), lambda: SAGPooling(16, 0.8)])
def test_pooling(pool: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    data = [Data(x=features(), edge_index=graph(seed=i)) for i in range(6)]
    loader = DataLoader(data, batch_size=3)
    model = Graphs(pool).eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), loader).eval()
    errors = []
    for batch in loader:
        args = (batch.x, batch.edge_index, batch.batch)
        errors.append(relative(qmodel(*args), model(*args)))
        assert qmodel(*args).shape == (3, 3)
    assert sum(errors) / len(errors) < 0.1
    qgnn.quantize_model(model, 4).train()(*args).sum().backward()


# Heterogeneous graphs ################################################################################


class Bipartite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = HeteroConv(
            {
                ("user", "buys", "item"): SAGEConv((WIDTH, 5), 8),
                ("item", "bought by", "user"): GATConv((5, WIDTH), 8, add_self_loops=False),
                ("user", "knows", "user"): GCNConv(WIDTH, 8),
            }
        )
        self.second = HeteroConv(
            {("user", "buys", "item"): SAGEConv(8, OUT), ("user", "knows", "user"): GCNConv(8, OUT)}
        )

    def forward(self, x: dict[str, Tensor], edges: dict[Any, Tensor]) -> dict[str, Tensor]:
        x = {key: value.relu() for key, value in self.first(x, edges).items()}
        return self.second(x, edges)


def hetero() -> HeteroData:
    data = HeteroData()
    data["user"].x, data["item"].x = torch.randn(20, WIDTH), torch.randn(9, 5)
    edges = torch.stack([torch.randint(20, (50,)), torch.randint(9, (50,))])
    data["user", "buys", "item"].edge_index = edges
    data["item", "bought by", "user"].edge_index = edges.flip(0)
    data["user", "knows", "user"].edge_index = torch.randint(20, (2, 50))
    return data


def test_hetero_conv() -> None:
    data, model = hetero(), Bipartite().eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), data).eval()
    convs = [m for m in qmodel.modules() if isinstance(m, QuantizedLayer)]
    assert len(convs) >= 10
    expected, out = (m(data.x_dict, data.edge_index_dict) for m in (model, qmodel))
    for node_type in ("user", "item"):
        assert 0 < relative(out[node_type], expected[node_type]) < 0.03
    restored = qgnn.restore_model(qmodel)(data.x_dict, data.edge_index_dict)
    assert all(torch.equal(restored[k], expected[k]) for k in expected)
    overrides = {"first.convs.*buys*.lin_l": {"weight_bits": 2}}
    qmodel = qgnn.quantize_model(model, config=QuantConfig(bits=8, overrides=overrides))
    assert sum(q.bits == 2 for q in qgnn.quantizers(qmodel).values()) == 1


def test_node_type_without_nodes_waits_for_its_range() -> None:
    """As a sampled batch may bring: its sites stay unset and nothing fails."""
    data = hetero()
    qmodel = qgnn.quantize_model(Bipartite(), 4).train()
    empty = hetero()
    empty["item"].x = empty["item"].x[:0]
    for edge_type in (("user", "buys", "item"), ("item", "bought by", "user")):
        empty[edge_type].edge_index = torch.empty(2, 0, dtype=torch.long)
    qmodel(empty.x_dict, empty.edge_index_dict)
    out = qmodel(data.x_dict, data.edge_index_dict)
    sum(value.sum() for value in out.values()).backward()
    used = [q for n, q in qgnn.quantizers(qmodel).items()]
    assert all(q.is_set for q in used)


class Homogeneous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = SAGEConv((WIDTH, WIDTH), 8), GraphConv((8, 8), OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x, edge_index)), edge_index)


def test_to_hetero() -> None:
    data = hetero()
    data["item"].x = torch.randn(9, WIDTH)
    model = to_hetero(Homogeneous(), data.metadata()).eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), data).eval()
    expected, out = (m(data.x_dict, data.edge_index_dict) for m in (model, qmodel))
    for node_type in expected:
        assert 0 < relative(out[node_type], expected[node_type]) < 0.03


# Adjacency, edge weights, features ###################################################################


@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")
@pytest.mark.parametrize("name", ["GCN", "GraphSAGE", "GIN", "GAT"])
def test_sparse_adjacency_and_features(name: str) -> None:
    x = (features() > 1).float()
    edge_index = graph(self_loops=False)
    model = MODELS[name]().eval()
    qmodel = quantized(model, x, edge_index, bits=4)
    expected = qmodel(x, edge_index)
    for fmt in ("EdgeIndex", "csr", "coo"):
        assert torch.equal(qmodel(x, adjacency(edge_index, fmt)), expected)
    if name in ("GCN", "GraphSAGE"):
        torch.testing.assert_close(qmodel(x.to_sparse_csr(), edge_index), expected)


def test_edge_weights_reach_the_layers() -> None:
    x, edge_index, weight = features(), graph(), torch.rand(graph().size(1)) + 0.1
    model = GCN(WIDTH, 8, 2, OUT).eval()
    qmodel = qgnn.quantize_model(model, 8)
    data = Data(x=x, edge_index=edge_index, edge_weight=weight)
    qgnn.calibrate(qmodel, data)
    out = qmodel.eval()(x, edge_index, edge_weight=weight)
    assert relative(out, model(x, edge_index, edge_weight=weight)) < 0.03


def test_double_precision() -> None:
    x, edge_index = features().double(), graph()
    for name in ("GCN", "GAT", "GraphSAGE", "GIN", "PNA"):
        model = MODELS[name]().double().eval()
        qmodel = quantized(model, x, edge_index)
        out = qmodel(x, edge_index)
        assert out.dtype == torch.float64
        assert relative(out, model(x, edge_index)) < 0.05
