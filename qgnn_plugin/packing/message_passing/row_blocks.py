r"""Messages by blocks of whole destination rows: any layer's own functions, without a tensor per edge of all edges.

What a layer does between nodes is a function of what each edge sees, and a reduction of a node's edges.  A block of
rows with all their edges is therefore a small graph of its own: its sources are gathered from packed rows and
dequantized, indices are renumbered to it, and ``message`` and ``aggregate`` run as they are.  Softmax and every other
function of ``index`` stays right, since rows are whole and their edges keep their order.

Layers that break the contract, such as one that takes a mean over all edges, are found out before they are run by
blocks (:mod:`.row_checks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..lazy import sizes
from ..lazy.columns import Late, waits
from ..lazy.of_nodes import FEWEST_EDGES, OfNodes
from .call import SPECIAL, NotByRows, Propagation
from .nodes import PackedNodes, is_features

__all__ = [
    "Edges",
    "RowBlocks",
    "Runner",
    "expect_per_edge",
    "is_one_block",
    "not_alone",
    "parts_of",
    "row_dim",
    "run_by_rows",
    "run_edges_by_rows",
    "widest",
]


@dataclass
class Edges:
    """Some edges, by whole rows: what the layer's functions are called with.

    Args:
        positions: Of the edges in the plan: a slice, or numbers.
        sources: ``[e]`` int64.
        targets: ``[e]`` int64, of all targets.
        index: ``[e]`` int64, row of each edge in the block.
        num_rows: Rows of the block.
    """

    positions: slice | Tensor
    sources: Tensor
    targets: Tensor
    index: Tensor
    num_rows: int

    @property
    def count(self) -> int:
        return self.sources.numel()


@dataclass
class RowBlocks:
    """How a layer's calls of one form are cut.

    Args:
        width: Numbers per edge in the widest argument or message.
        kept: Names of the attributes that its functions write, one entry per edge each.
    """

    width: int
    kept: tuple[str, ...] = ()

    def edges_per_block(self) -> int:
        floats = sizes.EDGE_BLOCK_FLOATS * torch.get_num_threads()
        return max(sizes.FEWEST_EDGES, min(sizes.MOST_EDGES, floats // max(1, self.width)))


def is_one_block(call: Propagation, width: int) -> bool:
    """Whether all edges fit one block, so that there is nothing to cut."""
    return call.num_edges <= RowBlocks(width).edges_per_block()


def widest(call: Propagation) -> int:
    """Numbers per edge in the widest argument."""
    most = 1
    for name in call.parameters:
        if name in SPECIAL:
            continue
        value = call.end(name) if name[-2:] in ("_i", "_j") else call.arguments.get(name)
        if isinstance(value, PackedNodes):
            most = max(most, value.num_samples * value.packed.num_features)
        elif isinstance(value, Tensor) and value.dim() and name[-2:] in ("_i", "_j"):
            most = max(most, value.numel() // max(1, value.size(call.layer.node_dim)))
        elif isinstance(value, Tensor) and call.is_per_edge(value):
            most = max(most, math.prod(value.shape[1:]))
    return most


# Blocks ###############################################################################################################


def _blocks(call: Propagation, edges: int) -> Iterator[tuple[slice, Edges]]:
    """Blocks of about ``edges`` edges, and their rows; none without an edge."""
    plan = call.plan
    goals = torch.arange(edges, plan.num_edges, edges, device=plan.device)
    ends = plan.rowptr[torch.searchsorted(plan.rowptr, goals, right=True)]
    # No block begins with a row without edges, which some aggregations take at the end of their input alone.
    rows = torch.unique(torch.searchsorted(plan.rowptr, ends, right=True) - 1)
    bounds = [0, *rows.tolist(), plan.num_dst]
    firsts = plan.rowptr[torch.tensor(bounds, device=plan.device)].tolist()
    kept = [0]
    for k in range(1, len(bounds) - 1):
        if firsts[kept[-1]] < firsts[k] < plan.num_edges:
            kept.append(k)
    kept.append(len(bounds) - 1)
    dst, col = plan.dst, plan.col
    for a, b in pairwise(kept):
        rows, positions = slice(bounds[a], bounds[b]), slice(firsts[a], firsts[b])
        targets = dst[positions]
        yield rows, Edges(positions, col[positions].long(), targets, targets - rows.start, rows.stop - rows.start)


class Runner:
    """A layer's functions on edges; what they write to the layer is seen, and taken back."""

    def __init__(self, call: Propagation, of_nodes: OfNodes | None = None) -> None:
        self.call, self.of_nodes = call, of_nodes
        self.before = dict(call.layer.__dict__)
        get = call.layer.inspector.get_param_names
        self.names = {stage: list(get(stage)) for stage in call.stages}

    def __call__(self, edges: Edges) -> Any:
        if self.of_nodes is None:
            return self._run(edges)
        with self.of_nodes.block():
            return self._run(edges)

    def _run(self, edges: Edges) -> Any:
        given = {name: self._given(name, edges) for names in self.names.values() for name in names}
        out: Any = None
        for k, stage in enumerate(self.call.stages):
            arguments = {name: given[name] for name in self.names[stage]}
            out = getattr(self.call.layer, stage)(*(() if k == 0 else (out,)), **arguments)
            if k == 0:
                self.width = _width(out, edges.count)
        return out

    def _given(self, name: str, edges: Edges) -> Any:
        call = self.call
        if name in SPECIAL:
            return self._special(name, edges)
        if name[-2:] in ("_i", "_j"):
            value, nodes = call.end(name), edges.targets if name.endswith("_i") else edges.sources
            if not is_features(value):
                return None
            dim = call.layer.node_dim
            rows = value.take(nodes) if isinstance(value, PackedNodes) else value.index_select(dim, nodes)
            return rows if self.of_nodes is None else self._of_nodes(name, value, rows, nodes)
        value = call.argument(name)
        if not call.is_per_edge(value):
            if isinstance(value, PackedNodes) or (isinstance(value, (tuple, list)) and any(map(is_features, value))):
                raise NotByRows(f"its functions read '{name}' of all nodes")
            if name not in call.arguments and value is call.parameters[name] and isinstance(value, type):
                raise NotByRows(f"'{name}' is not given")
            return value
        if waits(value) and value.dim() == 2 and (late := Late.of(value)).producer.taken is not None:
            return late.take(call.plan.edge_ids[edges.positions])
        ordered = call.per_edge(name)
        assert ordered is not None
        return ordered[edges.positions]

    def _of_nodes(self, name: str, value: Any, rows: Tensor, nodes: Tensor) -> Tensor:
        """``rows`` of features, noted as those of ``nodes`` where there are many more edges than nodes."""
        assert self.of_nodes is not None
        dim = self.call.layer.node_dim
        if dim % rows.dim() != 0 or self.call.num_edges < FEWEST_EDGES * value.size(0):
            return rows
        # Both sides of the same features are mapped once.
        side = f"features {id(value)}"
        return self.of_nodes.take(side, value.values if isinstance(value, PackedNodes) else lambda: value, rows, nodes)

    def _special(self, name: str, edges: Edges) -> Any:
        i, j = self.call.ends
        if name in ("index", "edge_index_i"):
            return edges.index
        if name == "edge_index_j":
            return edges.sources
        if name in ("dim_size", "size_i"):
            return edges.num_rows
        if name == "size_j":
            return self.call.num_src
        if name == "size":
            size: list[int] = [0, 0]
            size[i], size[j] = edges.num_rows, self.call.num_src
            return size
        if name == "edge_index":
            pair = [edges.index, edges.index]
            pair[j] = edges.sources
            return torch.stack(pair)
        return None  # 'ptr' and 'adj_t', as of a list of edges

    def written(self) -> dict[str, Any]:
        """What the functions have written to the layer since the last call; it is as it was after this."""
        now = self.call.layer.__dict__
        found = {name: value for name, value in now.items() if self.before.get(name, _NOTHING) is not value}
        for name in found:
            now.pop(name)
            if name in self.before:
                now[name] = self.before[name]
        return found


