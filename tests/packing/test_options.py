"""Every native layer with the options that its constructor has, on every kind of edges and input: as in floats."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import (
    APPNP,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    LGConv,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
)
from torch_geometric.nn.aggr import MaxAggregation

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig

NODES, TARGETS, WIDTH, OUT = 14, 9, 8, 6

pytestmark = pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR", "ignore:.*never ran")


def _gin(**options: Any) -> GINConv:
    return GINConv(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, OUT)), **options)


# How each is made, its options, whether it takes edge weights, and whether it takes a pair.
Family = tuple[Callable[..., nn.Module], list[dict[str, Any]], bool, bool]
FAMILIES: dict[str, Family] = {
    "GCNConv": (
        lambda **o: GCNConv(WIDTH, OUT, **o),
        [
            {},
            {"improved": True},
            {"add_self_loops": False},
            {"normalize": False, "bias": False},
            {"decomposed_layers": 2},
        ],
        True,
        False,
    ),
    "SAGEConv": (
        lambda **o: SAGEConv(o.pop("width", WIDTH), o.pop("out", OUT), **o),
        [
            *({}, {"out": 2 * WIDTH}, {"aggr": "sum", "normalize": True}, {"root_weight": False, "bias": False}),
            *({"project": True}, {"project": True, "root_weight": False}, {"width": (WIDTH, WIDTH), "project": True}),
            *({"aggr": "max"}, {"aggr": "min"}, {"aggr": "mul"}, {"aggr": "softmax", "aggr_kwargs": {"t": 2.0}}),
            *({"aggr": ["mean", "max"]}, {"aggr": MaxAggregation()}),
        ],
        False,
        True,
    ),
    "GINConv": (_gin, [{"eps": 0.5, "train_eps": True}, {"aggr": "mean"}, {"aggr": "max"}], False, True),
    "APPNP": (lambda **o: APPNP(2, 0.1, **o), [{"dropout": 0.5}, {"normalize": False}], True, False),
    "SGConv": (lambda **o: SGConv(WIDTH, OUT, **o), [{"K": 2}, {"add_self_loops": False, "bias": False}], True, False),
    "SSGConv": (lambda **o: SSGConv(WIDTH, 2 * WIDTH, alpha=0.2, **o), [{"K": 2}, {"bias": False}], True, False),
    "TAGConv": (lambda **o: TAGConv(WIDTH, OUT, K=2, **o), [{}, {"normalize": False, "bias": False}], True, False),
    "LGConv": (LGConv, [{}, {"normalize": False}], True, False),
    "GATConv": (
        lambda **o: GATConv(o.pop("width", WIDTH), OUT, **o),
        [
            *({"heads": 3, "concat": False, "residual": True}, {"add_self_loops": False, "bias": False}),
            {"width": (WIDTH, WIDTH), "heads": 2},
        ],
        False,
        True,
    ),
    "GATv2Conv": (
        lambda **o: GATv2Conv(WIDTH, OUT, heads=2, **o),
        [{"concat": False, "residual": True}, {"share_weights": True, "add_self_loops": False}],
        False,
        True,
    ),
}
LAYERS = [(family, index) for family, entry in FAMILIES.items() for index in range(len(entry[1]))]
BACKWARDS = "target_to_source"


def _layer(family: str, index: int, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0](**FAMILIES[family][1][index], **more).eval()


def _edges(sources: int, targets: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ends = [torch.randint(size, (45,), generator=generator) for size in (sources, targets)]
    edge_index = torch.unique(torch.stack(ends), dim=1)
    return edge_index[:, torch.randperm(edge_index.size(1), generator=generator)]


def _calls(family: str, flow: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of a call: features, or a pair of these, with the edges in some format."""
    weighted, pairs = FAMILIES[family][2:]
    x, target = torch.randn(NODES, WIDTH), torch.randn(TARGETS, WIDTH)
    square = _edges(NODES, NODES)
    yield (x, square)
    yield (x, EdgeIndex(square, sparse_size=(NODES, NODES)))
    weight = torch.rand(square.size(1)) + 0.1
    if weighted:
        yield (x, square, weight)
    if flow != BACKWARDS:
        matrix = torch.sparse_coo_tensor(square.flip(0), weight, (NODES, NODES)).coalesce()
        yield from ((x, matrix), (x, matrix.to_sparse_csr()))
        if pairs:
            between = _edges(NODES, TARGETS)
            size = (NODES, TARGETS)
            matrix = torch.sparse_coo_tensor(between.flip(0), torch.ones(between.size(1)), size[::-1])
            yield ((x, target), between)
            for edges in (EdgeIndex(between, sparse_size=size), matrix.to_sparse_csr()):
                yield from (((x, None), edges), ((x, target), edges))


