"""The models of PyG on one random graph, as :mod:`benchmarks.convolution_cases` has its convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg

from .convolution_cases import EDGE, METADATA, Case, Graph

__all__ = ["MODELS", "MODELS_LEFT_OUT"]

HEADS, LAYERS, KINDS = 4, 2, 20
PAIRS = 10_000  # that link predictors score


def _model(make: Callable[[int], nn.Module], *more: str, **options: Any) -> Case:
    """A model of features and edges; ``more`` names what else of the graph it is called with."""

    def arguments(graph: Graph, width: int) -> tuple[Any, ...]:
        found = (getattr(graph, name) for name in more)
        return (graph.x(width), graph.edge_index, *(value() if callable(value) else value for value in found))

    return Case(lambda width, graph: make(width), arguments, twice=False, **options)


def _rows(make: Callable[[int], nn.Module], arguments: Callable[[Tensor], Any]) -> Case:
    """A model of features alone; ``arguments`` of a call, from the features."""
    return Case(lambda width, graph: make(width), lambda graph, width: arguments(graph.x(width)), twice=False)


class _Edges(nn.Module):
    """The model of edges in a ``MetaLayer``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(2 * width + EDGE, width)

    def forward(self, src: Tensor, dst: Tensor, edge_attr: Tensor, u: Any, batch: Any) -> Tensor:
        return self.lin(torch.cat([src, dst, edge_attr], dim=1)).relu()


class _Kept(nn.Module):
    """A model that frees the features which it is given, called with a copy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.model(x.clone(), edge_index)
        return out


class _Nodes(nn.Module):
    """The model of nodes in a ``MetaLayer``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, u: Any, batch: Any) -> Tensor:
        summed = torch.zeros_like(x).index_add_(0, edge_index[1], edge_attr)
        return self.lin(torch.cat([x, summed], dim=1)).relu()


