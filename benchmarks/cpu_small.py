"""Small graphs: one molecule that is new in each call, and graphs of a few thousand nodes that stay the same."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from .cpu_calls import Case, measure_cases, molecules, random_graph, section_markdown, targets_of
from .cpu_report import Target
from .peers import peer_settings

CASES = (
    Case("one molecule, new", molecules(1, 25), 32, 64, 3, is_new=True, rounds=700, in_a_row=10),
    Case(
        "Cora's size, same graph",
        random_graph(2_708, 10_556),
        128,
        64,
        2,
        is_new=False,
        rounds=140,
        in_a_row=10,
        least=2.0,
    ),
    Case("20k nodes, 200k edges, same graph", random_graph(20_000, 200_000), 128, 256, 3, is_new=False, rounds=14),
)

NOTES = """\
Calls of packed INT4 models in the default configuration and of their peers in float32, in turn, on one thread: medians
and 99th percentiles of processor time.  A molecule is new in each call: its plan, or what a peer derives from it, is
part of the call.  Elsewhere everything that peers let one compute beforehand was, and compiling is not counted.  Of the
two smallest, ten calls of a side come in a row after one that is not counted, as in a process that runs one model: a
call of a tenth of a millisecond that follows another library's finds the caches empty.
"""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"cases": [case.settings() for case in CASES], "rounds": args.rounds, "peers": peer_settings()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return measure_cases(CASES, args)


def markdown(section: Mapping[str, Any]) -> list[str]:
    return section_markdown("Small graphs", NOTES, section)


def targets(data: Mapping[str, Any]) -> list[Target]:
    return targets_of(CASES, data)
