"""Every class that ``torch_geometric.nn.conv`` and ``.models`` export: ``make bench-layers``, resumable.

Of each: the path that it takes packed, its error at 8, 4 and 2 bits, and the time and memory that it takes at 4 bits
beside PyG's float, as :mod:`benchmarks.convolutions` measures them.  Each is
kept in ``layers.json`` once it is finished, and the table is written to ``docs/layers_table.md``.

    python -m benchmarks.layers                                     # everything that this code has not measured yet
    python -m benchmarks.layers --missing                           # what no code has
    python -m benchmarks.layers GINEConv LightGCN --fresh           # these, again
    python -m benchmarks.layers --nodes 4000 --edges 40000          # on a smaller graph
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch_geometric.nn.conv
import torch_geometric.nn.models

import qgnn_plugin as qgnn

from .convolution_cases import CASES, LEFT_OUT, Case, Graph
from .convolutions import BITS, EDGES, MEMORY_WIDTH, NODES, ROUNDS, WIDTH, flat, measure, sample
from .environment import code_digest, compact_json, environment, write_atomically
from .model_cases import MODELS, MODELS_LEFT_OUT
from .timing import KEPT_MEMORY

__all__ = ["SECTIONS", "errors", "markdown", "names_of"]

WIDTHS = (8, 4, 2)
MOST_TEXT = 200  # characters of an error
SAME = {"PointConv": "PointNetConv", "ECConv": "NNConv"}
# Of each exported list: its cases, and why the other names have none.
SECTIONS: Mapping[str, tuple[Any, Mapping[str, Case], Mapping[str, str]]] = {
    "Convolutions": (torch_geometric.nn.conv, CASES, LEFT_OUT),
    "Models": (torch_geometric.nn.models, MODELS, MODELS_LEFT_OUT),
}
# Kinds of layers, how many times as fast as float they are to be, and which they are.
AIMS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "Layers of attention": (5, ("TransformerConv", "TransformerConv of edges", "SuperGATConv", "HGTConv")),
    "Layers of relations": (
        3,
        (
            "RGCNConv", "RGCNConv of bases", "RGCNConv of blocks", "FastRGCNConv", "RGATConv", "HGTConv", "HANConv",
            "HEATConv",
        ),
    ),
}  # fmt: skip

NOTES = """\
Written by `python -m benchmarks.layers` (`make bench-layers`). What the columns say:

- **path**: how its layers run packed (see [any message function](any_message.md)), most of all first;
- **error**: `||converted - float|| / ||float||` of what untrained weights compute at 8, 4 and 2 bits for everything,
  with ranges from `calibrate` on a graph of at most 2,000 nodes, and no training. It compares layers with each other;
  what trained models lose is in [results](results.md);
- **speed**: PyG's processor time over the packed model's at 4 bits, on one thread, the median over interleaved rounds;
  above 1 is faster than float. First as the C library is by default, then in a process where it keeps what is freed
  (`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4611686018427387904`), where float layers are fastest:
  by default glibc maps every block of more than 32 MB anew, in some processes and not in others, and a float layer that
  writes a row for each edge then takes two to three times as long, most of it page faults;
- **memory**: growth of peak memory in one call at width {memory_width}, packed / float, in MB.

Convolutions are measured as two of them with ReLU between, models as they are, at width {width} on {nodes:,} nodes and
{edges:,} random edges, given as an `edge_index` without order, the same in every call. Where a float model would not
fit, widths are smaller (FastRGCNConv, NNConv, RGATConv: 32).{smaller}

