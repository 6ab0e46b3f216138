"""DGL as a peer: its sums over neighbours and its models, with the weights of PyG's.

It takes part where it can be imported.  DGL declares requirements that today's torch does not meet, so it goes into a
folder of its own, which is put on ``PYTHONPATH``: ``pip install --target FOLDER --no-deps dgl==2.1.0 pandas``.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import add_self_loops, remove_self_loops

from .cpu_paths import FloatPath
from .stacks import WIDTHS, build_stack

__all__ = ["dgl_absence", "dgl_graph", "dgl_paths", "dgl_sum"]

GRAPHBOLT = "dgl.graphbolt"
GCN_LABEL, WEIGHTED_LABEL, LABEL = "DGL, factors of nodes", "DGL, weights of edges", "DGL"


def _stand_in() -> ModuleType:
    """A module whose every public name is an empty class: DGL's loader of samples has a library for each torch up to
    2.2, and takes no part in its models, which only import its names.
    """
    module: Any = ModuleType(GRAPHBOLT)
    module.__path__ = []

    def attribute(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    module.__getattr__ = attribute
    return module


@functools.cache
def _imported() -> tuple[Any, str | None]:
    """The package, and why there is none."""
    os.environ.setdefault("DGLBACKEND", "pytorch")
    present = GRAPHBOLT in sys.modules
    sys.modules.setdefault(GRAPHBOLT, _stand_in())
    try:
        dgl = importlib.import_module("dgl")
        importlib.import_module("dgl.nn.pytorch")
    except Exception as problem:  # whatever keeps a package made for other versions from being imported
        if not present:
            del sys.modules[GRAPHBOLT]
        return None, f"{type(problem).__name__}: {problem}"
    dgl.utils.set_num_threads(torch.get_num_threads())  # which has an OpenMP of its own
    return dgl, None


def dgl_absence() -> str | None:
    """Why DGL takes no part; :obj:`None` where it does."""
    return _imported()[1]


def dgl_version() -> str | None:
    """The version of the DGL that takes part."""
    dgl = _imported()[0]
    return None if dgl is None else str(dgl.__version__)


def dgl_graph(edge_index: Tensor, num_nodes: int) -> Any:
    """The graph with 32-bit indices, sorted by target once."""
    dgl = _imported()[0]
    graph = dgl.graph((edge_index[0].int(), edge_index[1].int()), num_nodes=num_nodes, idtype=torch.int32)
    graph.create_formats_()
    return graph


def dgl_sum(graph: Any, x: Tensor) -> Tensor:
    """Rows of ``x`` summed over the neighbours of each node, by DGL's kernel."""
    return _imported()[0].ops.copy_u_sum(graph, x)


class _FactorConv(nn.Module):
    """``f_i (W sum_j f_j x_j) + b``: GCN's normalization by factors of nodes, so that the sum itself has no weights,
    for which DGL has its fastest kernel.
    """

    def __init__(self, conv: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.conv, self.bias = conv, bias

    def forward(self, graph: Any, x: Tensor) -> Tensor:
        factors = graph.ndata["factor"]
        return torch.addcmul(self.bias, self.conv(graph, x * factors), factors)


class _WeightedConv(nn.Module):
    """``W sum_j w_ij x_j + b`` with the weights of normalized edges."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, graph: Any, x: Tensor) -> Tensor:
        return self.conv(graph, x, edge_weight=graph.edata["weight"])


class _HeadsConv(nn.Module):
    """``GATConv`` with the results of heads side by side."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, graph: Any, x: Tensor) -> Tensor:
        return self.conv(graph, x).flatten(1)


class DglStack(nn.Module):
    """Convolutions of DGL with ReLU between them, as :class:`~benchmarks.stacks.Stack`."""

    def __init__(self, convs: list[nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(graph, x)
            if i + 1 < len(self.convs):
                x = x.relu()
        return x


def _gcn(conv: Any, factors: bool) -> nn.Module:
    options = {"norm": "none", "allow_zero_in_degree": True, "bias": not factors}
    own = _imported()[0].nn.pytorch.GraphConv(conv.in_channels, conv.out_channels, **options)
    own.weight.data = conv.lin.weight.data.t().contiguous()
    if factors:
        return _FactorConv(own, conv.bias.data)
    own.bias.data = conv.bias.data
    return _WeightedConv(own)


def _sage(conv: Any) -> nn.Module:
    own = _imported()[0].nn.pytorch.SAGEConv(conv.in_channels, conv.out_channels, "mean")
    own.fc_neigh.weight.data, own.fc_self.weight.data = conv.lin_l.weight.data, conv.lin_r.weight.data
    own.fc_self.bias.data = conv.lin_l.bias.data
    return own


def _gat(conv: Any) -> nn.Module:
    make = _imported()[0].nn.pytorch.GATConv
    own = make(conv.in_channels, conv.out_channels, conv.heads, negative_slope=conv.negative_slope)
    own.fc.weight.data, own.bias.data = conv.lin.weight.data, conv.bias.data
    own.attn_l.data, own.attn_r.data = conv.att_src.data, conv.att_dst.data
    return _HeadsConv(own)


def _gin(conv: Any) -> nn.Module:
    return _imported()[0].nn.pytorch.GINConv(conv.nn, "sum", init_eps=float(conv.eps))


def _looped(edge_index: Tensor, num_nodes: int) -> Any:
    looped, _ = add_self_loops(remove_self_loops(edge_index)[0], num_nodes=num_nodes)
    return dgl_graph(looped, num_nodes)


def _normalized(edge_index: Tensor, num_nodes: int) -> Any:
    looped, weight = gcn_norm(edge_index, None, num_nodes)
    graph = dgl_graph(looped, num_nodes)
    graph.edata["weight"] = weight
    return graph


def _with_factors(edge_index: Tensor, num_nodes: int) -> Any:
    looped, _ = gcn_norm(edge_index, None, num_nodes)  # puts in the self-loops that are not there
    graph = dgl_graph(looped, num_nodes)
    graph.ndata["factor"] = graph.in_degrees().float().rsqrt().view(-1, 1)
    return graph


def dgl_paths(name: str, widths: Sequence[int] = WIDTHS) -> dict[str, FloatPath]:
    """DGL's own layers by label, with the weights of :func:`~benchmarks.stacks.build_stack`; none where it is absent.

    As PyG's paths they are given what can be computed beforehand: the sorted graph with 32-bit indices, the weights or
    factors of a normalization, self-loops.  ``GraphConv`` and ``SAGEConv`` sum before or after the linear map,
    whichever is narrower.
    """
    if dgl_absence() is not None:
        return {}
    model: Any = build_stack(name, widths)

    def stack(make: Callable[[Any], nn.Module]) -> nn.Module:
        return DglStack([make(conv) for conv in model.convs]).eval()

    if name == "GCN":
        return {
            GCN_LABEL: FloatPath(stack(functools.partial(_gcn, factors=True)), _with_factors),
            WEIGHTED_LABEL: FloatPath(stack(functools.partial(_gcn, factors=False)), _normalized),
        }
    make, convert = {"GraphSAGE": (_sage, dgl_graph), "GAT": (_gat, _looped), "GIN": (_gin, dgl_graph)}[name]
    return {LABEL: FloatPath(stack(make), convert)}
