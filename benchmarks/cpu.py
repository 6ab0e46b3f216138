"""CPU benchmark, ``make bench-cpu``: kernels, inference, small graphs, batches, memory, files, growth, recall, search.

All sides of a comparison are interleaved in one run.  Each section is written to ``cpu.json`` and ``cpu.md`` when it is
finished and kept by later runs with the same machine, versions, code and settings.  Real graphs are read from files:
``--csr ego-Twitter=PATH.npz`` with arrays ``rowptr`` and ``col``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from . import (
    cpu_batches,
    cpu_files,
    cpu_growth,
    cpu_inference,
    cpu_kernels,
    cpu_memory,
    cpu_recall,
    cpu_search,
    cpu_small,
)
from .cpu_report import target_table
from .environment import code_digest, compact_json, environment, write_atomically
from .stacks import WIDTHS
from .timing import keeps_memory

RESULTS = Path(__file__).parent / "results"
NODES, EDGES = 170_000, 2_000_000
GROWTH_SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000)

# Each has settings(args), measure(args), markdown(section) and targets(data).
SECTIONS: dict[str, ModuleType] = {
    "kernels": cpu_kernels,
    "inference": cpu_inference,
    "small": cpu_small,
    "batches": cpu_batches,
    "memory": cpu_memory,
    "files": cpu_files,
    "growth": cpu_growth,
    "recall": cpu_recall,
    "search": cpu_search,
}


def markdown(document: dict[str, Any]) -> str:
    """The report of the sections that are there: targets first, then every section's tables."""
    finished = {name: document[name] for name in SECTIONS if name in document}
    targets = [target for name, section in finished.items() for target in SECTIONS[name].targets(section["data"])]
    lines = ["# CPU benchmark", ""]
    machines: dict[str, list[str]] = {}
    for name, section in finished.items():
        machines.setdefault(_machine_line(section["environment"]), []).append(name)
    for line, own in machines.items():
        lines += [line if len(machines) == 1 else f"{', '.join(own)}: {line}", ""]
    met = sum(target.is_met for target in targets)
    lines += [f"{met} of {len(targets)} targets met.", "", *target_table(targets)]
    for name, section in finished.items():
        lines += SECTIONS[name].markdown(section)
    taken = ", ".join(f"{name} {section['seconds']:.0f} s" for name, section in finished.items())
    return "\n".join([*lines, f"Measuring took: {taken}.", ""])


def _machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    kept = "; the C library keeps freed memory" if machine.get("freed_memory") == "kept" else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}, "
        f"{versions}; at most {machine['threads']} threads{kept}; code {machine['code']}."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.cpu", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--fresh", action="store_true", help="measure again what is finished")
    parser.add_argument("--csr", action="append", default=[], metavar="NAME=FILE.npz")
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--datasets", nargs="+", default=["Cora", "PubMed"])
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--edges", type=int, default=EDGES)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="of the models")
    parser.add_argument("--features", type=int, default=cpu_kernels.FEATURES, help="of the kernels")
    parser.add_argument("--growth-sizes", type=int, nargs="+", default=list(GROWTH_SIZES), metavar="NODES")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=2, help="of sides that take seconds a call")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    path = args.results / "cpu.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    machine = environment(max(args.threads)) | {"code": code_digest()}
    if keeps_memory():
        machine["freed_memory"] = "kept"
    failed: list[str] = []
    for name in args.sections:
        settings = json.loads(json.dumps(SECTIONS[name].settings(args)))  # as it will be read back
        earlier = document.get(name, {})
        if not args.fresh and earlier.get("environment") == machine and earlier.get("settings") == settings:
            print(f"{name}: kept", flush=True)
            continue
        begin = time.perf_counter()
        try:
            data = SECTIONS[name].measure(args)
        except Exception:  # the other sections stand for themselves
            traceback.print_exc()
            failed.append(name)
            continue
        seconds = time.perf_counter() - begin
        document[name] = {"environment": machine, "settings": settings, "seconds": round(seconds, 1), "data": data}
        print(f"{name}: {seconds:.0f} s", flush=True)
        write_atomically(path, compact_json(document) + "\n")
        write_atomically(args.results / "cpu.md", markdown(document))
    print(markdown(document))
    if failed:
        sys.exit(f"Sections that failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
