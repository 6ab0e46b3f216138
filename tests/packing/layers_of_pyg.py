"""Every convolution of PyG on a small graph: how to make it, and what to call it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from core.support import Summed
from torch import Tensor, nn
from torch_geometric.nn import conv as pyg

NODES, WIDTH, OUT, EDGE = 40, 8, 6, 3
TARGETS = 25


def graph(num_src: int = NODES, num_dst: int = NODES, edges: int = 220, seed: int = 0) -> Tensor:
    """Edges in no order; the last target has none, the first is a hub."""
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(num_src, (edges,), generator=generator)
    dst = torch.randint(num_dst - 1, (edges,), generator=generator)
    dst[: edges // 5] = 0
    order = torch.randperm(edges, generator=generator)
    return torch.stack([src, dst])[:, order]


def x(rows: int = NODES, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width))


def per_edge(width: int = 0) -> Tensor:
    shape = (graph().size(1), width) if width else (graph().size(1),)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def types(count: int = 3) -> Tensor:
    return torch.randint(count, (graph().size(1),), generator=torch.Generator().manual_seed(2))


def mlp(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 10), nn.ReLU(), nn.Linear(10, out))


def _simple(make: Callable[[], nn.Module], *more: Any) -> tuple[Callable[[], nn.Module], tuple[Any, ...]]:
    return make, (x(), graph(), *more)


def _types_of(relations: int) -> tuple[list[str], list[tuple[str, str, str]]]:
    return ["a", "b"], [("a", f"r{k}", "b" if k % 2 else "a") for k in range(relations)]


def _hetero() -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
    edges = {kind: graph(seed=k) for k, kind in enumerate(_types_of(3)[1])}
    return {"a": x(), "b": x(NODES, WIDTH) + 1}, edges


DEGREES = torch.bincount(torch.bincount(graph()[1], minlength=NODES))
POINTS = torch.rand(NODES, 3, generator=torch.Generator().manual_seed(3))
HYPEREDGES = torch.stack([torch.randint(NODES, (60,)), torch.randint(12, (60,))])

# Name to a maker and the arguments of a call.
GENERIC: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "AGNNConv": _simple(lambda: pyg.AGNNConv()),
    "AntiSymmetricConv": _simple(lambda: pyg.AntiSymmetricConv(WIDTH, phi=Summed(WIDTH, WIDTH))),
    "ARMAConv": _simple(lambda: pyg.ARMAConv(WIDTH, OUT, num_stacks=2, num_layers=2)),
    "ARMAConv of one layer": _simple(lambda: pyg.ARMAConv(WIDTH, OUT)),  # whose second weight nothing reads
    "CGConv": _simple(lambda: pyg.CGConv(WIDTH, EDGE), per_edge(EDGE)),
    "ChebConv": _simple(lambda: pyg.ChebConv(WIDTH, OUT, K=3)),
    "ClusterGCNConv": _simple(lambda: pyg.ClusterGCNConv(WIDTH, OUT)),
    "DirGNNConv": _simple(lambda: pyg.DirGNNConv(Summed(WIDTH, OUT))),
    "DNAConv": (lambda: pyg.DNAConv(WIDTH, heads=2), (torch.randn(NODES, 3, WIDTH), graph())),
    "EdgeConv": _simple(lambda: pyg.EdgeConv(mlp(2 * WIDTH, OUT))),
    "EGConv": _simple(lambda: pyg.EGConv(WIDTH, OUT, aggregators=["symnorm", "max"], num_heads=2)),
    "FAConv": (lambda: pyg.FAConv(WIDTH), (x(), x() + 0.5, graph())),
    "FeaStConv": _simple(lambda: pyg.FeaStConv(WIDTH, OUT, heads=2)),
    "FiLMConv": _simple(lambda: pyg.FiLMConv(WIDTH, OUT)),
    "FiLMConv of relations": _simple(lambda: pyg.FiLMConv(WIDTH, OUT, num_relations=3), types()),
    "GatedGraphConv": _simple(lambda: pyg.GatedGraphConv(WIDTH, num_layers=2)),
    "GCN2Conv": (lambda: pyg.GCN2Conv(WIDTH, alpha=0.1), (x(), x() + 0.5, graph())),
    "GENConv": _simple(lambda: pyg.GENConv(WIDTH, OUT, edge_dim=EDGE), per_edge(EDGE)),
    "GENConv powermean": _simple(lambda: pyg.GENConv(WIDTH, OUT, aggr="powermean")),
    "GeneralConv": _simple(lambda: pyg.GeneralConv(WIDTH, OUT, in_edge_channels=EDGE, attention=True), per_edge(EDGE)),
    "GINEConv": _simple(lambda: pyg.GINEConv(mlp(WIDTH, OUT), edge_dim=EDGE), per_edge(EDGE)),
    "GMMConv": _simple(lambda: pyg.GMMConv(WIDTH, OUT, dim=EDGE, kernel_size=3), per_edge(EDGE)),
    "GPSConv": _simple(lambda: pyg.GPSConv(WIDTH, Summed(WIDTH, WIDTH), heads=2)),
    "GraphConv of the user's": _simple(lambda: Summed(WIDTH, OUT), per_edge()),
    "GraphConv max": _simple(lambda: pyg.GraphConv(WIDTH, OUT, aggr="max")),
    "GraphConv median": _simple(lambda: pyg.GraphConv(WIDTH, OUT, aggr="median")),
    "HEATConv": _simple(
        lambda: pyg.HEATConv(WIDTH, OUT, 2, 3, 4, EDGE, 4, heads=2),
        torch.arange(NODES) % 2, types(), per_edge(EDGE),
    ),
    "HypergraphConv": (lambda: pyg.HypergraphConv(WIDTH, OUT), (x(), HYPEREDGES)),
    "LEConv": _simple(lambda: pyg.LEConv(WIDTH, OUT), per_edge()),
    "MFConv": _simple(lambda: pyg.MFConv(WIDTH, OUT, max_degree=4)),
    "MixHopConv": _simple(lambda: pyg.MixHopConv(WIDTH, OUT)),
    "NNConv": _simple(lambda: pyg.NNConv(WIDTH, OUT, mlp(EDGE, WIDTH * OUT)), per_edge(EDGE)),
    "PDNConv": _simple(lambda: pyg.PDNConv(WIDTH, OUT, EDGE, 5), per_edge(EDGE)),
    "PNAConv": _simple(
        lambda: pyg.PNAConv(WIDTH, OUT, ["mean", "min", "max", "std", "var"], ["identity", "linear"], DEGREES)
    ),
    "PNAConv of edges": _simple(
        lambda: pyg.PNAConv(WIDTH, OUT, ["sum"], ["attenuation"], DEGREES, EDGE, towers=2, divide_input=True),
        per_edge(EDGE),
    ),
    "PointGNNConv": (
        lambda: pyg.PointGNNConv(mlp(WIDTH, 3), mlp(WIDTH + 3, OUT), mlp(OUT, WIDTH)), (x(), POINTS, graph())
    ),
    "PointNetConv": (lambda: pyg.PointNetConv(mlp(WIDTH + 3, OUT)), (x(), POINTS, graph())),
    "PointTransformerConv": (lambda: pyg.PointTransformerConv(WIDTH, OUT), (x(), POINTS, graph())),
    "PPFConv": (
        lambda: pyg.PPFConv(mlp(WIDTH + 4, OUT)), (x(), POINTS, POINTS / POINTS.norm(dim=1, keepdim=True), graph())
    ),
    "ResGatedGraphConv": _simple(lambda: pyg.ResGatedGraphConv(WIDTH, OUT, edge_dim=EDGE), per_edge(EDGE)),
    "RGATConv": _simple(lambda: pyg.RGATConv(WIDTH, OUT, 3, heads=2, edge_dim=EDGE), types(), per_edge(EDGE)),
    "RGCNConv": _simple(lambda: pyg.RGCNConv(WIDTH, OUT, 3), types()),
    "RGCNConv of bases": _simple(lambda: pyg.RGCNConv(WIDTH, OUT, 3, num_bases=2), types()),
    "RGCNConv of blocks": _simple(lambda: pyg.RGCNConv(WIDTH, OUT, 3, num_blocks=2), types()),
    "FastRGCNConv": _simple(lambda: pyg.FastRGCNConv(WIDTH, OUT, 3), types()),
    "SignedConv": (lambda: pyg.SignedConv(WIDTH, OUT, first_aggr=True), (x(), graph(), graph(seed=1))),
    "SimpleConv": _simple(lambda: pyg.SimpleConv(aggr="mean", combine_root="cat"), per_edge()),
    "SuperGATConv": _simple(lambda: pyg.SuperGATConv(WIDTH, OUT, heads=2)),
    "TransformerConv": _simple(
        lambda: pyg.TransformerConv(WIDTH, OUT, heads=2, edge_dim=EDGE, beta=True), per_edge(EDGE)
    ),
    "WLConvContinuous": _simple(lambda: pyg.WLConvContinuous(), per_edge()),
    "HANConv": (lambda: pyg.HANConv(WIDTH, OUT * 2, _types_of(3), heads=2), _hetero()),
    "HGTConv": (lambda: pyg.HGTConv(WIDTH, OUT * 2, _types_of(3), heads=2), _hetero()),
    "HeteroConv": (
        lambda: pyg.HeteroConv({kind: Summed(WIDTH, OUT) for kind in _types_of(3)[1]}, aggr="sum"), _hetero()
    ),
}
# No messages between nodes, several packages that are not installed, or integers that are no features.
OTHERS = {
    "MessagePassing", "CuGraphSAGEConv", "CuGraphGATConv", "CuGraphRGCNConv", "FusedGATConv", "WLConv", "MeshCNNConv",
    "SplineConv", "XConv", "DynamicEdgeConv", "GravNetConv", "PANConv",
}  # fmt: skip
SAME = {"PointConv": "PointNetConv", "ECConv": "NNConv"}
KERNELS = {
    "GCNConv", "SAGEConv", "GATConv", "GATv2Conv", "TAGConv", "GINConv", "SGConv", "SSGConv", "APPNP", "LGConv",
}  # fmt: skip
