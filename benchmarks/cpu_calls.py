"""What sections of single calls have in common: sides on small graphs, the same one again or a new one each time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qgnn_plugin as qgnn

from .cpu_paths import EDGE_INDEX, quantized_stack
from .cpu_report import Target, table
from .peers import OVER_PEERS, OVER_PYG, Peers, is_pyg, peer_line, peers_of
from .stacks import MORE_STACKS, STACKS
from .timing import Timing, interleaved, set_threads

__all__ = ["Case", "Graph", "measure_cases", "molecules", "random_graph", "rows_of", "section_markdown", "targets_of"]

BITS = 4
SIDE = f"INT{BITS}"
DIFFERENT = 8  # graphs that calls with a new one go through
TAIL = 0.99
TAIL_OVER_PEERS = f"99 % {OVER_PEERS}"
Graph = tuple[Tensor, Tensor]  # features, edge_index


@dataclass(frozen=True)
class Case:
    """Calls that are timed.

    Args:
        name: What they are of.
        make: A graph with that many features; another one each time.
        features, hidden, layers: Of the models.
        is_new: Whether every call gets a graph that was not seen before, in memory of its own.
        rounds: Calls of each side.
        in_a_row: Of these before it is the next side's turn.
        least: The ratio to the best peer that the median has to reach; the tail has to reach 1.
    """

    name: str
    make: Callable[[int, torch.Generator], Graph]
    features: int
    hidden: int
    layers: int
    is_new: bool
    rounds: int
    in_a_row: int = 1
    least: float = 1.0

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.features, *[self.hidden] * self.layers)

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "make"}


def molecules(count: int, nodes: int) -> Callable[[int, torch.Generator], Graph]:
    """Random trees with two rings of about ``nodes`` nodes, side by side; both directions of every bond."""

    def make(features: int, generator: torch.Generator) -> Graph:
        edges, offset = [], 0
        for _ in range(count):
            size = nodes if count == 1 else int(torch.randint(nodes - 8, nodes + 9, (1,), generator=generator))
            child = torch.arange(1, size)
            parent = (torch.rand(size - 1, generator=generator) * child).long()
            first = torch.cat([child, torch.tensor([0, 3])])
            second = torch.cat([parent, torch.tensor([size - 1, size // 2])])
            edges.append(torch.stack([torch.cat([first, second]), torch.cat([second, first])]) + offset)
            offset += size
        return torch.randn(offset, features, generator=generator), torch.cat(edges, 1)

    return make


def random_graph(nodes: int, edges: int) -> Callable[[int, torch.Generator], Graph]:
    """Ends of edges drawn uniformly, in no order."""

    def make(features: int, generator: torch.Generator) -> Graph:
        x = torch.randn(nodes, features, generator=generator)
        return x, torch.randint(nodes, (2, edges), generator=generator)

    return make


def _sides(
    case: Case, graphs: Sequence[Graph], peers: Peers, packed: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Callable[[], Any]]:
    """The peers and the packed model; conversion counts where every graph is new, and happens before elsewhere."""
    sides: dict[str, Callable[[], Any]] = {}

    def inputs() -> Iterator[Graph]:
        return cycle(graphs if case.is_new else graphs[:1])

    for label, path in peers.paths.items():
        known, given = path.convert(graphs[0][1], graphs[0][0].size(0)), inputs()

        def call(path: Any = path, known: Any = known, given: Iterator[Graph] = given) -> Tensor:
            x, edge_index = next(given)
            return path.model(x, path.convert(edge_index.clone(), x.size(0)) if case.is_new else known)

        sides[label] = call
    given = inputs()

    def call_packed() -> Tensor:
        x, edge_index = next(given)
        return packed(x, edge_index.clone() if case.is_new else edge_index)

    return {**sides, SIDE: call_packed}


def _check(sides: Mapping[str, Callable[[], Any]]) -> None:
    """No timing of a peer that computes something else; caches and allocators settle, and what compiles does."""
    expected = sides[EDGE_INDEX]()
    for label, run in sides.items():
        out = run()
        if label not in (EDGE_INDEX, SIDE):
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def _tail(timing: Timing) -> float:
    return float(np.quantile(list(timing.processor.values()), TAIL))


def rows_of(model: str, case: Case, timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """A row per side, with ratios to the best of PyG and of all peers: processor times, since other work on the machine
    counts not.
    """
    medians = {side: timing.processor_median for side, timing in timings.items()}
    peers = sorted((side for side in timings if side != SIDE), key=medians.__getitem__)
    best, best_pyg = peers[0], next(side for side in peers if is_pyg(side))
    return [
        {
            "case": case.name,
            "model": model,
            "side": side,
            "ms": 1e3 * medians[side],
            "99 % ms": 1e3 * _tail(timing),
            OVER_PEERS: medians[best] / medians[side],
            OVER_PYG: medians[best_pyg] / medians[side],
            TAIL_OVER_PEERS: _tail(timings[best]) / _tail(timing),
            f"over {EDGE_INDEX}": medians[EDGE_INDEX] / medians[side],
        }
        for side, timing in timings.items()
    ]


def measure_cases(cases: Sequence[Case], args: argparse.Namespace) -> dict[str, Any]:
    """Every case of every model, on one thread."""
    set_threads(1)
    rows: list[dict[str, Any]] = []
    absent: dict[str, dict[str, str]] = {}
    with torch.no_grad():
        for case in cases:
            generator = torch.Generator().manual_seed(0)
            graphs = [case.make(case.features, generator) for _ in range(DIFFERENT if case.is_new else 1)]
            for model in (*STACKS, *MORE_STACKS):
                peers = peers_of(model, case.widths, case.is_new)
                absent[case.name] = dict(peers.absent)
                packed = qgnn.pack_model(quantized_stack(model, BITS, case.widths, graphs[0]))
                sides = _sides(case, graphs, peers, packed)
                _check(sides)
                calls = min(case.rounds, args.rounds * case.rounds // 7 or 1)
                rounds = -(-calls // case.in_a_row)
                rows += rows_of(model, case, interleaved(sides, rounds, in_a_row=case.in_a_row))
    return {"rows": rows, "absent": absent}


def section_markdown(title: str, notes: str, section: Mapping[str, Any]) -> list[str]:
    """The section of a report."""
    columns = ("case", "model", "side", "ms", "99 % ms", OVER_PEERS, OVER_PYG, TAIL_OVER_PEERS, f"over {EDGE_INDEX}")
    lines = [f"## {title}", "", notes]
    for case, absent in section["data"].get("absent", {}).items():
        first, *rest = peer_line(section["settings"]["peers"], absent)
        lines += [f"{case}: {first}", *rest]
    return [*lines, *table(columns, section["data"]["rows"])]


def targets_of(cases: Sequence[Case], data: Mapping[str, Any]) -> list[Target]:
    """The median of each case and model, and its tail."""
    found = []
    for case in cases:
        rows = [row for row in data["rows"] if row["case"] == case.name and row["side"] == SIDE]
        for key, least in ((OVER_PEERS, case.least), (TAIL_OVER_PEERS, 1.0)):
            measured = {row["model"]: row[key] for row in rows if key in row}
            found.append(Target(f"{case.name}, {key}", least, measured))
    return found
