"""Inference of three-layer models: PyG's paths and other peers, and the packed models at every width."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.plan import plan_cache
from qgnn_plugin.packing.model import specs_of

from .cpu_graphs import power_law
from .cpu_paths import EDGE_INDEX, PACKED_GRAPH, edge_list, quantized_stack
from .cpu_probe import Job, probe
from .cpu_report import Target, per_threads, table
from .peers import OVER_PEERS, OVER_PYG, family, is_compiled, is_pyg, peer_line, peer_settings, peers_of
from .stacks import STACKS
from .timing import interleaved, set_threads

BITS = (2, 4, 8)
COMPILED_BITS = 4  # the width whose compilation is timed
ATTENTION = ("GAT",)
LONG_CALL = 4.0  # seconds: a call that takes longer is not repeated to choose a path
TARGETS = {  # model: (column, least by bits)
    "GCN": ((OVER_PEERS, {2: 5.11, 4: 4.70}), (OVER_PYG, {2: 8.0, 4: 6.5}), (f"over {EDGE_INDEX}", {2: 30.0, 4: 25.0})),
    "GraphSAGE": ((OVER_PEERS, {2: 5.11, 4: 4.70}), (OVER_PYG, {2: 6.0, 4: 5.5})),
    "GAT": ((OVER_PEERS, {2: 5.11, 4: 4.70}), (OVER_PYG, {2: 15.0, 4: 12.0})),
}

NOTES = """\
Whole forward passes on the generated graph.  `best PyG` is the fastest of all PyG paths of the model, eager or under
`torch.compile` (whose compilation is not counted), `best peer` that of these and of DGL's own layers.  Each has
everything computed beforehand that it lets one compute.  All gave the same outputs and were tried once; `edge_index`
and the fastest other one of each of PyG, PyG compiled, and DGL take part in the rounds.  Packed models are calibrated
on the same graph, with the default configuration (row multipliers) and every layer packed; before timing, their outputs
are compared with `qmodel.eval()`: `error` is the largest difference over the largest output, `agree` the share of equal
predictions.
"""

STAGE_NOTES = f"""\
Once per model or graph, apart from inference (ms, {{threads}} threads): packing a quantized model, converting an edge
list for the packed model and for PyG's fastest path, and the first call of an INT{COMPILED_BITS} model in a new process
on a graph of 1,000 nodes, with nothing compiled yet and with kernels that an earlier process has left on disk.
"""


class WrongResult(Exception):
    """A side that does not compute what it has to."""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("nodes", "edges", "widths", "threads", "rounds", "slow_rounds")
    return {name: getattr(args, name) for name in names} | {"peers": peer_settings()}


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _median_ms(run: Callable[[], Any], repeats: int = 3) -> float:
    return 1e3 * statistics.median(_seconds(run) for _ in range(repeats))


def _converting(name: str, edge_index: Tensor, num_nodes: int) -> Callable[[], Any]:
    def run() -> Any:
        plan_cache.clear()
        return PACKED_GRAPH[name](edge_index, num_nodes)

    return run


def compare(name: str, qmodel: nn.Module, packed: nn.Module, x: Tensor, edge_index: Tensor) -> dict[str, float]:
    """Difference of a packed model from ``qmodel.eval()``.

    Raises:
        WrongResult: If a layer is not packed or an output is not what it has to be: nothing wrong is timed.
    """
    reasons = {spec.name: spec.reason for spec in specs_of(packed) if spec.reason is not None}
    if reasons:
        raise WrongResult(f"Expected every layer of the {name} packed (got {reasons})")
    expected, out = qmodel(x, edge_index), packed(x, edge_index)
    error = float((out - expected).abs().max() / expected.abs().max())
    agree = float((out.argmax(1) == expected.argmax(1)).float().mean())
    # Attention weights are sums in another order: a code on the edge of two may fall to the other side.
    right = agree >= 0.999 if name in ATTENTION else agree == 1 and error <= 1e-5
    if not right:
        raise WrongResult(
            f"Expected the outputs of the quantized {name} (got error {error:.2g}, agreement {agree:.5f})"
        )
    return {"error": error, "agree": agree}


@dataclass(frozen=True)
class _Tried:
    """What trying every peer of a model once found.

    Args:
        sides: Those that take part in the rounds.
        seconds: Of one call, by label.
        converting: Milliseconds that converting the graph for PyG's fastest path took.
        absent: Peers that do not take part, and why.
    """

    sides: dict[str, Callable[[], Any]]
    seconds: dict[str, float]
    converting: float
    absent: Mapping[str, str]


def _try_peers(name: str, args: argparse.Namespace, x: Tensor, edge_index: Tensor) -> _Tried:
    expected = None
    calls: dict[str, Callable[[], Any]] = {}
    tried: dict[str, float] = {}
    peers = peers_of(name, args.widths)
    for label, path in peers.paths.items():
        graph = path.convert(edge_index, args.nodes)
        calls[label] = lambda path=path, graph=graph: path.model(x, graph)
        if is_compiled(label):
            calls[label]()
        begin = time.perf_counter()
        out = calls[label]()
        tried[label] = time.perf_counter() - begin
        if tried[label] < LONG_CALL:
            tried[label] = min(tried[label], _seconds(calls[label]))
        expected = out if expected is None else expected
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    fastest: dict[str, str] = {}
    for label in sorted(tried, key=tried.__getitem__):
        if label != EDGE_INDEX:
            fastest.setdefault(family(label), label)
    convert = peers.paths[fastest["PyG"]].convert
    return _Tried(
        {label: calls[label] for label in (EDGE_INDEX, *fastest.values())}, tried,
        _median_ms(lambda: convert(edge_index, args.nodes)), peers.absent,
    )  # fmt: skip


def _rows(name: str, count: int, timings: Mapping[str, Any], checks: Mapping[str, Any]) -> list[dict[str, Any]]:
    peers = sorted((side for side in timings if side not in checks), key=lambda side: timings[side].median)
    best, best_pyg = peers[0], next(side for side in peers if is_pyg(side))
    return [
        {
            "model": name,
            "threads": count,
            "side": side,
            "ms": 1e3 * timing.median,
            OVER_PYG: timing.over(timings[best_pyg]),
            OVER_PEERS: timing.over(timings[best]),
            f"over {EDGE_INDEX}": timing.over(timings[EDGE_INDEX]),
            "processor ms": 1e3 * timing.processor_median,
            "rounds": len(timing.wall),
            **checks.get(side, {}),
        }
        for side, timing in timings.items()
    ]


def _model_rows(name: str, args: argparse.Namespace, x: Tensor, edge_index: Tensor) -> dict[str, Any]:
    set_threads(max(args.threads))
    found = _try_peers(name, args, x, edge_index)
    sides, tried = dict(found.sides), found.seconds
    slow = {side: min(args.slow_rounds, args.rounds) for side in sides if tried[side] > LONG_CALL}
    stages = {"model": name, "graph": _median_ms(_converting(name, edge_index, args.nodes))}
    stages["graph, PyG"] = found.converting
    checks, wrong = {}, []
    for bits in BITS:
        qmodel = quantized_stack(name, bits, args.widths, (x, edge_index))
        stages[f"packing INT{bits}"] = _median_ms(lambda qmodel=qmodel: qgnn.pack_model(qmodel))
        packed = qgnn.pack_model(qmodel)
        try:
            checks[f"INT{bits}"] = compare(name, qmodel, packed, x, edge_index)
        except WrongResult as problem:
            wrong.append(f"INT{bits}: {problem}")
            continue
        sides[f"INT{bits}"] = lambda packed=packed: packed(x, edge_index)
    rows = []
    for count in args.threads:
        set_threads(count)
        for side in filter(is_compiled, sides):  # again for another number of threads, and not while it is timed
            sides[side]()
        rows += _rows(name, count, interleaved(sides, args.rounds, slow), checks)
    stages |= _compilation(name, args)
    return {"rows": rows, "tried": tried, "stages": stages, "wrong": wrong, "absent": dict(found.absent)}


def _compilation(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the first call in a new process, without compiled kernels on disk and with them."""
    job = Job(name, 1_000, 12_000, args.widths, max(args.threads), bits=(COMPILED_BITS,))
    with tempfile.TemporaryDirectory() as folder:
        found = [probe(job, {"NUMBA_CACHE_DIR": folder})[f"INT{COMPILED_BITS}"]["first_ms"] for _ in range(2)]
    return dict(zip(("first call, compiling", "first call, from disk"), found, strict=True))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    edge_index = edge_list(power_law(args.nodes, args.edges))
    torch.manual_seed(0)
    x = torch.randn(args.nodes, args.widths[0])
    data: dict[str, Any] = {"rows": [], "stages": [], "tried": {}, "wrong": [], "absent": {}}
    with torch.no_grad():
        for name in STACKS:
            found = _model_rows(name, args, x, edge_index)
            data["rows"] += found["rows"]
            data["stages"].append(found["stages"])
            data["wrong"] += found["wrong"]
            data["tried"][name] = found["tried"]
            data["absent"] |= found["absent"]
    return data


