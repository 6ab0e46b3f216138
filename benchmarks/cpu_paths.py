"""The ways to run one model: PyG's float paths, each on the graph format made for it, and the packed models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import add_self_loops, remove_self_loops

import qgnn_plugin as qgnn
from qgnn_plugin.graph.adjacency import gcn_graph, looped_plan, mean_graph
from qgnn_plugin.kernels.plan import GraphPlan

from .cpu_graphs import power_law
from .stacks import WIDTHS, build_stack

__all__ = ["EDGE_INDEX", "FAST_PATH", "PACKED_GRAPH", "FloatPath", "edge_list", "pyg_paths", "quantized_stack"]

EDGE_INDEX = "PyG edge_index"
SAMPLE_NODES, SAMPLE_EDGES = 2_000, 24_000  # of the graph that ranges are set on where the data do not matter


@dataclass(frozen=True)
class FloatPath:
    """A float model, and what makes the graph argument of this path.

    Args:
        model: The float model.
        convert: From ``edge_index`` [2, E] and the number of nodes.
    """

    model: nn.Module
    convert: Callable[[Tensor, int], Any]


def edge_list(plan: GraphPlan) -> Tensor:
    """``edge_index`` [2, E], sorted by target."""
    return torch.stack([plan.col.long(), plan.dst])


def _csr(edge_index: Tensor, weight: Tensor | None, num_nodes: int, index: torch.dtype) -> Tensor:
    """The transposed adjacency as ``torch.sparse`` CSR."""
    plan = GraphPlan.from_edges(edge_index[0], edge_index[1], num_nodes, num_nodes)
    values = torch.ones(plan.num_edges) if weight is None else plan.sort(weight)
    return torch.sparse_csr_tensor(
        plan.rowptr.to(index), plan.col.to(index), values, (num_nodes, num_nodes), check_invariants=False
    )


def _plain_csr(edge_index: Tensor, num_nodes: int) -> Tensor:
    return _csr(edge_index, None, num_nodes, torch.int64)


def _normalized_csr(edge_index: Tensor, num_nodes: int, index: torch.dtype) -> Tensor:
    looped, weight = gcn_norm(edge_index, None, num_nodes)
    return _csr(looped, weight, num_nodes, index)


def _mean_csr(edge_index: Tensor, num_nodes: int) -> Tensor:
    degree = torch.bincount(edge_index[1], minlength=num_nodes)
    return _csr(edge_index, degree[edge_index[1]].float().reciprocal(), num_nodes, torch.int32)


def _looped(edge_index: Tensor, num_nodes: int) -> Tensor:
    """With the self-loops that GATConv would put in, sorted by target."""
    looped, _ = add_self_loops(remove_self_loops(edge_index)[0], num_nodes=num_nodes)
    return looped[:, looped[1].argsort(stable=True)]


def _looped_csr(edge_index: Tensor, num_nodes: int) -> Tensor:
    return _plain_csr(_looped(edge_index, num_nodes), num_nodes)


def _looped_index(edge_index: Tensor, num_nodes: int) -> EdgeIndex:
    return EdgeIndex(_looped(edge_index, num_nodes), sparse_size=(num_nodes, num_nodes), sort_order="col")


def _as_it_is(edge_index: Tensor, num_nodes: int) -> Tensor:
    return edge_index


class _WeightedStack(nn.Module):
    """A :func:`~benchmarks.stacks.build_stack` on edges with weights."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.convs = stack.convs

    def forward(self, x: Tensor, graph: tuple[Tensor, Tensor]) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x, *graph)
            if i + 1 < len(self.convs):
                x = x.relu()
        return x


def _normalized(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """The edges that GCNConv would make, sorted by target, and their weights."""
    looped, weight = gcn_norm(edge_index, None, num_nodes)
    order = looped[1].argsort(stable=True)
    return looped[:, order], weight[order]


def pyg_paths(name: str, widths: Sequence[int] = WIDTHS) -> dict[str, FloatPath]:
    """PyG's paths of a :func:`~benchmarks.stacks.build_stack` by label, all with the same weights.

    The other formats are given everything that can be computed beforehand: GCN's normalization, the mean's
    1 / degree, GAT's self-loops.
    """
    model = build_stack(name, widths)

    def with_options(**options: Any) -> nn.Module:
        other = build_stack(name, widths, **options)
        other.load_state_dict(model.state_dict())
        return other

    paths = {EDGE_INDEX: FloatPath(model, _as_it_is)}
    if name == "GCN":
        plain = with_options(normalize=False)
        paths["PyG normalized edge_index"] = FloatPath(_WeightedStack(plain), _normalized)
        paths["PyG CSR, int64"] = FloatPath(plain, partial(_normalized_csr, index=torch.int64))
        paths["PyG CSR, int32"] = FloatPath(plain, partial(_normalized_csr, index=torch.int32))
    elif name == "GraphSAGE":
        paths["PyG CSR, mean"] = FloatPath(model, _plain_csr)
        paths["PyG CSR, weighted sum"] = FloatPath(with_options(aggr="sum"), _mean_csr)
    elif name == "GIN":
        paths["PyG CSR"] = FloatPath(model, _plain_csr)
    else:
        looped = with_options(add_self_loops=False)
        paths["PyG sorted edge_index"] = FloatPath(looped, _looped)
        paths["PyG EdgeIndex"] = FloatPath(looped, _looped_index)
        paths["PyG CSR"] = FloatPath(looped, _looped_csr)
    return paths


# The path to measure memory and growth of without trying all of them.
FAST_PATH = {"GCN": "PyG CSR, int32", "GraphSAGE": "PyG CSR, weighted sum", "GAT": "PyG sorted edge_index"}

# What a packed model derives from an edge list, once per graph.
PACKED_GRAPH: dict[str, Callable[[Tensor, int], Any]] = {
    "GCN": lambda edges, nodes: gcn_graph(edges, None, nodes),
    "GraphSAGE": lambda edges, nodes: mean_graph(edges, (nodes, nodes), "source_to_target"),
    "GAT": lambda edges, nodes: looped_plan(edges, (nodes, nodes), "source_to_target"),
}


def quantized_stack(
    name: str, bits: int, widths: Sequence[int] = WIDTHS, data: tuple[Tensor, Tensor] | None = None
) -> nn.Module:
    """The converted model, its ranges set on ``data`` (features, ``edge_index``), by default a small random graph."""
    if data is None:
        plan = power_law(SAMPLE_NODES, SAMPLE_EDGES)
        torch.manual_seed(1)
        data = torch.randn(SAMPLE_NODES, widths[0]), edge_list(plan)
    qmodel = qgnn.quantize_model(build_stack(name, widths), bits=bits)
    return qgnn.calibrate(qmodel, data, method="ranges").eval()
