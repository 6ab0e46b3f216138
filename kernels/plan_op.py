"""``qgnn::plan``: the plan of an edge list as an operation, for programs that take their graph as an input.

Exported and compiled programs cannot look a graph up by its memory, and cannot branch on what it holds.  There, the
plan is what an op returns: its tensors depend on the edges alone, so that a program serves every graph.  The op itself
finds the plan of a graph that it has seen before in the cache of plans.

Edges are numbered as the caller lists them; added self-loops follow, node by node.  Of a graph whose own self-loops
take the place of added ones, ``perm`` names the caller's edge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import register_fake
from .plan import GraphPlan, plan_cache

__all__ = ["LOOPS", "inverse_root", "traced_plan"]

LOOPS = ("none", "more", "new", "remaining")

_library = torch.library.Library("qgnn", "FRAGMENT")
_library.define(
    "plan(Tensor src, Tensor dst, SymInt num_src, SymInt num_dst, str loops='none') -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("inverse_root(Tensor degree) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def plan_reference(
    src: Tensor, dst: Tensor, num_src: int, num_dst: int, loops: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """The row pointers, sources and edges of a plan, without a cache."""
    ids = torch.arange(src.numel(), device=src.device)
    if loops == "none":
        plan = GraphPlan.from_edges(src, dst, num_src, num_dst)
    else:
        drops: dict[str, bool] = {"drops_loops": loops != "more", "checks_loops": True}
        plan, dropped = GraphPlan.with_loops(src, dst, num_src, num_dst, **drops)
        added = src.numel() + torch.arange(min(num_src, num_dst), device=src.device)
        if dropped:
            is_loop = src == dst
            own, ids = is_loop.nonzero().view(-1), (~is_loop).nonzero().view(-1)
            if loops == "remaining":
                added[src[own].long()] = own
        ids = torch.cat([ids, added])
    return plan.rowptr, plan.col, ids if plan.perm is None else ids[plan.perm]


def _check(src: Tensor, dst: Tensor, num_src: int, num_dst: int, loops: str = "none") -> None:
    if loops not in LOOPS:
        raise ValueError(f"Expected 'loops' to be one of {LOOPS} (got {loops!r})")
    if src.dim() != 1 or src.shape != dst.shape:
        raise ValueError(f"Expected two vectors of nodes, [E] each (got {list(src.shape)} and {list(dst.shape)})")
    for name, count in (("num_src", num_src), ("num_dst", num_dst)):
        if count < 0:
            raise ValueError(f"Expected '{name}' >= 0 (got {count})")


def _dynamic_size() -> torch.SymInt:
    """A size that depends on what the edges hold, without a graph break in :func:`torch.compile`.

    Without ``fullgraph=True`` compilers break their program at such a size by default
    (``capture_dynamic_output_shape_ops``), since operations around it may have to branch on it: those around a plan do
    not, which is why they compile with ``fullgraph=True`` too.
    """
    context = torch.library.get_ctx()
    environment = getattr(context, "_shape_env", None)
    if environment is None:
        return context.new_dynamic_size()
    size = environment.create_unbacked_symint()
    torch._check(size >= 0)
    return size


def _fake(src: Tensor, dst: Tensor, num_src: int, num_dst: int, loops: str = "none") -> tuple[Tensor, Tensor, Tensor]:
    count: int | torch.SymInt = src.size(0)
    if loops == "more":
        count = count + torch.sym_min(num_src, num_dst)
    elif loops != "none":  # as many as are no self-loops, and one more per node
        count = _dynamic_size()
    return (
        src.new_empty((num_dst + 1,), dtype=torch.int64),
        src.new_empty((count,), dtype=torch.int32),
        src.new_empty((count,), dtype=torch.int64),
    )


def _plan(src: Tensor, dst: Tensor, num_src: int, num_dst: int, loops: str = "none") -> tuple[Tensor, Tensor, Tensor]:
    _check(src, dst, num_src, num_dst, loops)
    key = ("op", num_src, num_dst, loops)
    found = plan_cache.get((src, dst), key, lambda: plan_reference(src, dst, num_src, num_dst, loops))
    # What an op returns may be written over by the program around it.
    return tuple(part.clone() for part in found)


_library.impl("plan", _plan, "CompositeExplicitAutograd")
register_fake("plan", _fake, _library)


def inverse_root_reference(degree: Tensor) -> Tensor:
    factor = degree.pow(-0.5)
    return factor.masked_fill(factor == float("inf"), 0)


def _fake_root(degree: Tensor) -> Tensor:
    return torch.empty_like(degree)


_library.impl("inverse_root", inverse_root_reference, "CompositeExplicitAutograd")
register_fake("inverse_root", _fake_root, _library)


def inverse_root(degree: Tensor) -> Tensor:
    """``degree^(-1/2)``, 0 where there are no edges: in a traced program one op, so that no compiler rounds it anew."""
    traced = torch.compiler.is_compiling() and not degree.requires_grad
    return torch.ops.qgnn.inverse_root(degree) if traced else inverse_root_reference(degree)


def traced_plan(src: Tensor, dst: Tensor, num_src: int, num_dst: int, loops: str = "none") -> GraphPlan:
    """The plan of an edge list as part of a program that is being traced.

    Args:
        src, dst: ``[E]`` integers.
        num_src, num_dst: Number of nodes that send and that receive.
        loops: ``"none"`` for the edges as they are, ``"more"`` for a self-loop per node on top, ``"new"`` for one in
            the place of those that there are, ``"remaining"`` for those there are, completed.

    Returns:
        A plan that always has a ``perm``, whose numbers are those of this module.
    """
    rowptr, col, perm = torch.ops.qgnn.plan(src, dst, num_src, num_dst, loops)
    plan = GraphPlan(rowptr, col, num_src, perm)
    plan.is_traced = True
    return plan
