"""Every convolution of PyG as two layers on one random graph: how to make them, and what to call them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import conv as pyg

__all__ = ["CASES", "LEFT_OUT", "Case", "Graph", "Twice"]

EDGE, RELATIONS, HEADS, BLOCKS = 8, 4, 4, 4  # features of edges, relations of relational layers, heads, blocks
SIZE = 100  # nodes of a graph in a batch


@dataclass(frozen=True)
class Graph:
    """Random edges without order; what layers read beside them is drawn from the same seed.

    Args:
        nodes, edges: How many.
        seed: Of everything.
    """

    nodes: int
    edges: int
    seed: int = 0

    def _random(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + what)

    @cached_property
    def edge_index(self) -> Tensor:
        return torch.randint(self.nodes, (2, self.edges), generator=self._random(0))

    @cached_property
    def degrees(self) -> Tensor:
        """How many nodes have each in-degree."""
        return torch.bincount(torch.bincount(self.edge_index[1], minlength=self.nodes))

    def x(self, width: int) -> Tensor:
        return torch.randn(self.nodes, width, generator=self._random(1))

    def edge_attr(self, width: int = EDGE) -> Tensor:
        return torch.rand(self.edges, width, generator=self._random(2))

    @property
    def edge_weight(self) -> Tensor:
        return self.edge_attr(1).view(-1)

    @property
    def edge_type(self) -> Tensor:
        return torch.randint(RELATIONS, (self.edges,), generator=self._random(3))

    @property
    def node_type(self) -> Tensor:
        return torch.arange(self.nodes) % 2

    @property
    def batch(self) -> Tensor:
        return torch.arange(self.nodes) // SIZE

    @property
    def points(self) -> Tensor:
        return torch.rand(self.nodes, 3, generator=self._random(4))

    @property
    def normals(self) -> Tensor:
        return nn.functional.normalize(self.points - 0.5)

    @property
    def hyperedges(self) -> Tensor:
        """Nodes, and hyperedges of :data:`SIZE` nodes on average, ``[2, E]``."""
        return torch.stack([self.edge_index[0], self.edge_index[1] % max(1, self.edges // SIZE)])

    def hetero(self, width: int) -> tuple[dict[str, Tensor], dict[tuple[str, str, str], Tensor]]:
        """The nodes as two types, the edges as :data:`RELATIONS` relations between them."""
        half = self.nodes // 2
        x = self.x(width)
        edges = (self.edge_index % half).split(-(-self.edges // RELATIONS), dim=1)
        return {"a": x[:half], "b": x[half : 2 * half]}, dict(zip(METADATA[1], edges, strict=True))


METADATA = (["a", "b"], [("a", "to", "a"), ("a", "to", "b"), ("b", "to", "a"), ("b", "to", "b")])


class Twice(nn.Module):
    """Two convolutions with ReLU between them; what the second takes beside features is what the first does."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([make(), make()])

    def forward(self, x: Any, *rest: Any) -> Any:
        h = self.convs[0](x, *rest)
        h = {name: value.relu() for name, value in h.items()} if isinstance(h, dict) else h.relu()
        if isinstance(x, Tensor) and x.dim() > h.dim():  # layers of layers: the first's result is the newest
            h = torch.cat([x[:, 1:], h.unsqueeze(1)], dim=1)
        return self.convs[1](h, *rest)


@dataclass(frozen=True)
class Case:
    """A convolution and a call of it.

    Args:
        make: From the width, and the graph that it will be called with.
        arguments: Of a call, from the graph and the width.
        widest: Largest width that a float model fits into memory at.
        twice: Whether what is measured is two of them, with ReLU between (of convolutions, not of models).
        whole: Whether ranges are set on the graph that is measured on, since the model holds one row per node.
    """

    make: Callable[[int, Graph], nn.Module]
    arguments: Callable[[Graph, int], tuple[Any, ...]]
    widest: int = 1 << 20
    twice: bool = True
    whole: bool = False

    def model(self, width: int, graph: Graph) -> nn.Module:
        """What is measured, in eval mode."""
        return (Twice(lambda: self.make(width, graph)) if self.twice else self.make(width, graph)).eval()


def _plain(make: Callable[[int], nn.Module], *more: str, widest: int = 1 << 20) -> Case:
    """A layer of features and edges; ``more`` names what else of the graph it is called with."""

    def arguments(graph: Graph, width: int) -> tuple[Any, ...]:
        found = (getattr(graph, name) for name in more)
        return (graph.x(width), graph.edge_index, *(value() if callable(value) else value for value in found))

    return Case(lambda width, graph: make(width), arguments, widest)


def _pair(make: Callable[[int], nn.Module]) -> Case:
    """A layer of features, initial features and edges."""
    return Case(lambda w, graph: make(w), lambda graph, w: (graph.x(w), graph.x(w) + 0.5, graph.edge_index))


