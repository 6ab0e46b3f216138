"""Fills Triton's cache with what the sections will launch: many processes, no device.

Each task goes the way of the real launches on a small graph, in a rehearsal for the card's architecture, so that the
binaries are those that the sections look for.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .record import Row
from .worker import Run, Unit, listen

__all__ = ["compile_all", "compile_task", "tasks", "units"]

NODES, EDGES = 2048, 40_000  # hubs among them
DRY_TASK = ("linear int2 32x32", {"make": "linear", "bits": 2, "inputs": 32, "outputs": 32})
DRY_TARGET = "sm_90"


def tasks(package: bool) -> list[tuple[str, dict[str, Any]]]:
    """What is compiled, the slowest and the first needed in front."""
    from .kernels import BITS, FEATURES, SHAPES
    from .tuning import SETTINGS

    found: list[tuple[str, dict[str, Any]]] = []
    if package:
        for model in ("GAT", "GraphSAGE", "GCN"):
            for bits in (2, 4):
                found += [(f"{model} int{bits}", {"make": "model", "model": model, "bits": bits})]
    for bits in BITS:
        for features in (256, 40):
            width = {"bits": bits, "features": features}
            found.append((f"ops int{bits} F={features}", {"make": "ops", "heads": 4, **width}))
        for features in FEATURES:
            width = {"bits": bits, "features": features}
            found.append((f"aggregate int{bits} F={features}", {"make": "aggregate", **width}))
        for inputs, outputs in SHAPES:
            shape = {"inputs": inputs, "outputs": outputs}
            found.append((f"linear int{bits} {inputs}x{outputs}", {"make": "linear", "bits": bits, **shape}))
    if package:
        for model in ("GAT", "GraphSAGE", "GCN"):
            for bits in (2, 4):
                found.append((f"small {model} int{bits}", {"make": "small", "model": model, "bits": bits}))
            found.append((f"training {model}", {"make": "training", "model": model}))
    for bits in (2, 4, 8):
        found.append((f"large int{bits}", {"make": "large", "bits": bits}))
    for bits in (2, 4):
        for kernel in SETTINGS:
            found.append((f"tuning {kernel} int{bits}", {"make": "tuning", "kernel": kernel, "bits": bits}))
    return found


def _plan() -> Any:
    from qgnn_plugin.kernels.triton.autotune import power_law_plan

    return power_law_plan(NODES, EDGES, "cpu")


def _ops(bits: int, features: int, heads: int) -> list[Callable[[], Any]]:
    from .checks import checks

    return [run for _, _, run in checks(_plan(), features, heads, (bits,))]


def _aggregate(bits: int, features: int) -> list[Callable[[], Any]]:
    from .kernels import FORMS, aggregate_calls

    plan = _plan()
    return [aggregate_calls(plan, features, bits, form)[0] for form in FORMS]


def _linear(bits: int, inputs: int, outputs: int) -> list[Callable[[], Any]]:
    from .kernels import FORMS, PAIR, linear_calls

    return [linear_calls(NODES, inputs, outputs, bits, form, torch.device("cpu"))[0] for form in (*FORMS, PAIR)]


def _model(model: str, bits: int) -> list[Callable[[], Any]]:
    from .graphs import edge_index_of
    from .models import MODEL_WIDTHS, Subject

    return [Subject(model, edge_index_of(_plan()), NODES, MODEL_WIDTHS).packed(bits)]


def _small(model: str, bits: int) -> list[Callable[[], Any]]:
    from .models import CORA, MOLECULES, Subject, _molecules, _random_graph

    cpu = torch.device("cpu")
    graphs, atoms, bonds, widths = MOLECULES
    return [
        Subject(model, _random_graph(*CORA[:2], cpu), CORA[0], CORA[2]).packed(bits),
        Subject(model, _molecules(graphs, atoms, bonds, cpu), graphs * atoms, widths).packed(bits),
    ]


def _training(model: str) -> list[Callable[[], Any]]:
    from .models import training_units

    run = Run(dry=False, device=torch.device("cpu"), backend="triton", scratch=Path())
    units = training_units(run, _plan(), (model,))
    return [lambda u=unit: list(u.run()) for unit in units if unit.needs]  # type: ignore[misc]


def _large(bits: int) -> list[Callable[[], Any]]:
    from . import large

    plan = _plan()
    rows = large.sample(plan, 8)
    found = large._checks(plan, large.rows_of(plan, rows), rows, large.FEATURES, large.WIDE, bits)
    return [lambda c=check: c("triton") for check in found.values()]  # type: ignore[misc]


def _tuning(kernel: str, bits: int) -> list[Callable[[], Any]]:
    from qgnn_plugin.kernels.triton.launch import override

    from . import tuning

    call = tuning.calls(kernel, _plan(), bits, tuning.FEATURES)[0]

    def tried(config: Any) -> None:
        with override(**{kernel: config}):
            call()

    found = tuning.candidates(kernel, torch.device("cpu"), bits, tuning.FEATURES)
    return [lambda c=config: tried(c) for config in found.values()]  # type: ignore[misc]


MAKERS: dict[str, Callable[..., list[Callable[[], Any]]]] = {
    "ops": _ops, "aggregate": _aggregate, "linear": _linear, "model": _model, "small": _small, "training": _training,
    "large": _large, "tuning": _tuning,
}  # fmt: skip


@contextmanager
def launchers(made: list[str]) -> Iterator[None]:
    """Build what launches a kernel as well: up to Triton 3.6 a C module per signature, as long to compile as a kernel.

    ``made`` gets the kernels' names; where the driver's library is missing, or later Tritons need no module, none.
    """
    from tools.rehearsal import _Driver

    rehearsed = _Driver.launcher_cls

    def launcher_cls(self: Any, source: Any, metadata: Any) -> Any:
        with suppress(Exception):
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(source, metadata)
            made.append(metadata.name)
        return rehearsed(self, source, metadata)

    _Driver.launcher_cls = launcher_cls  # type: ignore[method-assign]
    try:
        yield
    finally:
        _Driver.launcher_cls = rehearsed  # type: ignore[method-assign]


def compile_task(name: str, target: str, make: str, **options: Any) -> Row:
    """Compile one task in this process; what failed to compile is told, the rest of the task goes on."""
    from qgnn_plugin.kernels.triton.launch import rehearsed_for
    from tools.rehearsal import rehearse

    torch.set_num_threads(1)
    started, log, problems = time.perf_counter(), listen(), []
    # Ranges are set and layers packed on the CPU's own backend; what launches is made within the rehearsal.
    with rehearsed_for(target):
        runs = MAKERS[make](**options)
    made: list[str] = []
    with launchers(made), rehearse(target) as launches:
        for run in runs:
            try:
                run()
            except Exception as problem:
                problems.append(f"{type(problem).__name__}: {problem}"[:200])
    return {
        "kind": "compiled", "task": name, "launches": len(launches), "binaries": len(log.compiled), "hits": log.hits,
        "launchers": len(made),
        "seconds": time.perf_counter() - started, **({"error": "; ".join(problems)} if problems else {}),
    }  # fmt: skip


def units(run: Run) -> Iterator[Unit]:
    """One unit: tasks are handed to processes, and come back as rows in the order in which they end."""
    if run.dry:  # what the pool does is all there is to see
        yield Unit("all", lambda: compile_all([DRY_TASK], 1, DRY_TARGET))
        return
    package = importlib.util.find_spec("torch_geometric") is not None
    major, minor = torch.cuda.get_device_capability()
    yield Unit("all", lambda: compile_all(tasks(package), run.processes, f"sm_{major}{minor}"))


def compile_all(todo: list[tuple[str, dict[str, Any]]], processes: int, target: str) -> Iterator[Row]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu.precompile"])
    with ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
        futures = {pool.submit(compile_task, name, target, **options): name for name, options in todo}
        for future in as_completed(futures):
            try:
                yield future.result()
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"[:300]
                yield {"kind": "compiled", "task": futures[future], "error": error}