class _Variational(nn.Module):
    """An encoder of means and of logarithms of deviations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean, self.log = pyg.GCNConv(width, width), pyg.GCNConv(width, width)

    def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x, edge_index), self.log(x, edge_index)


class _Given:
    """Edges with distances up to 10, in place of a search for neighbours within a radius."""

    def __init__(self, edge_index: Tensor) -> None:
        self.edge_index = edge_index

    def __call__(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        near = (self.edge_index < pos.size(0)).all(0)
        edges = self.edge_index[:, near]
        return edges, 5 * (pos[edges[0]] - pos[edges[1]]).norm(dim=1)


def _pna(width: int, graph: Graph) -> nn.Module:
    aggregators, scalers = ["mean", "max", "std"], ["identity", "amplification"]
    return pyg.PNA(width, width, LAYERS, width, aggregators=aggregators, scalers=scalers, deg=graph.degrees)


def _kinds(graph: Graph) -> Tensor:
    return torch.arange(graph.nodes) % KINDS


MODELS: Mapping[str, Case] = {
    "ARGA": _model(lambda w: pyg.ARGA(pyg.GCNConv(w, w), pyg.MLP([w, w, 1]))),
    "ARGVA": _model(lambda w: pyg.ARGVA(_Variational(w), pyg.MLP([w, w, 1]))),
    "ARLinkPredictor": _model(lambda w: pyg.ARLinkPredictor(w, w)),
    "AttentiveFP": _model(lambda w: pyg.AttentiveFP(w, w, w, EDGE, LAYERS, 2), "edge_attr", "batch"),
    "DeepGCNLayer": _model(
        lambda w: pyg.DeepGCNLayer(pyg.GENConv(w, w), nn.LayerNorm(w), nn.ReLU(), block="res+")
    ),
    "DeepGraphInfomax": _model(
        lambda w: pyg.DeepGraphInfomax(
            w, pyg.GCN(w, w, 1), summary=lambda z, *rest: z.mean(0).sigmoid(),
            corruption=lambda x, edge_index: (x.roll(1, 0), edge_index),
        )
    ),
    "EdgeCNN": _model(lambda w: pyg.EdgeCNN(w, w, LAYERS, w)),
    "GAE": _model(lambda w: pyg.GAE(pyg.GCN(w, w, LAYERS))),
    "GAT": _model(lambda w: pyg.GAT(w, w, LAYERS, w, heads=HEADS)),
    "GCN": _model(lambda w: pyg.GCN(w, w, LAYERS, w)),
    "GIN": _model(lambda w: pyg.GIN(w, w, LAYERS, w)),
    "GraphSAGE": _model(lambda w: pyg.GraphSAGE(w, w, LAYERS, w)),
    "GraphUNet": _model(lambda w: pyg.GraphUNet(w, w, w, depth=1)),
    "GroupAddRev": _model(lambda w: _Kept(pyg.GroupAddRev(pyg.SAGEConv(w // 2, w // 2), num_groups=2))),
    "HeteroJumpingKnowledge": _rows(
        lambda w: pyg.HeteroJumpingKnowledge(METADATA[0], "lstm", channels=w, num_layers=2),
        lambda x: ({kind: [x, x + 0.5] for kind in METADATA[0]},),
    ),
    "JumpingKnowledge": _rows(lambda w: pyg.JumpingKnowledge("lstm", w, 2), lambda x: ([x, x + 0.5],)),
    "LabelPropagation": Case(
        lambda w, graph: pyg.LabelPropagation(num_layers=3, alpha=0.9),
        lambda graph, w: (graph.x(w).softmax(1), graph.edge_index), twice=False,
    ),
    "LightGCN": Case(
        lambda w, graph: pyg.LightGCN(graph.nodes, w, LAYERS),
        lambda graph, w: (graph.edge_index, graph.edge_index[:, :PAIRS]), twice=False, whole=True,
    ),
    "LINKX": Case(
        lambda w, graph: pyg.LINKX(graph.nodes, w, w, w, LAYERS),
        lambda graph, w: (graph.x(w), graph.edge_index), twice=False, whole=True,
    ),
    "MaskLabel": Case(
        lambda w, graph: pyg.MaskLabel(KINDS, w),
        lambda graph, w: (graph.x(w), _kinds(graph), torch.arange(graph.nodes) % 2 == 0), twice=False,
    ),
    "MetaLayer": _model(lambda w: pyg.MetaLayer(_Edges(w), _Nodes(w)), "edge_attr"),
    "MetaPath2Vec": Case(
        lambda w, graph: pyg.MetaPath2Vec(
            graph.hetero(w)[1], w, [METADATA[1][1], METADATA[1][2]], walk_length=4, context_size=2,
            num_nodes_dict=dict.fromkeys(METADATA[0], graph.nodes // 2),
        ),
        # Of all nodes the float model returns a view of its table, and no time is measured.
        lambda graph, w: ("a", torch.randperm(graph.nodes // 2)), twice=False,
    ),
    "MLP": _rows(lambda w: pyg.MLP([w, w, w]), lambda x: (x,)),
    "NeuralFingerprint": _model(lambda w: pyg.NeuralFingerprint(w, w, w, LAYERS), "batch"),
    "PMLP": _model(lambda w: pyg.PMLP(w, w, w, LAYERS)),
    "PNA": Case(_pna, lambda graph, w: (graph.x(w), graph.edge_index), twice=False),
    "Polynormer": _model(
        lambda w: pyg.Polynormer(w, w, w, local_layers=LAYERS, global_layers=1), "batch"
    ),
    "RECT_L": _model(lambda w: pyg.RECT_L(w, w)),
    "SchNet": Case(
        lambda w, graph: pyg.SchNet(w, w, LAYERS, interaction_graph=_Given(graph.edge_index)),
        lambda graph, w: (_kinds(graph), graph.points, graph.batch), twice=False, whole=True,
    ),
    "SGFormer": _model(lambda w: pyg.SGFormer(w, w, w, trans_num_layers=1, gnn_num_layers=LAYERS), "batch"),
    "SignedGCN": Case(
        lambda w, graph: pyg.SignedGCN(w, w, LAYERS),
        lambda graph, w: (graph.x(w), *graph.edge_index.chunk(2, dim=1)), twice=False,
    ),
    "VGAE": _model(lambda w: pyg.VGAE(_Variational(w))),
}  # fmt: skip

# The other names that ``torch_geometric.nn.models`` exports, and why they are not measured.
MODELS_LEFT_OUT: Mapping[str, str] = {
    "captum_output_to_dicts": "a function",
    "CorrectAndSmooth": "two methods and no forward; its propagation is that of LabelPropagation",
    "DimeNet": "needs torch-cluster and torch-sparse",
    "DimeNetPlusPlus": "needs torch-cluster and torch-sparse",
    "GNNFF": "needs torch-cluster and torch-sparse",
    "GPSE": "takes data objects with random features of its own",
    "GPSENodeEncoder": "takes data objects that GPSE has been run on",
    "InnerProductDecoder": "has no weights and sends nothing",
    "LPFormer": "needs personalized PageRank of the graph, made beforehand",
    "Node2Vec": "needs pyg-lib or torch-cluster",
    "RENet": "takes histories of events",
    "TGNMemory": "a state that is read and written, not a function; examples/temporal.py has it",
    "to_captum_input": "a function",
    "to_captum_model": "a function",
    "ViSNet": "needs torch-cluster",
}