@pytest.mark.parametrize("flow", ["source_to_target", BACKWARDS])
@pytest.mark.parametrize(("family", "index"), LAYERS)
def test_as_in_floats(family: str, index: int, flow: str) -> None:
    """Bitwise at 32 bits, close at 8, packed bitwise as converted; wherever PyG's layer runs."""
    ran = 0
    for args in _calls(family, flow):
        conv = _layer(family, index, flow=flow)
        try:
            expected = conv(*args)
        except (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            continue
        ran += 1
        assert torch.equal(qgnn.quantize_model(conv, bits=32)(*args), expected)
        qconv = qgnn.calibrate(qgnn.quantize_model(conv, bits=8), args)
        out = qconv(*args)
        assert out.shape == expected.shape
        assert (out - expected).norm() < 0.03 * expected.norm(), args[1]
        assert torch.equal(qgnn.pack_model(qconv)(*args), out), args[1]
    assert ran >= 1


def test_a_maximum_over_a_matrix_counts_its_values_and_repeated_entries() -> None:
    x = torch.randn(3, WIDTH)
    crow, col = torch.tensor([0, 3, 3, 5]), torch.tensor([1, 1, 2, 0, 1])
    for values in (torch.ones(5), torch.tensor([0.5, -2.0, 1.0, 3.0, -1.0])):
        adj = torch.sparse_csr_tensor(crow, col, values, (3, 3), check_invariants=False)
        for aggr in ("max", "mean", "sum"):
            conv = SAGEConv(WIDTH, 2 * WIDTH, aggr=aggr).eval()
            qconv = qgnn.calibrate(qgnn.quantize_model(conv, bits=8), (x, adj))
            assert (qconv(x, adj) - conv(x, adj)).norm() < 0.03 * conv(x, adj).norm()
            assert torch.equal(qgnn.pack_model(qconv)(x, adj), qconv(x, adj))


@pytest.mark.parametrize("granularity", ["tensor", "node", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_graphs(family: str, granularity: Any) -> None:
    """Without nodes, without edges, with isolated nodes: as the float layer, in every form."""
    conv = _layer(family, 0)
    graphs = [
        (torch.randn(nodes, WIDTH), torch.tensor(edges).long().view(2, -1))
        for nodes, edges in ((0, []), (1, []), (5, []), (6, [[1, 2], [2, 1]]))
    ]
    qconv = qgnn.quantize_model(conv, config=QuantConfig(bits=8, granularity=granularity))
    qgnn.calibrate(qconv, [(torch.randn(NODES, WIDTH), _edges(NODES, NODES)), *graphs[1:]])
    packed = qgnn.pack_model(qconv)
    for args in graphs:
        expected, out = conv(*args), qconv(*args)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected, atol=0.1, rtol=0.1)
        assert torch.equal(packed(*args), out)
        assert qconv.train()(*args).shape == expected.shape
        qconv.eval()


@pytest.mark.parametrize("correction", ["explicit", "proximal"])
@pytest.mark.parametrize(("family", "index"), [entry for entry in LAYERS if entry[0] != "LGConv"])
def test_an_acting_multiplier_acts_alike(family: str, index: int, correction: Any) -> None:
    """Packed layers smooth where converted ones do: not between two kinds of nodes, nor what was projected."""
    smp = SMPConfig(multiplier=0.4, correction=correction)
    conv = _layer(family, index)
    pair = (torch.randn(NODES, WIDTH), torch.randn(TARGETS, WIDTH)), _edges(NODES, TARGETS)
    calls = [(torch.randn(NODES, WIDTH), _edges(NODES, NODES)), *([pair] if FAMILIES[family][3] else [])]
    for args in calls:
        qconv = qgnn.calibrate(qgnn.quantize_model(conv, config=QuantConfig(bits=8, smp=smp)), args)
        torch.testing.assert_close(qgnn.pack_model(qconv)(*args), qconv(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["GCNConv", "GATConv", "GATv2Conv", "TAGConv", "SSGConv"])
def test_maps_of_full_width_inside_packed_layers(family: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([FAMILIES[family][0]()]).eval()
    inner = sorted(name for name, m in model.named_modules() if name.startswith("0.lin") and not list(m.children()))
    args = (torch.randn(NODES, WIDTH), torch.randint(NODES, (2, 40)))
    config = QuantConfig(bits=8, overrides={name: {"bits": 32} for name in inner})
    run = lambda model, args: model[0](*args)  # noqa: E731
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, config=config), [args], forward=run).eval()
    packed = qgnn.pack_model(qmodel)
    reasons = {spec.name: spec.reason for spec in packed._packed_specs}  # type: ignore[union-attr]
    assert reasons["0"] is None
    assert all(reasons[name] == "32 bits" for name in inner)
    with torch.no_grad():
        torch.testing.assert_close(run(packed, args), run(qmodel, args), rtol=1e-5, atol=1e-5)
