"""``python3 -m benchmarks.gpu --out DIR``: needs PyTorch, Triton and a GPU, and with ``--dry-run`` no GPU.

Imports nothing but the standard library, so that nothing can fail before the first row is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .layout import environment_for, lay_out, lay_out_kernels, missing, unpack_wheels
from .record import Row, append, read
from .report import markdown, report_name
from .sections import SECTIONS, Section

LOST = 75  # of a worker: the device has to be opened anew (see .worker, which imports PyTorch)
LEAST = 8.0  # seconds under which no section is started
MOST_STARTS = 6  # of one section, each after the device was lost
KILL_AFTER = 5.0  # seconds between asking a process to end and ending it


class Worker:
    """The process of a section, loading from its creation on and waiting to be told to begin."""

    def __init__(self, section: Section, options: argparse.Namespace, paths: list[Path], scratch: Path) -> None:
        self.section = section
        dry_interpreted = options.dry_run and section.interpreted
        environment = environment_for(paths, options.cache or scratch / "cache", dry_interpreted)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.worker", section.name]
        command += ["--rows", str(options.out / "rows.jsonl"), "--scratch", str(scratch)]
        command += ["--processes", str(options.processes)] + (["--dry-run"] if options.dry_run else [])
        with open(options.out / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment,
                cwd=paths[0], start_new_session=True,
            )  # fmt: skip

    def begin(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died while loading; its exit status tells

    def wait(self, limit: float) -> int | None:
        """The exit status, or :obj:`None` if ``limit`` seconds did not do."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def end(self) -> None:
        """End the process and those it started."""
        if self.process.poll() is not None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, kind)
                self.process.wait(KILL_AFTER)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


class Conductor:
    """Runs sections one after the other within the limit of the whole."""

    def __init__(self, options: argparse.Namespace, paths: list[Path], lacking: list[str], scratch: Path) -> None:
        self.options, self.paths, self.lacking, self.scratch = options, paths, lacking, scratch
        self.rows = options.out / "rows.jsonl"
        self.deadline = time.monotonic() + options.limit
        self.waiting: Worker | None = None

    def record(self, row: Row) -> None:
        append(self.rows, {**row, "time": round(time.time(), 3), **({"dry": True} if self.options.dry_run else {})})
        print(" ".join(f"{k}={v}" for k, v in row.items() if k != "kind"), flush=True)

    def run(self, sections: Sequence[Section]) -> None:
        wanted = [section for section in sections if not self._left_out(section)]
        for i, section in enumerate(wanted):
            after = wanted[i + 1] if i + 1 < len(wanted) else None
            left = self.deadline - time.monotonic()
            if left < LEAST:
                self.record({"kind": "section", "section": section.name, "status": "out of time", "seconds": 0.0})
                continue
            started = time.monotonic()
            status = self._run(section, after)
            seconds = round(time.monotonic() - started, 2)
            self.record({"kind": "section", "section": section.name, "status": status, "seconds": seconds})
        if self.waiting is not None:
            self.waiting.end()

    def _left_out(self, section: Section) -> bool:
        if not (section.package and self.lacking):
            return False
        reason = f"left out: {', '.join(self.lacking)} missing, see --wheels"
        self.record({"kind": "section", "section": section.name, "status": reason, "seconds": 0.0})
        return True

    def _worker(self, section: Section) -> Worker:
        worker, self.waiting = self.waiting, None
        if worker is not None and worker.section is section and worker.process.poll() is None:
            return worker
        if worker is not None:
            worker.end()
        return Worker(section, self.options, self.paths, self.scratch)

    def _run(self, section: Section, after: Section | None) -> str:
        """Run a section to its end, through as many processes as it takes; how it ended."""
        end = min(time.monotonic() + section.limit * self.options.patience, self.deadline)
        status = "no time"
        for _ in range(MOST_STARTS):
            rows = [row for row in read(self.rows) if row.get("section") == section.name]
            worker = self._worker(section)
            worker.begin({
                "done": sorted({row["unit"] for row in rows if row.get("kind") == "start"}),
                "failed": sorted(self._failed()), "limit": end - time.monotonic(), "seed": time.time_ns() % 2**31,
            })  # fmt: skip
            if after is not None and self.waiting is None:
                self.waiting = Worker(after, self.options, self.paths, self.scratch)
            code = worker.wait(max(0.1, end - time.monotonic()))
            started = sum(row.get("kind") == "start" for row in rows)
            if code is None:
                return "cut at its limit"
            if code == 0:
                return "done"
            status = "device lost" if code == LOST else f"ended with status {code}"
            begun = [row for row in read(self.rows) if row.get("section") == section.name]
            if sum(row.get("kind") == "start" for row in begun) == started:
                return f"{status}, before any unit"  # another process would do no better
            if code != LOST:
                unit = next(row["unit"] for row in reversed(begun) if row.get("kind") == "start")
                self.record({"kind": "failure", "section": section.name, "unit": unit, "error": status})
        return status

    def _failed(self) -> set[str]:
        return {row["key"] for row in read(self.rows) if row.get("kind") == "check" and row.get("error")}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of rows.jsonl, log.txt and the table (default: a fresh one)")
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything (default: 480)")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the limits of the sections")
    parser.add_argument("--dry-run", action="store_true", help="without a card: tiny graphs, interpreted kernels")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only sections whose name contains this")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to bring along")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels, kept (default: in scratch)")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    options = parser.parse_args(argv)
    options.out = Path(options.out or tempfile.mkdtemp(prefix="gpu-run-")).resolve()
    options.cache = options.cache and options.cache.resolve()
    return options


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = options.out / "rows.jsonl"
    if rows.exists():
        print(f"Expected a folder without a run (got '{rows}'); name another with --out", file=sys.stderr)
        return 1
    names = options.only or [""]
    sections = [section for section in SECTIONS if any(name in section.name for name in names)]
    scratch = Path(tempfile.mkdtemp(prefix="gpu-scratch-"))
    try:
        wheels = [unpack_wheels(options.wheels.resolve(), scratch)] if options.wheels else []
        lacking = missing(wheels)
        site = lay_out_kernels(scratch) if lacking else lay_out(scratch)
        Conductor(options, [site, *wheels], lacking, scratch).run(sections)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = read(rows)
    text = markdown(found)
    table = options.out / f"{report_name(found)}.md"
    table.write_text(text)
    print(f"{text}\nThis table is '{table}'; every row is in '{rows}', the log beside it.")
    return 0 if any(row.get("kind") == "section" and row["status"] == "done" for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
