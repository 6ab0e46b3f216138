"""Layers whose messages are traced, by what their kernels have to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from core.support import Summed
from torch import Tensor, nn
from torch_geometric.nn import (
    AGNNConv,
    CGConv,
    ChebConv,
    ClusterGCNConv,
    DirGNNConv,
    EGConv,
    FAConv,
    FiLMConv,
    GatedGraphConv,
    GCN2Conv,
    GENConv,
    GeneralConv,
    GINEConv,
    GMMConv,
    HANConv,
    HEATConv,
    HGTConv,
    HypergraphConv,
    LEConv,
    MFConv,
    MixHopConv,
    PDNConv,
    PNAConv,
    ResGatedGraphConv,
    SignedConv,
    SimpleConv,
    SuperGATConv,
    TransformerConv,
    WLConvContinuous,
)

NODES, EDGES, WIDTH, EDGE_WIDTH = 150, 1200, 12, 5


def graph(seed: int = 0) -> Tensor:
    """A graph with isolated nodes, a hub and repeated edges."""
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(NODES, (EDGES,), generator=generator)
    dst = (torch.rand(EDGES, generator=generator) ** 3 * (NODES - 10)).long()
    return torch.stack([src, dst])


def floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out))


def hyperedges() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([graph()[0], torch.randint(40, (EDGES,), generator=generator)])


X, EDGE_INDEX = floats(NODES, WIDTH), graph()
ATTRIBUTES, WEIGHTS = floats(EDGES, EDGE_WIDTH, seed=3), floats(EDGES, seed=4).abs()
WIDE = floats(EDGES, WIDTH, seed=5)
DEGREES = torch.bincount(torch.bincount(EDGE_INDEX[1], minlength=NODES))
NODE_TYPES = torch.arange(NODES) % 2
EDGE_TYPES = torch.arange(EDGES) % 3
RELATION = ("a", "to", "a")
METADATA = (["a"], [RELATION])
HETERO = ({"a": X}, {RELATION: EDGE_INDEX})

Case = tuple[Callable[[], nn.Module], tuple[Any, ...]]

# Their sums, products and quotients are those of torch, bit for bit.
EXACT: dict[str, Case] = {
    "ChebConv": (lambda: ChebConv(WIDTH, WIDTH, K=3), (X, EDGE_INDEX)),
    "ClusterGCNConv": (lambda: ClusterGCNConv(WIDTH, WIDTH), (X, EDGE_INDEX)),
    "DirGNNConv": (lambda: DirGNNConv(Summed(WIDTH, WIDTH)), (X, EDGE_INDEX)),
    "EGConv": (lambda: EGConv(WIDTH, 8, aggregators=["symnorm", "mean", "max", "min"]), (X, EDGE_INDEX)),
    "GatedGraphConv": (lambda: GatedGraphConv(WIDTH, num_layers=2), (X, EDGE_INDEX)),
    "GCN2Conv": (lambda: GCN2Conv(WIDTH, alpha=0.1), (X, floats(NODES, WIDTH, seed=6), EDGE_INDEX)),
    "GeneralConv": (lambda: GeneralConv(WIDTH, WIDTH), (X, EDGE_INDEX)),
    "GINEConv": (lambda: GINEConv(mlp(WIDTH, WIDTH), edge_dim=EDGE_WIDTH), (X, EDGE_INDEX, ATTRIBUTES)),
    "GINEConv of wide edges": (lambda: GINEConv(mlp(WIDTH, WIDTH)), (X, EDGE_INDEX, WIDE)),
    "Summed": (lambda: Summed(WIDTH, WIDTH), (X, EDGE_INDEX)),
    "Summed, weighted mean": (lambda: Summed(WIDTH, WIDTH, aggr="mean"), (X, EDGE_INDEX, WEIGHTS)),
    "Summed, maximum": (lambda: Summed(WIDTH, WIDTH, aggr="max"), (X, EDGE_INDEX)),
    "HypergraphConv": (lambda: HypergraphConv(WIDTH, WIDTH), (X, hyperedges())),
    "LEConv": (lambda: LEConv(WIDTH, WIDTH), (X, EDGE_INDEX, WEIGHTS)),
    "MFConv": (lambda: MFConv(WIDTH, WIDTH, max_degree=4), (X, EDGE_INDEX)),
    "MixHopConv": (lambda: MixHopConv(WIDTH, WIDTH), (X, EDGE_INDEX)),
    "PNAConv": (
        lambda: PNAConv(WIDTH, WIDTH, ["mean", "max", "min", "std"], ["identity", "amplification"], DEGREES, towers=1),
        (X, EDGE_INDEX),
    ),
    "SignedConv": (lambda: SignedConv(WIDTH, WIDTH, first_aggr=True), (X, EDGE_INDEX, EDGE_INDEX.flip(0))),
    "SimpleConv": (lambda: SimpleConv(), (X, EDGE_INDEX)),
    "WLConvContinuous": (lambda: WLConvContinuous(), (X, EDGE_INDEX, WEIGHTS)),
}

ROUNDED: dict[str, Case] = {
    "AGNNConv": (lambda: AGNNConv(), (X, EDGE_INDEX)),
    "CGConv": (lambda: CGConv(WIDTH, dim=EDGE_WIDTH), (X, EDGE_INDEX, ATTRIBUTES)),
    "FAConv": (lambda: FAConv(WIDTH), (X, floats(NODES, WIDTH, seed=6), EDGE_INDEX)),
    "FiLMConv": (lambda: FiLMConv(WIDTH, WIDTH), (X, EDGE_INDEX)),
    "GENConv": (lambda: GENConv(WIDTH, WIDTH, edge_dim=EDGE_WIDTH), (X, EDGE_INDEX, ATTRIBUTES)),
    "GENConv, power mean": (lambda: GENConv(WIDTH, WIDTH, aggr="powermean"), (X, EDGE_INDEX)),
    "GeneralConv, attention": (lambda: GeneralConv(WIDTH, WIDTH, attention=True, heads=2), (X, EDGE_INDEX)),
    "GMMConv": (lambda: GMMConv(WIDTH, WIDTH, dim=EDGE_WIDTH, kernel_size=3), (X, EDGE_INDEX, ATTRIBUTES)),
    "HANConv": (lambda: HANConv(WIDTH, WIDTH, METADATA, heads=2), HETERO),
    "HEATConv": (
        lambda: HEATConv(WIDTH, 6, 2, 3, 4, EDGE_WIDTH, 4, heads=2),
        (X, EDGE_INDEX, NODE_TYPES, EDGE_TYPES, ATTRIBUTES),
    ),
    "HGTConv": (lambda: HGTConv(WIDTH, WIDTH, METADATA, heads=2), HETERO),
    "PDNConv": (lambda: PDNConv(WIDTH, WIDTH, edge_dim=EDGE_WIDTH, hidden_channels=8), (X, EDGE_INDEX, ATTRIBUTES)),
    "ResGatedGraphConv": (lambda: ResGatedGraphConv(WIDTH, WIDTH), (X, EDGE_INDEX)),
    "ResGatedGraphConv of edges": (
        lambda: ResGatedGraphConv(WIDTH, WIDTH, edge_dim=EDGE_WIDTH),
        (X, EDGE_INDEX, ATTRIBUTES),
    ),
    "SuperGATConv": (lambda: SuperGATConv(WIDTH, 6, heads=2), (X, EDGE_INDEX)),
    "TransformerConv": (
        lambda: TransformerConv(WIDTH, 6, heads=2, edge_dim=EDGE_WIDTH),
        (X, EDGE_INDEX, ATTRIBUTES),
    ),
    "TransformerConv, one head": (lambda: TransformerConv(WIDTH, 7, beta=True), (X, EDGE_INDEX)),
}
