"""The process of one section: ``python -m benchmarks.gpu.worker SECTION --out DIR [--dry-run]``.

It imports what it needs, waits for a line of JSON on standard input (so that the next section loads while this one
runs) and then measures.  A unit that fails is a row; a device that is unusable afterwards (a failed capture, an illegal
access) ends the process with :data:`LOST`, and the conductor starts another one for the units that are left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .record import Row, append
from .sections import SECTIONS, Section

__all__ = ["LOST", "Run", "Unit", "main", "run_units"]

LOST = 75  # exit status: what ran was recorded, the device has to be opened anew


@dataclass(frozen=True)
class Run:
    """What units are told about the run.

    Attributes:
        dry: Whether there is no card: tiny graphs on CPU tensors, under the interpreter.
        device: Where tensors are made.
        backend: The kernels' backend.
        scratch: A folder for files of this run.
        limit: Seconds this section has.
        processes: Processes that may compile at once.
    """

    dry: bool
    device: torch.device
    backend: str
    scratch: Path
    limit: float = 60.0
    processes: int = 1


@dataclass(frozen=True)
class Unit:
    """One measurement, or a few that share their inputs.

    Attributes:
        name: Unique within the section.
        run: Makes the rows.
        needs: Checks that must not have failed, such as ``"aggregate int2"``.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    needs: tuple[str, ...] = ()


class CacheLog:
    """Counts which kernels came out of Triton's cache and which were compiled here."""

    def __init__(self) -> None:
        self.hits = 0
        self.compiled: list[str] = []
        self.seconds = 0.0

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.hits += 1
            return
        self.compiled.append(str(getattr(src, "name", src)))
        with suppress(AttributeError, TypeError):
            self.seconds += 1e-6 * float(times.total)

    def row(self) -> Row:
        return {"kind": "cache", "hits": self.hits, "compiled": len(self.compiled), "seconds": self.seconds,
                "kernels": sorted(set(self.compiled))}  # fmt: skip


def listen() -> CacheLog:
    """Count from here on (nothing is counted by a Triton that does not tell)."""
    log = CacheLog()
    with suppress(ImportError, AttributeError):
        from triton import knobs

        knobs.compilation.listener = log
    return log


def mend_interpreter() -> None:
    """Let Triton 3.6 interpret loops under NumPy 2.4, which no longer takes an array of one element for a number."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched


def _usable() -> bool:
    """Whether the device still answers: after a failed capture even a new tensor may raise."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.randn(8, device="cuda").sum().item()
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def run_units(
    units: Iterable[Unit], done: set[str], failed: set[str], record: Callable[[Row], None], usable: Callable[[], bool]
) -> bool:
    """Run what is not ``done``; whether the device can still be used.

    Args:
        units: Of the section, always the same ones in the same order.
        done: Names of units that another process ran, or died of.
        failed: Checks that failed: units that need them are left out.
        record: Where rows go.
        usable: Whether the device works, asked after a failure.
    """
    for unit in units:
        if unit.name in done:
            continue
        record({"kind": "start", "unit": unit.name})
        started = time.perf_counter()
        bad = sorted(failed.intersection(unit.needs))
        if bad:
            record({"kind": "failure", "unit": unit.name, "error": f"left out: the check of {', '.join(bad)} failed"})
            continue
        trouble = False
        try:
            for row in unit.run():
                record({"unit": unit.name, **row})
                trouble = trouble or "capture_error" in row or bool(row.get("error"))
        except Exception as problem:
            trouble = True
            trace = "".join(traceback.format_tb(problem.__traceback__)[-3:])
            error = f"{type(problem).__name__}: {problem}"[:600]
            record({"kind": "failure", "unit": unit.name, "error": error, "trace": trace})
        record({"kind": "end", "unit": unit.name, "seconds": time.perf_counter() - started})
        if trouble and not usable():
            record({"kind": "lost", "unit": unit.name})
            return False
    return True


def _go() -> dict[str, Any] | None:
    """What the conductor says when this section's turn has come; :obj:`None` when it does not come."""
    line = sys.stdin.readline()
    return json.loads(line) if line.strip() else None


def _units(section: Section) -> Callable[..., Iterator[Unit]]:
    module, name = section.units.split(":")
    return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One section of the GPU run; started by benchmarks.gpu.")
    parser.add_argument("section", choices=[section.name for section in SECTIONS])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(argv)
    section = next(s for s in SECTIONS if s.name == options.section)
    make = _units(section)
    message = _go()
    if message is None:
        return 0
    torch.manual_seed(message["seed"])
    if options.dry_run:
        mend_interpreter()
    run = Run(
        dry=options.dry_run, device=torch.device("cpu" if options.dry_run else "cuda"),
        backend="interpret" if options.dry_run else "triton", scratch=options.scratch, limit=message["limit"],
        processes=options.processes,
    )  # fmt: skip

    def record(row: Row) -> None:
        mark = {"dry": True} if options.dry_run else {}
        append(options.rows, {"section": section.name, **row, **mark, "time": round(time.time(), 3)})
        shown = {k: v for k, v in row.items() if k not in ("trace", "kind")}
        print(f"{section.name}: {row.get('kind', '')} {shown}", flush=True)

    cache = listen()
    try:
        whole = run_units(make(run, **section.options), set(message["done"]), set(message["failed"]), record, _usable)
    finally:
        record(cache.row())
    return 0 if whole else LOST


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a context that was lost may hang in its destructors