def _cloud(make: Callable[[int], nn.Module], *more: str) -> Case:
    """A layer of features, positions and edges."""

    def arguments(graph: Graph, width: int) -> tuple[Any, ...]:
        return (graph.x(width), graph.points, *(getattr(graph, name) for name in more), graph.edge_index)

    return Case(lambda width, graph: make(width), arguments)


def _typed(make: Callable[[int], nn.Module]) -> Case:
    """A layer of node and edge types."""
    return Case(lambda width, graph: make(width), lambda graph, width: graph.hetero(width))


def _mlp(*widths: int) -> nn.Module:
    hidden = nn.Linear(widths[0], widths[1])
    return nn.Sequential(hidden, nn.ReLU(), nn.Linear(widths[1], widths[2]))


def _pna(width: int, graph: Graph, towers: int = 1) -> nn.Module:
    aggregators, scalers = ["mean", "min", "max", "std"], ["identity", "amplification", "attenuation"]
    return pyg.PNAConv(width, width, aggregators, scalers, graph.degrees, towers=towers, divide_input=towers > 1)


_FEATURES = _plain(pyg.AGNNConv).arguments

CASES: Mapping[str, Case] = {
    "AGNNConv": _plain(lambda w: pyg.AGNNConv()),
    "AntiSymmetricConv": _plain(lambda w: pyg.AntiSymmetricConv(w, phi=pyg.GraphConv(w, w))),
    "APPNP": _plain(lambda w: pyg.APPNP(K=10, alpha=0.1)),
    "ARMAConv": _plain(lambda w: pyg.ARMAConv(w, w, num_stacks=2, num_layers=2)),
    "CGConv": _plain(lambda w: pyg.CGConv(w, EDGE), "edge_attr"),
    "ChebConv": _plain(lambda w: pyg.ChebConv(w, w, K=3)),
    "ClusterGCNConv": _plain(lambda w: pyg.ClusterGCNConv(w, w)),
    "DirGNNConv": _plain(lambda w: pyg.DirGNNConv(pyg.GraphConv(w, w))),
    "DNAConv": Case(
        lambda w, graph: pyg.DNAConv(w, heads=HEADS),
        lambda graph, w: (torch.stack([graph.x(w), graph.x(w) + 0.5, graph.x(w) - 0.5], dim=1), graph.edge_index),
    ),
    "EdgeConv": _plain(lambda w: pyg.EdgeConv(_mlp(2 * w, w, w))),
    "EGConv": _plain(lambda w: pyg.EGConv(w, w, aggregators=["symnorm", "max"], num_heads=HEADS)),
    "FAConv": _pair(lambda w: pyg.FAConv(w)),
    "FastRGCNConv": _plain(lambda w: pyg.FastRGCNConv(w, w, RELATIONS), "edge_type", widest=32),  # a weight per edge
    "FeaStConv": _plain(lambda w: pyg.FeaStConv(w, w, heads=HEADS)),
    "FiLMConv": _plain(lambda w: pyg.FiLMConv(w, w)),
    "FiLMConv of relations": _plain(lambda w: pyg.FiLMConv(w, w, num_relations=RELATIONS), "edge_type"),
    "GatedGraphConv": _plain(lambda w: pyg.GatedGraphConv(w, num_layers=2)),
    "GATConv": _plain(lambda w: pyg.GATConv(w, w // HEADS, heads=HEADS)),
    "GATv2Conv": _plain(lambda w: pyg.GATv2Conv(w, w // HEADS, heads=HEADS)),
    "GCN2Conv": _pair(lambda w: pyg.GCN2Conv(w, alpha=0.1)),
    "GCNConv": _plain(lambda w: pyg.GCNConv(w, w)),
    "GENConv": _plain(lambda w: pyg.GENConv(w, w, edge_dim=EDGE), "edge_attr"),
    "GeneralConv": _plain(lambda w: pyg.GeneralConv(w, w, in_edge_channels=EDGE, attention=True), "edge_attr"),
    "GINConv": _plain(lambda w: pyg.GINConv(_mlp(w, w, w))),
    "GINEConv": _plain(lambda w: pyg.GINEConv(_mlp(w, w, w), edge_dim=EDGE), "edge_attr"),
    "GMMConv": _plain(lambda w: pyg.GMMConv(w, w, dim=EDGE, kernel_size=3), "edge_attr"),
    "GPSConv": Case(
        lambda w, graph: pyg.GPSConv(w, pyg.GraphConv(w, w), heads=HEADS),
        lambda graph, w: (graph.x(w), graph.edge_index, graph.batch),
    ),
    "GraphConv": _plain(lambda w: pyg.GraphConv(w, w)),
    "GraphConv of weights": _plain(lambda w: pyg.GraphConv(w, w), "edge_weight"),
    "HANConv": _typed(lambda w: pyg.HANConv(w, w, METADATA, heads=HEADS)),
    "HEATConv": _plain(
        lambda w: pyg.HEATConv(w, w // HEADS, 2, RELATIONS, 4, EDGE, 4, heads=HEADS),
        "node_type", "edge_type", "edge_attr",
    ),
    "HeteroConv of GraphConv": _typed(lambda w: pyg.HeteroConv({k: pyg.GraphConv(w, w) for k in METADATA[1]})),
    "HeteroConv of SAGEConv": _typed(lambda w: pyg.HeteroConv({k: pyg.SAGEConv(w, w) for k in METADATA[1]})),
    "HGTConv": _typed(lambda w: pyg.HGTConv(w, w, METADATA, heads=HEADS)),
    "HypergraphConv": _plain(lambda w: pyg.HypergraphConv(w, w)),
    "LEConv": _plain(lambda w: pyg.LEConv(w, w), "edge_weight"),
    "LGConv": _plain(lambda w: pyg.LGConv()),
    "MFConv": _plain(lambda w: pyg.MFConv(w, w, max_degree=8)),
    "MixHopConv": _plain(lambda w: pyg.MixHopConv(w, w // 4, powers=[0, 1, 2, 3])),
    "NNConv": _plain(lambda w: pyg.NNConv(w, w, _mlp(EDGE, 16, w * w)), "edge_attr", widest=32),
    "PDNConv": _plain(lambda w: pyg.PDNConv(w, w, EDGE, 16), "edge_attr"),
    "PNAConv": Case(_pna, _FEATURES),
    "PNAConv of towers": Case(lambda w, graph: _pna(w, graph, towers=HEADS), _FEATURES),
    "PointGNNConv": _cloud(lambda w: pyg.PointGNNConv(_mlp(w, w, 3), _mlp(w + 3, w, w), _mlp(w, w, w))),
    "PointNetConv": _cloud(lambda w: pyg.PointNetConv(_mlp(w + 3, w, w))),
    "PointTransformerConv": _cloud(lambda w: pyg.PointTransformerConv(w, w)),
    "PPFConv": _cloud(lambda w: pyg.PPFConv(_mlp(w + 4, w, w)), "normals"),
    "ResGatedGraphConv": _plain(lambda w: pyg.ResGatedGraphConv(w, w)),
    "ResGatedGraphConv of edges": _plain(lambda w: pyg.ResGatedGraphConv(w, w, edge_dim=EDGE), "edge_attr"),
    "RGATConv": _plain(
        lambda w: pyg.RGATConv(w, w // HEADS, RELATIONS, heads=HEADS), "edge_type", widest=32,  # a weight per edge
    ),
    "RGCNConv": _plain(lambda w: pyg.RGCNConv(w, w, RELATIONS), "edge_type"),
    "RGCNConv of bases": _plain(lambda w: pyg.RGCNConv(w, w, RELATIONS, num_bases=2), "edge_type"),
    "RGCNConv of blocks": _plain(lambda w: pyg.RGCNConv(w, w, RELATIONS, num_blocks=BLOCKS), "edge_type"),
    "SAGEConv": _plain(lambda w: pyg.SAGEConv(w, w)),
    "SGConv": _plain(lambda w: pyg.SGConv(w, w, K=2)),
    "SignedConv": Case(
        lambda w, graph: pyg.SignedConv(w, w // 2, first_aggr=True),
        lambda graph, w: (graph.x(w), *graph.edge_index.chunk(2, dim=1)),
    ),
    "SimpleConv": _plain(lambda w: pyg.SimpleConv(aggr="mean")),
    "SSGConv": _plain(lambda w: pyg.SSGConv(w, w, alpha=0.1, K=2)),
    "SuperGATConv": _plain(lambda w: pyg.SuperGATConv(w, w // HEADS, heads=HEADS)),
    "TAGConv": _plain(lambda w: pyg.TAGConv(w, w, K=2)),
    "TransformerConv": _plain(lambda w: pyg.TransformerConv(w, w // HEADS, heads=HEADS)),
    "TransformerConv of edges": _plain(
        lambda w: pyg.TransformerConv(w, w // HEADS, heads=HEADS, edge_dim=EDGE), "edge_attr"
    ),
    "WLConvContinuous": _plain(lambda w: pyg.WLConvContinuous(), "edge_weight"),
}  # fmt: skip

# The other names that ``torch_geometric.nn.conv`` exports, and why they are not measured.
LEFT_OUT: Mapping[str, str] = {
    "CuGraphGATConv": "needs cugraph, a GPU package",
    "CuGraphRGCNConv": "needs cugraph, a GPU package",
    "CuGraphSAGEConv": "needs cugraph, a GPU package",
    "DynamicEdgeConv": "an EdgeConv on a k-NN graph, which needs torch-cluster",
    "FusedGATConv": "needs dgNN, a GPU package",
    "GravNetConv": "a k-NN graph, which needs torch-cluster",
    "MeshCNNConv": "edges of meshes, without message passing between nodes",
    "MessagePassing": "the base class",
    "PANConv": "needs torch-sparse",
    "SplineConv": "needs pyg-lib or torch-spline-conv",
    "WLConv": "counts colours, without features",
    "XConv": "a k-NN graph, which needs torch-cluster",
}
