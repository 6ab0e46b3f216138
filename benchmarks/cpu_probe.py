"""Time and peak memory of some sides on one generated graph, in a process of its own.

Memory is the largest resident set during a call less the one before it: torch's, numpy's and every kernel's buffers
count alike, results too; inputs, weights and the converted graph were there before.  Before each measured call idle
buffers go back to the system, so that a call cannot hide in memory that an earlier one left behind.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Job", "peak_bytes", "probe", "resident_bytes"]

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK, CURRENT = "VmHWM", "VmRSS"


@dataclass(frozen=True)
class Job:
    """What a probe measures.

    Args:
        model: Name of the stack.
        nodes, edges: Of the generated graph.
        widths: Of the stack.
        threads: For every side.
        pyg: Labels of :func:`~benchmarks.cpu_paths.pyg_paths`.
        bits: Widths of the packed models.
        rounds: Timed rounds, 0 for memory only.
        slow_rounds: In how many of them PyG takes part.
    """

    model: str
    nodes: int
    edges: int
    widths: tuple[int, ...]
    threads: int = 1
    pyg: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    rounds: int = 0
    slow_rounds: int = field(default=1)


def probe(job: Job, variables: dict[str, str] | None = None) -> dict[str, dict[str, float]]:
    """Run ``job`` in a fresh process: per side ``bytes``, ``ms`` (if timed) and ``first_ms``, of the first, tiny call.

    Args:
        job: What to measure.
        variables: Environment variables on top of this process's.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu_probe", json.dumps(asdict(job))]
    folder = Path(__file__).parent.parent
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise RuntimeError(f"The probe of {job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def resident_bytes(key: str = CURRENT) -> int:
    """The resident set of this process, or its peak since the last reset, as Linux counts it."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"Expected a line '{key}' in {STATUS}")


def _give_back() -> None:
    """Return freed memory to the system: the pool of result buffers, then the C library's."""
    from qgnn_plugin.kernels.cpu.memory import release_cpu_memory

    gc.collect()
    release_cpu_memory()
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes that a call needs at its peak beyond what is resident before it."""
    _give_back()
    RESET.write_text("5")  # resets the peak to the current resident set
    before = resident_bytes()
    result = run()
    peak = resident_bytes(PEAK)
    del result
    return max(0, peak - before)


def _sides(job: Job, nodes: int, edges: int) -> dict[str, Callable[[], Any]]:
    import torch

    import qgnn_plugin as qgnn

    from .cpu_graphs import power_law
    from .cpu_paths import edge_list, pyg_paths, quantized_stack

    plan = power_law(nodes, edges)
    torch.manual_seed(0)
    x, edge_index = torch.randn(nodes, job.widths[0]), edge_list(plan)
    sides: dict[str, Callable[[], Any]] = {}
    paths = pyg_paths(job.model, job.widths)
    for label in job.pyg:
        graph = paths[label].convert(edge_index, nodes)
        sides[label] = lambda model=paths[label].model, graph=graph: model(x, graph)
    for bits in job.bits:
        packed = qgnn.pack_model(quantized_stack(job.model, bits, job.widths))
        sides[f"INT{bits}"] = lambda model=packed: model(x, edge_index)
    return sides


def _measure(job: Job) -> dict[str, dict[str, float]]:
    import torch

    from .timing import interleaved, set_threads

    set_threads(job.threads)
    results: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, run in _sides(job, min(job.nodes, 1_000), min(job.edges, 12_000)).items():
            begin = time.perf_counter()
            run()
            results[name] = {"first_ms": 1e3 * (time.perf_counter() - begin)}
        sides = _sides(job, job.nodes, job.edges)
        for name, run in sides.items():
            if name not in job.pyg:
                run()  # converts the graph
            results[name]["bytes"] = peak_bytes(run)
        if job.rounds:
            slow = {name: min(job.slow_rounds, job.rounds) for name in job.pyg}
            for name, timing in interleaved(sides, job.rounds, slow).items():
                results[name]["ms"] = 1e3 * timing.median
    return results


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    print(json.dumps(_measure(Job(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}))))
