"""Graphs of the run: sizes, and the forms in which PyG takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.triton.autotune import power_law_plan

__all__ = ["adjacency", "edge_index_of", "generated", "rows_of"]

SIZES = {"170k/2M": (170_000, 2_000_000), "2M/100M": (2_000_000, 100_000_000)}
TINY = {"170k/2M": (24, 60), "2M/100M": (40, 160)}


def generated(size: str, device: torch.device, dry: bool) -> GraphPlan:
    """A power-law graph of that size; of a dry run a tiny one."""
    return power_law_plan(*(TINY if dry else SIZES)[size], device)


def edge_index_of(plan: GraphPlan) -> Tensor:
    """The graph as PyG's ``edge_index``."""
    return torch.stack([plan.col.long(), plan.dst])


def adjacency(plan: GraphPlan, dtype: torch.dtype = torch.float32, index: torch.dtype = torch.int64) -> Tensor:
    """The graph as a ``torch.sparse`` CSR matrix of ones."""
    value = torch.ones(plan.num_edges, dtype=dtype, device=plan.device)
    return torch.sparse_csr_tensor(plan.rowptr.to(index), plan.col.to(index), value, (plan.num_dst, plan.num_src))


def rows_of(plan: GraphPlan, rows: Tensor) -> GraphPlan:
    """The plan of these destinations alone; sources keep their numbers."""
    degree = plan.rowptr[rows + 1] - plan.rowptr[rows]
    rowptr = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=plan.device)
    torch.cumsum(degree, 0, out=rowptr[1:])
    place = torch.arange(int(rowptr[-1]), device=plan.device)
    place = place - torch.repeat_interleave(rowptr[:-1] - plan.rowptr[rows], degree)
    return GraphPlan(rowptr, plan.col[place], plan.num_src)
