"""Where the time of a model goes, kernel by kernel, and what the hardware counts in two kernels."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from qgnn_plugin.kernels.backend import use_backend

from .record import Row
from .sections import MODELS
from .worker import Run, Unit, mend_interpreter

__all__ = ["counter_units", "find_ncu", "read_counters", "units"]

SHOWN = 14  # kernels of a table
STEPS = 5
BITS = 2
COUNTED_CALLS = {"aggregate": "aggregate_kernel|hub_kernel", "linear": "linear_kernel"}
METRICS = (
    "gpu__time_duration.sum", "sm__inst_executed.sum", "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "dram__bytes.sum", "lts__t_bytes.sum",
    "lts__t_sector_hit_rate.pct", "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
)  # fmt: skip


def units(run: Run) -> Iterator[Unit]:
    from .models import subject_of

    for model in MODELS[:1] if run.dry else MODELS:
        subject = subject_of(run, model, "170k/2M")

        def packed(subject: Any = subject) -> Iterator[Row]:
            with use_backend(run.backend):
                yield from _profiled(subject.name, f"int{BITS}", subject.packed(BITS))

        def plain(subject: Any = subject) -> Iterator[Row]:
            yield from _profiled(subject.name, "PyG edge_index", subject.plain(subject.edge_index))

        yield Unit(f"{model} int{BITS}", packed, (f"{model} int{BITS}",))
        yield Unit(f"{model} PyG edge_index", plain)


def _profiled(model: str, name: str, run: Callable[[], Any]) -> Iterator[Row]:
    """One row per kernel, the longest first: microseconds and launches per forward pass."""
    from torch.profiler import ProfilerActivity, profile

    on_device = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
    steps = STEPS if on_device else 1
    run()
    with profile(activities=activities) as found:
        for _ in range(steps):
            run()
        if on_device:
            torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if not on_device:
            times[event.name].append(event.self_cpu_time_total)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.time_range.elapsed_us())
    total = sum(map(sum, times.values()))
    for kernel, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        yield {
            "kind": "profile", "model": model, "name": name, "kernel": kernel[:160], "us": sum(spent) / steps,
            "launches": len(spent) / steps, "share": sum(spent) / total if total else 0.0,
        }  # fmt: skip


def find_ncu() -> str | None:
    """The command line of Nsight Compute, on the path or where CUDA puts it."""
    places = [Path("/usr/local/cuda/bin/ncu"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)]
    return shutil.which("ncu") or next((str(place) for place in places if place.exists()), None)


def counter_units(run: Run) -> Iterator[Unit]:
    for op in COUNTED_CALLS:
        for bits in (2,) if run.dry else (2, 4):
            name = f"{op} int{bits}"
            yield Unit(name, lambda o=op, b=bits: _counted(run, o, b), (name,))  # type: ignore[misc]


def _counted(run: Run, op: str, bits: int) -> Iterator[Row]:
    """The counters of one call, which a process of its own makes under the tool."""
    inner = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.profiles", op, str(bits)]
    inner.append("dry" if run.dry else "cuda")
    tool = None if run.dry else find_ncu()
    if tool is None and not run.dry:
        raise RuntimeError("Expected 'ncu' (got none on this machine)")
    command = inner
    if tool is not None:
        command = [
            tool, "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS), "--launch-skip", "4",
            "--launch-count", "3", "--kernel-name", f"regex:{COUNTED_CALLS[op]}", *inner,
        ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=run.limit, env=dict(os.environ))
    found = list(read_counters(done.stdout.splitlines()))
    if done.returncode or (tool and not found):
        raise RuntimeError(f"Expected counters (got status {done.returncode}: {(done.stderr + done.stdout)[-400:]})")
    for row in found or [{"kernel": "none: dry run"}]:
        yield {"kind": "counters", "name": f"{op} int{bits}", **row}


def read_counters(lines: Iterable[str]) -> Iterator[Row]:
    """One row per launch from the tool's CSV; other lines are passed over."""
    table = [line for line in lines if line.startswith('"')]
    launches: dict[tuple[str, str], Row] = {}
    for line in csv.DictReader(io.StringIO("\n".join(table))):
        row = launches.setdefault((line["ID"], line["Kernel Name"]), {"kernel": line["Kernel Name"]})
        try:
            value = float(line["Metric Value"].replace(",", ""))
        except ValueError:
            continue
        row[f"{line['Metric Name']} [{line['Metric Unit']}]"] = value
    yield from launches.values()


def _call(op: str, bits: int, device: str) -> None:
    """What the tool watches: a few calls on the graph of the timings."""
    from .graphs import generated
    from .tuning import DRY_FEATURES, FEATURES, calls

    dry = device == "dry"
    if dry:
        mend_interpreter()
    place = torch.device("cpu" if dry else "cuda")
    kernel = {"linear": "linear_rows", "aggregate": "aggregate_multiplied"}[op]
    plan = generated("170k/2M", place, dry)
    with use_backend("interpret" if dry else "triton"):
        found = calls(kernel, plan, bits, DRY_FEATURES if dry else FEATURES)
        for i in range(1 if dry else 8):
            found[i % len(found)]()
    if not dry:
        torch.cuda.synchronize()


if __name__ == "__main__":
    _call(sys.argv[1], int(sys.argv[2]), sys.argv[3])
