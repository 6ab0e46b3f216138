r"""Messages by blocks of whole destination rows: any layer's own functions, without a tensor per edge of all edges.

What a layer does between nodes is a function of what each edge sees, and a reduction of a node's edges.  A block of
rows with all their edges is therefore a small graph of its own: its sources are gathered from packed rows and
dequantized, indices are renumbered to it, and ``message`` and ``aggregate`` run as they are.  Softmax and every other
function of ``index`` stays right, since rows are whole and their edges keep their order.

Layers that break the contract, such as one that takes a mean over all edges, are found out before they are run by
blocks: :func:`check_rows` computes a few made-up rows together and apart, and compares.
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
from torch_geometric.nn.aggr import Aggregation, GRUAggregation, LCMAggregation, LSTMAggregation

from ..lazy import sizes
from ..lazy.columns import Late, waits
from ..lazy.of_nodes import FEWEST_EDGES, OfNodes
from .call import SPECIAL, NotByRows, Propagation
from .nodes import PackedNodes, is_features

__all__ = ["RowBlocks", "check_rows", "run_by_rows", "run_edges_by_rows"]

SAMPLE_DEGREES = (1, 3, 0, 7, 2, 0, 24, 5, 1, 40, 0, 13)  # of the made-up rows
TOLERANCE = 1e-4  # of the largest result: functions of blocks may round otherwise

# Sequences of neighbours are padded to the longest of all rows, and the padding counts.
_PADDED = (LSTMAggregation, GRUAggregation, LCMAggregation)


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


class _Runner:
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
    runner, results, kept = _Runner(call, OfNodes()), _Rows(call), _Kept(call, blocks.kept)
    with _not_alone(runner):
        for rows, edges in _blocks(call, blocks.edges_per_block()):
            results.put(rows, edges, runner(edges))
            kept.put(edges, runner.written())
    kept.hand_over()
    return results.result


def run_edges_by_rows(call: Propagation, blocks: RowBlocks) -> Any:
    """What ``edge_update`` would return for all edges, in the caller's order."""
    runner, results = _Runner(call, OfNodes()), _PerEdge(call)
    with _not_alone(runner):
        for _, edges in _blocks(call, blocks.edges_per_block()):
            results.put(edges, runner(edges))
            if runner.written():
                raise NotByRows("its edge_update writes to the layer")
    return results.result


@contextmanager
def _not_alone(runner: _Runner) -> Iterator[None]:
    """Turn what a user's functions raise of a few edges into a reason to run them on all, and tidy up after them."""
    try:
        yield
    except NotByRows:
        raise
    except Exception as error:
        raise NotByRows(f"its functions do not take some edges alone ({type(error).__name__})") from error
    finally:
        runner.written()


def _parts(value: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
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
        parts, self.make = _parts(out)
        if not self.outs:
            self.outs = [self._new(part, edges) for part in parts]
        for whole, part in zip(self.outs, parts, strict=True):
            dim = _row_dim(self.call, part, edges.num_rows)
            whole.narrow(dim, rows.start, edges.num_rows).copy_(part)

    def _new(self, part: Tensor, edges: Edges) -> Tensor:
        dim = _row_dim(self.call, part, edges.num_rows)
        return part.new_empty((*part.shape[:dim], self.call.num_dst, *part.shape[dim + 1 :]))

    @property
    def result(self) -> Any:
        return self.make(self.outs)


def _row_dim(call: Propagation, part: Tensor, num_rows: int) -> int:
    dim: int = call.layer.node_dim
    dim = dim + part.dim() if dim < 0 else dim
    if not 0 <= dim < part.dim() or part.size(dim) != num_rows:
        raise NotByRows("its aggregation does not give one row per node")
    return dim


class _PerEdge:
    """Values of blocks, one entry per edge, as one tensor in the caller's order."""

    def __init__(self, call: Propagation) -> None:
        self.call, self.outs = call, list[Tensor]()
        self.make: Any = None

    def put(self, edges: Edges, out: Any) -> None:
        parts, self.make = _parts(out)
        if any(part.dim() == 0 or part.size(0) != edges.count for part in parts):
            raise NotByRows("its functions do not give one entry per edge")
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


# Whether blocks are allowed ###########################################################################################


def check_rows(call: Propagation) -> RowBlocks:
    """How the calls of this form are cut, after a look at whether the layer's functions treat every row for itself.

    A few of the call's edges are given to made-up rows of very different degrees, and computed together and apart.

    Raises:
        NotByRows: If that makes a difference.
    """
    for module in call.layer.modules() if "aggregate" in call.stages else ():
        if isinstance(module, _PADDED) and isinstance(module, Aggregation):
            raise NotByRows(f"{type(module).__name__} pads the neighbours of a node to those of all nodes")
    whole = _sample(call)
    cut = len(SAMPLE_DEGREES) // 2
    runner = _Runner(call)
    with _not_alone(runner):
        together = runner(whole)
        written = runner.written()
        apart = [runner(part) for part in _split(whole, cut)]
    for name, value in written.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != whole.count:
            raise NotByRows(f"its functions write '{name}', which is not one entry per edge")
    _compare(call, whole, together, apart, cut)
    return RowBlocks(max(widest(call), runner.width), tuple(written))


def _sample(call: Propagation) -> Edges:
    """Edges from all over the graph as those of a few rows."""
    plan = call.plan
    degrees = torch.tensor(SAMPLE_DEGREES, device=plan.device)
    count = int(degrees.sum())
    positions = torch.linspace(0, plan.num_edges - 1, count, device=plan.device).long()
    index = torch.repeat_interleave(torch.arange(degrees.numel(), device=plan.device), degrees)
    return Edges(positions, plan.col[positions].long(), plan.dst[positions], index, degrees.numel())


def _split(whole: Edges, cut: int) -> list[Edges]:
    """The first ``cut`` rows, and the others."""
    assert isinstance(whole.positions, Tensor)
    first = whole.index < cut
    parts = []
    for mask, start, rows in ((first, 0, cut), (~first, cut, whole.num_rows - cut)):
        parts.append(
            Edges(
                whole.positions[mask], whole.sources[mask], whole.targets[mask], whole.index[mask] - start, rows
            )
        )  # fmt: skip
    return parts


def _compare(call: Propagation, whole: Edges, together: Any, apart: list[Any], cut: int) -> None:
    by_rows = "aggregate" in call.stages
    first = cut if by_rows else int((whole.index < cut).sum())
    halves = [first, (whole.num_rows if by_rows else whole.count) - first]
    parts, _ = _parts(together)
    others = [_parts(out)[0] for out in apart]
    for k, value in enumerate(parts):
        if by_rows:
            dim = _row_dim(call, value, whole.num_rows)
        elif value.dim() == 0 or value.size(0) != whole.count:
            raise NotByRows("its functions do not give one entry per edge")
        else:
            dim = 0
        for part, expected in zip(others, value.split(halves, dim), strict=True):
            if not _agree(part[k], expected):
                raise NotByRows("its functions look across rows")


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    usual = expected[expected.isfinite()]
    peak = float(usual.abs().max()) if usual.numel() else 0.0
    return bool(torch.isclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * peak, equal_nan=True).all())
