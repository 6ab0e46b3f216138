r"""Every convolution packed over PyG's float: processor time of one thread, and growth of peak memory.

Two layers of width 64 (memory: 128) at 4 bits in the default configuration, on 20,000 nodes and 200,000 random edges
given as an ``edge_index`` without order.  The graph is the same in every call, as in inference on one graph.

.. code-block:: console

    python -m benchmarks.convolutions                          # all of them, a process each
    python -m benchmarks.convolutions RGCNConv HGTConv         # some
    python -m benchmarks.convolutions --out convolutions.json  # and write what was measured

:func:`measure` is the same for one case, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import qgnn_plugin as qgnn

from .convolution_cases import CASES, Case, Graph
from .cpu_probe import peak_bytes
from .model_cases import MODELS
from .timing import interleaved, set_threads

__all__ = ["Figures", "flat", "markdown", "measure", "measure_apart", "sample"]

NODES, EDGES, WIDTH, MEMORY_WIDTH, BITS = 20_000, 200_000, 64, 128, 4
SHARE = 10  # the graph that ranges are set on is a tenth of the one that is measured on
ROUNDS = 5


@dataclass(frozen=True)
class Figures:
    """What was measured of a convolution.

    Args:
        name: Of :data:`~benchmarks.convolution_cases.CASES`.
        path: How its layers run, as in the summary of the packed model.
        speed: PyG's processor time over the packed model's, the median over rounds.
        float_ms, packed_ms: Medians of processor time.
        float_bytes, packed_bytes: Growth of peak memory in a call.
        error: ``||packed - float|| / ||float||`` of the result, untrained weights.
    """

    name: str
    path: str
    speed: float
    float_ms: float
    packed_ms: float
    float_bytes: int
    packed_bytes: int
    error: float

    @property
    def memory(self) -> float:
        """The packed model's memory over the float model's."""
        return self.packed_bytes / max(1, self.float_bytes)


def sample(case: Case, graph: Graph) -> Graph:
    """What ranges are set on: a smaller graph of the same degrees, or ``graph`` itself."""
    share = SHARE if graph.nodes >= 100 * SHARE else 1
    return graph if case.whole else Graph(graph.nodes // share, graph.edges // share, seed=1)


def _models(case: Case, graph: Graph, width: int, bits: int) -> tuple[nn.Module, nn.Module]:
    """The float model and the packed one, ranges set on a smaller graph of the same degrees."""
    torch.manual_seed(0)
    model, small = case.model(width, graph), sample(case, graph)
    qmodel = qgnn.quantize_model(model, bits=bits)
    qgnn.calibrate(qmodel, [case.arguments(small, width)], method="ranges")
    return model, qgnn.pack_model(qmodel.eval())


def flat(out: Any) -> Tensor:
    """All numbers of a result in a row."""
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else (out,)
    return torch.cat([part.flatten() for part in parts if isinstance(part, Tensor)])


def _path(packed: nn.Module) -> str:
    """The ways that the layers run, most of all first, without those inside of them."""
    every = qgnn.summary(packed).layers
    layers = [layer for layer in every if _is_conv(packed.get_submodule(layer.name))] or every
    return ", ".join(dict.fromkeys(layer.runs.removeprefix("packed: ") for layer in layers)) or "no layer"


def _is_conv(module: nn.Module) -> bool:
    from torch_geometric.nn import HANConv, HGTConv, MessagePassing

    return isinstance(module, (MessagePassing, HANConv, HGTConv))


def measure(
    name: str, bits: int = BITS, nodes: int = NODES, edges: int = EDGES, width: int = WIDTH,
    memory_width: int = MEMORY_WIDTH, rounds: int = ROUNDS,
) -> Figures:  # fmt: skip
    """Time a case and see how far its memory grows, in this process on one thread.

    Args:
        name: Of :data:`~benchmarks.convolution_cases.CASES` or :data:`~benchmarks.model_cases.MODELS`.
        bits: Of the packed model.
        nodes, edges: Of the graph.
        width, memory_width: Of the layers where time and memory are measured; 0 leaves memory out.
        rounds: Timed rounds.
    """
    set_threads(1)
    case, graph = {**CASES, **MODELS}[name], Graph(nodes, edges)
    with torch.no_grad():
        width, memory_width = min(width, case.widest), min(memory_width, case.widest)
        model, packed = _models(case, graph, width, bits)
        arguments = case.arguments(graph, width)
        expected = flat(model(*arguments))
        error = float((flat(packed(*arguments)) - expected).norm() / expected.norm())
        path = _path(packed)
        timings = interleaved({"float": lambda: model(*arguments), "packed": lambda: packed(*arguments)}, rounds)
        float_times, packed_times = timings["float"].processor, timings["packed"].processor
        speed = median(float_times[k] / packed_times[k] for k in float_times)
        del expected
        packed_bytes = float_bytes = 0
        if memory_width:
            model, packed = _models(case, graph, memory_width, bits)
            arguments = case.arguments(graph, memory_width)
            packed(*arguments)  # finds kernels and plans of the graph
            packed_bytes, float_bytes = peak_bytes(lambda: packed(*arguments)), peak_bytes(lambda: model(*arguments))
    return Figures(
        name, path, speed, 1e3 * median(float_times.values()), 1e3 * median(packed_times.values()), float_bytes,
        packed_bytes, error,
    )  # fmt: skip


def measure_apart(name: str, **options: Any) -> Figures:
    """:func:`measure` in a process of its own, with one thread from its start."""
    command = [sys.executable, "-m", "benchmarks.convolutions", "--one", json.dumps({"name": name, **options})]
    variables = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(f"Measuring {name} failed:\n{done.stderr}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


HEADER = "| convolution | path | PyG over packed, time | float ms | packed ms | packed over PyG, memory | error |"


def row(figures: Figures) -> str:
    """One line of the table."""
    cells = (
        figures.name, figures.path, f"{figures.speed:.2f}", f"{figures.float_ms:.0f}", f"{figures.packed_ms:.0f}",
        f"{figures.memory:.2f} ({figures.packed_bytes / 1e6:.0f} / {figures.float_bytes / 1e6:.0f} MB)",
        f"{figures.error:.3f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def markdown(found: Sequence[Figures]) -> list[str]:
    """A table of what was measured."""
    return [HEADER, "| --- " * (HEADER.count("|") - 1) + "|", *map(row, found)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Convolutions packed over PyG's float.")
    parser.add_argument("names", nargs="*", help="cases, all by default")
    parser.add_argument("--out", type=Path, help="a file for what was measured (JSON)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.simplefilter("ignore")
        print(json.dumps(asdict(measure(**json.loads(args.one)))))
        return
    unknown = [name for name in args.names if name not in CASES]
    if unknown:
        parser.error(f"expected names of {', '.join(CASES)} (got {', '.join(unknown)})")
    print("\n".join(markdown([])), flush=True)
    found = []
    for name in args.names or CASES:
        found.append(measure_apart(name))
        print(row(found[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps([asdict(figures) for figures in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