`MetaPath2Vec` looks up rows of a table, and `MaskLabel` adds some to a copy of what it is given: they compute nothing
that fewer bits would make faster. Where float copies rows the packed model dequantizes them, and their results are
floats; what is saved is the table, which takes an eighth.
"""
HEADER = "| | path | error, 8 / 4 / 2 bits | speed, by default / memory kept | memory |"
SMALLER = (
    f" **This is a smaller graph than the {NODES:,} nodes and {EDGES:,} edges that the command takes by default**: "
    "kernels have less to gain on it, and figures of memory are coarse."
)


def names_of(section: str) -> list[str]:
    """What a module of PyG exports, in its own order."""
    return list(SECTIONS[section][0].__all__)


def variants(section: str, name: str) -> list[str]:
    """The cases of a class: itself, and ``"name of ..."``."""
    return [case for case in SECTIONS[section][1] if case == name or case.startswith(f"{name} of ")]


@torch.no_grad()
def errors(case: Case, graph: Graph, width: int) -> dict[str, float]:
    """``||converted - float|| / ||float||`` by bits, on the graph that ranges are set on."""
    torch.manual_seed(0)
    model, small = case.model(min(width, case.widest), graph), sample(case, graph)
    arguments = case.arguments(small, min(width, case.widest))
    expected, found = flat(model(*arguments)), {}
    for bits in WIDTHS:
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=bits), [arguments], method="ranges").eval()
        found[str(bits)] = float((flat(qmodel(*arguments)) - expected).norm() / expected.norm())
    return found


def _one(name: str, nodes: int, edges: int, rounds: int, only_times: bool = False) -> dict[str, Any]:
    """What was measured of a case, in this process; what failed says so."""
    case = {**CASES, **MODELS}[name]
    try:
        found = asdict(measure(name, BITS, nodes, edges, WIDTH, 0 if only_times else MEMORY_WIDTH, rounds))
        if only_times:
            return found
        return {**found, "errors": errors(case, Graph(nodes, edges), WIDTH)}
    except Exception as error:  # the others go on
        text = " ".join(str(error).split())
        return {"failed": f"{type(error).__name__}: {text}"[:MOST_TEXT]}


def _work(
    names: list[str], options: Mapping[str, Any], variables: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases in a process of their own with one thread and ``variables`` of the environment; after one that ends the
    process, in another.
    """
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    folder = Path(__file__).parent.parent
    left = list(names)
    while left:
        command = [sys.executable, "-m", "benchmarks.layers", "--some", json.dumps([left, options])]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=folder, env={**os.environ, **threads, **variables}
        ) as process:
            for line in process.stdout or ():
                yield left.pop(0), json.loads(line)
        if left and process.returncode:
            yield left.pop(0), {"failed": f"ended its process with {process.returncode}"}


def _cells(found: dict[str, Any]) -> Iterator[str]:
    if "failed" in found:
        yield from (f"failed: {found['failed']}".replace("|", "\\|"), "", "", "")
        return
    yield found["path"].replace("|", "\\|")
    yield " / ".join(f"{found['errors'][str(bits)]:.3f}" for bits in WIDTHS)
    yield f"{found['speed']:.2f} / {found.get('kept_speed', math.nan):.2f}"
    yield f"{found['packed_bytes'] / 1e6:.0f} / {found['float_bytes'] / 1e6:.0f}"


def markdown(cases: Mapping[str, dict[str, Any]], options: Mapping[str, int], code: str = "") -> str:
    """The page: a row for every exported name, by what was measured; rows of other code than ``code`` are named."""
    size = {"nodes": options["nodes"], "edges": options["edges"], "width": WIDTH, "memory_width": MEMORY_WIDTH}
    smaller = options["nodes"] < NODES or options["edges"] < EDGES
    notes = NOTES.format(**size, smaller=SMALLER if smaller else "")
    lines = ["# Every layer of PyG", "", notes]
    for section, (_, _, left_out) in SECTIONS.items():
        lines += [f"## {section}", "", HEADER, "| --- " * 5 + "|"]
        for name in names_of(section):
            for case in variants(section, name):
                cells = _cells(cases[case]) if case in cases else ("not measured yet", "", "", "")
                lines.append("| " + " | ".join((case, *cells)) + " |")
            if name in left_out:
                lines.append(f"| {name} | not measured: {left_out[name]} | | | |")
        lines.append("")
    return "\n".join([*lines, _counts(cases), *_aims(cases), *_of_other_code(cases, code)])


