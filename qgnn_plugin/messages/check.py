"""Compares a kernel's result with what the layer's own functions give for some rows of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..packing.lazy.columns import Late, waits
from .shadow import NotTraceable, shadow_of

__all__ = ["expect_agreement"]

ROWS = 64  # that are compared, the one of most edges among them
MOST_EDGES = 1 << 14  # of these rows together
TOLERANCE = 1e-4  # of the largest result: sums in another order round otherwise


def expect_agreement(call: Any, found: Tensor, dim: int = 0) -> None:
    """Refuse a result that is not the layer's own, as far as some rows tell.

    Args:
        call: What was computed.
        found: Its result.
        dim: The dimension of nodes in it; those before it are of samples.

    Raises:
        NotTraceable: If it is not.
    """
    rows = _some_rows(call.plan)
    expected = _own_result(call, rows)
    others = (*found.shape[:dim], *found.shape[dim + 1 :])
    if (*expected.shape[:dim], *expected.shape[dim + 1 :]) != others or found.size(dim) != call.plan.num_dst:
        raise NotTraceable("its kernel gives another shape")
    part = found.index_select(dim, rows)
    usual = expected[expected.isfinite()]
    peak = float(usual.abs().max()) if usual.numel() else 0.0
    if not bool(torch.isclose(part, expected, rtol=TOLERANCE, atol=TOLERANCE * peak, equal_nan=True).all()):
        raise NotTraceable("its kernel gives other numbers than the layer")


def _some_rows(plan: Any) -> Tensor:
    """Rows from all over the graph, in order."""
    chosen = torch.linspace(0, plan.num_dst - 1, min(ROWS, plan.num_dst), device=plan.device).long()
    degree = plan.rowptr[1:] - plan.rowptr[:-1]
    chosen = torch.unique(torch.cat([chosen, degree.argmax().view(1)]))
    # From the fewest edges on, so that those of hubs are left out where they are too many.
    order = chosen[degree[chosen].argsort()]
    fits = degree[order].cumsum(0) <= MOST_EDGES
    fits[0] = True
    return order[fits].sort().values


def _own_result(call: Any, rows: Tensor) -> Tensor:
    """What the layer's functions give for some rows, edges in the order of the plan."""
    plan, layer = call.plan, call.layer
    degree = plan.rowptr[rows + 1] - plan.rowptr[rows]
    index = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), degree)
    first = degree.cumsum(0) - degree
    position = torch.arange(index.numel(), device=rows.device) - first[index] + plan.rowptr[rows][index]
    sources, targets, edges = plan.col[position].long(), rows[index], plan.edge_ids[position]
    given: dict[str, Any] = {}
    for name in call.parameters:
        given[name] = _given(call, name, sources, targets, edges, index, rows.numel())
    copy = shadow_of(layer, lambda child: None, {})
    names = {stage: layer.inspector.get_param_names(stage) for stage in call.stages}
    out = copy.message(**{name: given[name] for name in names["message"]})
    return copy.aggregate(out, **{name: given[name] for name in names["aggregate"]})


def _given(
    call: Any, name: str, sources: Tensor, targets: Tensor, edges: Tensor, index: Tensor, num_rows: int
) -> Any:
    plain = {
        "index": index, "edge_index_i": index, "edge_index_j": sources, "dim_size": num_rows, "size_i": num_rows,
        "size_j": call.plan.num_src, "ptr": None, "adj_t": None,
    }  # fmt: skip
    if name in plain:
        return plain[name]
    if name[-2:] in ("_i", "_j"):
        value, nodes = call.end(name), targets if name.endswith("_i") else sources
        if value is None or not (isinstance(value, Tensor) or hasattr(value, "take")):
            return value
        return _rows(value, call.layer.node_dim, nodes) if isinstance(value, Tensor) else value.take(nodes)
    value = call.argument(name)
    return _rows(value, 0, edges) if isinstance(value, Tensor) and call.is_per_edge(value) else value


def _rows(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """Some rows of a tensor, no others of which are computed where it waits."""
    if waits(value) and value.dim() == 2 and dim in (0, -2) and (late := Late.of(value)).producer.taken is not None:
        return late.take(index)
    return value.index_select(dim, index)
