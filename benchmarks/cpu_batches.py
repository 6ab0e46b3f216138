"""Batches: 128 molecules side by side and sampled neighbourhoods, both new in each call."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from .cpu_calls import Case, measure_cases, molecules, random_graph, section_markdown, targets_of
from .cpu_report import Target
from .peers import peer_settings

CASES = (
    Case("128 molecules, new", molecules(128, 25), 32, 64, 3, is_new=True, rounds=140, in_a_row=10),
    Case("15k nodes, 30k edges, new", random_graph(15_000, 30_000), 128, 256, 2, is_new=True, rounds=28, least=3.0),
)

NOTES = """\
As in the section on small graphs: every call gets a graph that was not seen before, as from a loader, and what is
derived from it is part of the call, for PyG's sparse paths and DGL as for packed models.  Of molecules, ten calls of a
side come in a row after one that is not counted.
"""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"cases": [case.settings() for case in CASES], "rounds": args.rounds, "peers": peer_settings()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return measure_cases(CASES, args)


def markdown(section: Mapping[str, Any]) -> list[str]:
    return section_markdown("Batches", NOTES, section)


def targets(data: Mapping[str, Any]) -> list[Target]:
    return targets_of(CASES, data)