_NOTHING = object()


def _width(out: Any, count: int) -> int:
    """Numbers per edge in what ``message`` returns."""
    parts = out if isinstance(out, (tuple, list)) else (out,)
    return sum(part.numel() for part in parts if isinstance(part, Tensor)) // max(1, count)


def run_by_rows(call: Propagation, blocks: RowBlocks) -> Any:
    """What ``aggregate`` would return for all rows."""
    runner, results, kept = Runner(call, OfNodes()), _Rows(call), _Kept(call, blocks.kept)
    with not_alone(runner):
        for rows, edges in _blocks(call, blocks.edges_per_block()):
            results.put(rows, edges, runner(edges))
            kept.put(edges, runner.written())
    kept.hand_over()
    return results.result


def run_edges_by_rows(call: Propagation, blocks: RowBlocks) -> Any:
    """What ``edge_update`` would return for all edges, in the caller's order."""
    runner, results = Runner(call, OfNodes()), _PerEdge(call)
    with not_alone(runner):
        for _, edges in _blocks(call, blocks.edges_per_block()):
            results.put(edges, runner(edges))
            if runner.written():
                raise NotByRows("its edge_update writes to the layer")
    return results.result


@contextmanager
def not_alone(runner: Runner) -> Iterator[None]:
    """Turn what a user's functions raise of a few edges into a reason to run them on all, and tidy up after them."""
    try:
        yield
    except NotByRows:
        raise
    except Exception as error:
        raise NotByRows(f"its functions do not take some edges alone ({type(error).__name__})") from error
    finally:
        runner.written()