def _counts(cases: Mapping[str, dict[str, Any]]) -> str:
    """How many convolutions take which path, and how many are slower than float or take more than half its memory."""
    done = {name: found for name, found in cases.items() if name in CASES and "failed" not in found}
    ways = ("kernel", "generated kernel", "row blocks", "unblocked")
    text = []
    for way in ways:
        count = sum(found["path"].split(", ")[0].split(":")[0] == way for found in done.values())
        text.append(f"{count} {way}")
    slower = sorted(name for name, found in done.items() if _least_speed(found) < 1)
    heavy = sorted(name for name, found in done.items() if found["packed_bytes"] > 0.5 * max(1, found["float_bytes"]))
    return (
        f"Of {len(done)} convolutions and variants of them, by the first path of each: {', '.join(text)}.\n\n"
        f"Slower than float: {', '.join(slower) or 'none'}.\n\n"
        f"More than half of float's memory: {', '.join(heavy) or 'none'}.\n"
    )


def _least_speed(found: Mapping[str, Any]) -> float:
    """Of the two ways to keep memory."""
    return min(found["speed"], found.get("kept_speed", math.inf))


def _aims(cases: Mapping[str, dict[str, Any]]) -> list[str]:
    """What kinds of layers are to reach, and what they do."""
    lines = []
    for what, (least, names) in AIMS.items():
        found = {name: _least_speed(cases[name]) for name in names if "speed" in cases.get(name, {})}
        if found:
            shown = ", ".join(f"{name} {speed:.1f}" for name, speed in found.items())
            lines.append(f"{what}, which are to be {least} times as fast as float: {shown}.\n")
    return lines


def _of_other_code(cases: Mapping[str, dict[str, Any]], code: str) -> list[str]:
    """What tells the rows that another state of the code has measured."""
    others = sorted(name for name, found in cases.items() if code and found.get("code") != code)
    return [f"Measured on an earlier state of the code: {', '.join(others)}.\n"] if others else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases, all by default")
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--edges", type=int, default=EDGES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--missing", action="store_true", help="leave what was measured on another state of the code")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/layers_table.md"))
    parser.add_argument("--some", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.some:
        warnings.simplefilter("ignore")
        names, options = json.loads(args.some)
        for name in names:
            print(json.dumps(_one(name, **options)), flush=True)
        return
    every = [*CASES, *MODELS]
    unknown = [name for name in args.names if name not in every]
    if unknown:
        parser.error(f"expected names of {', '.join(every)} (got {', '.join(unknown)})")
    options = {"nodes": args.nodes, "edges": args.edges, "rounds": args.rounds}
    earlier = json.loads(args.out.read_text()) if args.out.exists() else {}
    cases = earlier["cases"] if earlier.get("options") == options else {}
    code = code_digest()

    def save() -> None:
        text = {"environment": environment(threads=1), "options": options, "cases": cases}
        write_atomically(args.out, compact_json(text) + "\n")
        write_atomically(args.page, markdown(cases, options, code))

    def is_wanted(name: str) -> bool:
        found = cases.get(name, {"failed": "not measured"})
        if "failed" not in found and "kept_speed" not in found:
            return True
        return args.fresh or "failed" in found or not (args.missing or found.get("code") == code)

    wanted = [name for name in args.names or every if is_wanted(name)]
    lock = Lock()

    def run(names: list[str]) -> None:
        for name, found in _work(names, options, {}):
            with lock:
                cases[name] = {**found, "code": code}
                save()
        names = [name for name in names if "failed" not in cases[name]]
        for name, found in _work(names, {**options, "only_times": True}, KEPT_MEMORY):
            with lock:
                kept = {f"kept_{key}": found[key] for key in ("speed", "float_ms", "packed_ms") if key in found}
                cases[name] |= kept or found
                save()
                print(name, *_cells(cases[name]), sep=" | ", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [wanted[k :: args.jobs] for k in range(args.jobs)]))
    save()


if __name__ == "__main__":
    main()