def markdown(section: Mapping[str, Any]) -> list[str]:
    data, used = section["data"], section["settings"]
    widths = "-".join(str(width) for width in used["widths"])
    columns = ("model", "threads", "side", "ms", OVER_PEERS, OVER_PYG, f"over {EDGE_INDEX}", "processor ms", "rounds")
    stages = list(data["stages"][0])
    return [
        f"## Inference, {widths}, {used['nodes']:,} nodes, {used['edges']:,} edges",
        "",
        NOTES,
        *peer_line(used.get("peers", {}), data.get("absent", {})),
        *table((*columns, "error", "agree"), data["rows"]),
        *(f"**Not timed**, {line}.\n" for line in data["wrong"]),
        "Tried once, in seconds: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{label} {seconds:.2f}" for label, seconds in tried.items())
            for name, tried in data["tried"].items()
        )
        + ".",
        "",
        STAGE_NOTES.format(threads=max(used["threads"])),
        *table(stages, data["stages"]),
    ]


def targets(data: Mapping[str, Any]) -> list[Target]:
    return [
        Target(
            f"{name} inference, INT{bits}, {column}", least,
            per_threads(data["rows"], column, model=name, side=f"INT{bits}"),
        )
        for name, columns in TARGETS.items()
        for column, aims in columns
        for bits, least in aims.items()
    ]  # fmt: skip
