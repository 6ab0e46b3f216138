"""Edges in the order of a plan: by destination, those into one node as the caller has them, added self-loops last."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import has_numba
from ..indices import remember_csr

__all__ = [
    "EdgeOrder",
    "check_nodes",
    "inverse_degree",
    "inverse_root_degree",
    "order_edges",
    "order_edges_reference",
]

FOUND = 8  # what counting finds (:mod:`.cpu`)
LOW_SRC, HIGH_SRC, LOW_DST, HIGH_DST, IS_SORTED, LOOPS, LAST = range(7)


class EdgeOrder(NamedTuple):
    """CSR by destination.

    Args:
        rowptr: ``[num_dst + 1]`` int64.
        col: ``[E]`` int32, the source of each edge; shares no memory with the caller's.
        perm: ``[E]`` int64, the number of each edge among those taken and then those added, :obj:`None` where these are
            in order already.
        dropped: Whether self-loops of the caller's were left out.
    """

    rowptr: Tensor
    col: Tensor
    perm: Tensor | None
    dropped: bool


def check_nodes(
    index: Tensor, size: int, what: str, remedy: str = "check that 'edge_index' belongs to this feature matrix"
) -> None:
    """Refuse what does not number ``size`` nodes; once per plan, since it waits for the device.

    Raises:
        TypeError: If ``index`` holds no integers.
        ValueError: If one is outside ``[0, size)``.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"Expected {what} as integers (got {index.dtype}); convert them with '.long()'")
    if index.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(index)).tolist()
    if low < 0 or high >= size:
        raise ValueError(f"Expected {what} in the interval [0, {size}) (got {low} to {high}); {remedy}")


def order_edges_reference(
    src: Tensor,
    dst: Tensor,
    num_src: int,
    num_dst: int,
    *,
    added: int = 0,
    drops_loops: bool = False,
    checks_loops: bool = False,
) -> EdgeOrder:
    """:func:`order_edges` by torch's operations, on every device."""
    dropped = False
    if drops_loops:
        is_loop = src == dst
        dropped = bool(is_loop.any())
        if checks_loops:
            check_nodes(src, num_src, "source nodes")
        if dropped:
            src, dst = src[~is_loop], dst[~is_loop]
    check_nodes(src, num_src, "source nodes")
    check_nodes(dst, num_dst, "destination nodes")
    if added:
        nodes = torch.arange(added, device=src.device)
        src, dst = torch.cat([src, nodes]), torch.cat([dst, nodes])
    counts = torch.bincount(dst, minlength=num_dst)
    rowptr = torch.zeros(num_dst + 1, dtype=torch.int64, device=dst.device)
    torch.cumsum(counts, 0, out=rowptr[1:])
    if bool((dst[1:] >= dst[:-1]).all()):
        return EdgeOrder(rowptr, src.to(torch.int32, copy=True), None, dropped)
    perm = torch.argsort(dst, stable=True)
    return EdgeOrder(rowptr, src[perm].to(torch.int32), perm, dropped)


@cache
def _compiled() -> Any:
    """The compiled passes for memory of the CPU; :obj:`None` without numba."""
    return importlib.import_module(f"{__package__}.cpu") if has_numba() else None


def order_edges(
    src: Tensor,
    dst: Tensor,
    num_src: int,
    num_dst: int,
    *,
    added: int = 0,
    drops_loops: bool = False,
    checks_loops: bool = False,
) -> EdgeOrder:
    """Sort edges ``[E]`` by destination; stable, hence deterministic.

    Args:
        src, dst: Their nodes, of one device.
        num_src, num_dst: How many nodes there are.
        added: How many nodes, from the first on, get a self-loop; at most ``num_src`` and ``num_dst``.
        drops_loops: Whether the caller's own self-loops are left out.
        checks_loops: Whether the nodes of those have to exist, too.

    Raises:
        TypeError: If these are no integers.
        ValueError: If there are nodes that do not exist.
    """
    loops: Any = {"added": added, "drops_loops": drops_loops, "checks_loops": checks_loops}
    counting = _compiled() if _is_plain(src) and _is_plain(dst) and src.shape == dst.shape else None
    if counting is None:
        return order_edges_reference(src, dst, num_src, num_dst, **loops)
    src, dst = src.to(torch.int64).contiguous(), dst.to(torch.int64).contiguous()
    num_edges, source, target = src.numel(), src.data_ptr(), dst.data_ptr()
    rowptr, found = torch.empty(num_dst + 1, dtype=torch.int64), torch.empty(FOUND, dtype=torch.int64)
    counting.count_edges(
        source, target, num_edges, num_src, num_dst, int(drops_loops), int(checks_loops), rowptr.data_ptr(),
        found.data_ptr(),
    )  # fmt: skip
    facts = found.tolist()
    taken = num_edges - facts[LOOPS]
    # Where there is none, the lowest is the number of nodes, and the highest -1.
    if facts[LOW_SRC] < 0 or facts[HIGH_SRC] >= num_src or facts[LOW_DST] < 0 or facts[HIGH_DST] >= num_dst:
        return order_edges_reference(src, dst, num_src, num_dst, **loops)  # which refuses them
    col = torch.empty(taken + added, dtype=torch.int32)
    in_order = facts[IS_SORTED] and not (taken and added and facts[LAST] > 0)
    perm = None if in_order else torch.empty(taken + added, dtype=torch.int64)
    counting.place_edges(
        source, target, num_edges, num_dst, int(drops_loops), added, rowptr.data_ptr(), col.data_ptr(),
        0 if perm is None else perm.data_ptr(), int(perm is not None),
    )  # fmt: skip
    remember_csr(rowptr, col, max(facts[HIGH_SRC], added - 1) if taken + added else -1)
    return EdgeOrder(rowptr, col, perm, facts[LOOPS] > 0)


def _is_plain(nodes: Tensor) -> bool:
    """Whether compiled code may read ``nodes`` where they are; others go the long way, which has the errors."""
    return (
        type(nodes) is Tensor
        and nodes.is_cpu
        and nodes.dim() == 1
        and nodes.dtype in (torch.int64, torch.int32)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(nodes)  # of torch.func: without memory of its own
    )


def inverse_degree(rowptr: Tensor) -> Tensor:
    """``1 / max(d, 1)`` of the number of edges ``d`` into each node, ``[num_dst]`` float32."""
    found = _factors(rowptr, is_root=False)
    return 1 / _degree(rowptr).clamp_min(1) if found is None else found


def inverse_root_degree(rowptr: Tensor) -> Tensor:
    """``d^-1/2`` of the number of edges ``d`` into each node, 0 where there is none, ``[num_dst]`` float32."""
    found = _factors(rowptr, is_root=True)
    if found is not None:
        return found
    factor = _degree(rowptr).pow(-0.5)
    return factor.masked_fill(factor == float("inf"), 0)


def _degree(rowptr: Tensor) -> Tensor:
    return (rowptr[1:] - rowptr[:-1]).to(torch.float32)


def _factors(rowptr: Tensor, is_root: bool) -> Tensor | None:
    """The same, compiled; :obj:`None` where that cannot be."""
    counting = _compiled() if _is_plain(rowptr) and rowptr.is_contiguous() else None
    if counting is None or rowptr.dtype is not torch.int64:
        return None
    out = torch.empty(rowptr.numel() - 1, dtype=torch.float32)
    counting.degree_factors(rowptr.data_ptr(), out.numel(), int(is_root), out.data_ptr())
    return out