def parts_of(value: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a result, and how they make one again."""
    if isinstance(value, Tensor):
        return [value], lambda parts: parts[0]
    if isinstance(value, (tuple, list)) and value and all(isinstance(part, Tensor) for part in value):
        make: Any = getattr(type(value), "_make", type(value))  # of a named tuple
        return list(value), lambda parts: make(parts)
    raise NotByRows(f"its functions return a {type(value).__name__}")


class _Rows:
    """Results of blocks as one result of all rows."""

    def __init__(self, call: Propagation) -> None:
        self.call, self.outs = call, list[Tensor]()
        self.make: Any = None

    def put(self, rows: slice, edges: Edges, out: Any) -> None:
        parts, self.make = parts_of(out)
        if not self.outs:
            self.outs = [self._new(part, edges) for part in parts]
        for whole, part in zip(self.outs, parts, strict=True):
            dim = row_dim(self.call, part, edges.num_rows)
            whole.narrow(dim, rows.start, edges.num_rows).copy_(part)

    def _new(self, part: Tensor, edges: Edges) -> Tensor:
        dim = row_dim(self.call, part, edges.num_rows)
        return part.new_empty((*part.shape[:dim], self.call.num_dst, *part.shape[dim + 1 :]))

    @property
    def result(self) -> Any:
        return self.make(self.outs)


def row_dim(call: Propagation, part: Tensor, num_rows: int) -> int:
    dim: int = call.layer.node_dim
    dim = dim + part.dim() if dim < 0 else dim
    if not 0 <= dim < part.dim() or part.size(dim) != num_rows:
        raise NotByRows("its aggregation does not give one row per node")
    return dim


def expect_per_edge(parts: list[Tensor], count: int) -> None:
    """Raise where one of the results of ``count`` edges does not have an entry for each."""
    if any(part.dim() == 0 or part.size(0) != count for part in parts):
        raise NotByRows("its functions do not give one entry per edge")


class _PerEdge:
    """Values of blocks, one entry per edge, as one tensor in the caller's order."""

    def __init__(self, call: Propagation) -> None:
        self.call, self.outs = call, list[Tensor]()
        self.make: Any = None

    def put(self, edges: Edges, out: Any) -> None:
        parts, self.make = parts_of(out)
        expect_per_edge(parts, edges.count)
        if not self.outs:
            self.outs = [part.new_empty((self.call.num_edges, *part.shape[1:])) for part in parts]
        perm, at = self.call.plan.perm, edges.positions
        for whole, part in zip(self.outs, parts, strict=True):
            if perm is None:
                whole[at] = part
            else:
                whole.index_copy_(0, perm[at], part)

    @property
    def result(self) -> Any:
        return self.make(self.outs)


class _Kept:
    """What a layer's functions write to it, such as the attention of all edges."""

    def __init__(self, call: Propagation, names: tuple[str, ...]) -> None:
        self.layer, self.parts = call.layer, {name: _PerEdge(call) for name in names}

    def put(self, edges: Edges, written: dict[str, Any]) -> None:
        if written.keys() != self.parts.keys():
            raise NotByRows(f"its functions write {', '.join(sorted(written.keys() ^ self.parts.keys()))} at times")
        for name, value in written.items():
            self.parts[name].put(edges, value)

    def hand_over(self) -> None:
        for name, parts in self.parts.items():
            setattr(self.layer, name, parts.result)
