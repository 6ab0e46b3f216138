"""A float model against its packed form on one graph: time, memory, size and agreement."""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch_geometric.utils import to_torch_csr_tensor

from ..data import to_sparse_features
from ..inputs import run_model
from ..packing import packed_bytes
from ..tables import table

__all__ = ["Comparison", "Measurement", "compare", "median_seconds", "peak_bytes", "score"]

LEAST_RUNS, MOST_RUNS = 3, 200
PACKED = "packed"
SPARSE_BELOW = 0.1  # share of features that are not zero, up to which they are also tried as a sparse matrix
SAME_PATH = 1e-3  # relative difference up to which an adjacency in another format is taken for the same model's


@dataclass(frozen=True)
class Measurement:
    """One way to run a model.

    Args:
        name: What ran.
        seconds: Median time of a forward pass.
        peak: Bytes of tensors that a forward pass has allocated at its peak, beside model and graph.
        size: Bytes of the model's parameters and buffers.
    """

    name: str
    seconds: float
    peak: int
    size: int


@dataclass(frozen=True)
class Comparison:
    """Float and packed runs of one model, as :func:`compare` measures them; prints as a table.

    Args:
        runs: Float ones first, the packed model on the data as they are last.
        agreement: Share of rows whose largest output is at the same place in float and packed, :obj:`None` for outputs
            of one column or float weights that are not those that were packed.
        error: Norm of the outputs' difference over that of the float outputs, :obj:`None` likewise.
        exact: Largest difference between the packed and the converted model, :obj:`None` without the latter.
        threads: Of the CPU.
    """

    runs: list[Measurement]
    agreement: float | None
    error: float | None
    exact: float | None
    threads: int

    @property
    def speedup(self) -> float:
        """Of the fastest packed run over the fastest float run."""
        return min(run.seconds for run in self.runs if run not in self._packed) / self._fastest.seconds

    @property
    def _packed(self) -> list[Measurement]:
        return [run for run in self.runs if run.name.startswith(PACKED)]

    @property
    def _fastest(self) -> Measurement:
        return min(self._packed, key=lambda run: run.seconds)

    def __str__(self) -> str:
        packed = self._fastest
        rows = [
            (
                run.name,
                f"{1e3 * run.seconds:.2f}",
                f"{run.seconds / packed.seconds:.2f}x",
                f"{run.peak:,}",
                f"{run.size:,}",
            )
            for run in self.runs
        ]
        lines = [table(("model", "ms", "of packed", "peak bytes", "model bytes"), rows, right=True)]
        if self.agreement is not None:
            lines.append(f"same prediction as float: {self.agreement:.1%} of rows")
        if self.error is not None:
            lines.append(f"difference from float outputs: {self.error:.3g} of their norm")
        if self.exact is not None:
            lines.append(f"largest difference from the converted model: {self.exact:.3g}")
        if packed.name != PACKED:
            lines.append("most of x is zero: qgnn_plugin.data.to_sparse_features(data) says so to either model")
        return "\n".join([*lines, f"median times on {self.threads} thread{'s' * (self.threads != 1)}"])

    __repr__ = __str__


@torch.no_grad()
def compare(
    float_model: nn.Module,
    packed: nn.Module,
    data: Any,
    *,
    qmodel: nn.Module | None = None,
    same_weights: bool = True,
    seconds: float = 5.0,
) -> Comparison:
    """Time, memory, size and agreement of a float and a packed model on ``data``.

    Runs take turns, so that what else the machine does meets all of them.  The float model runs on the adjacency as it
    is and, where that changes nothing but speed, on a ``torch.sparse`` CSR matrix.  Features that are mostly zero, such
    as bags of words, are given to either model as a sparse matrix as well: a dense product with them multiplies by
    zeros, and a packed model first has to look at every one of them.

    Args:
        float_model: The plain model.
        packed: The packed one.
        data: A graph, as :func:`qgnn_plugin.inputs.run_model` takes it.
        qmodel: The converted model, to compare outputs with.
        same_weights: Whether ``float_model`` has the weights that were quantized.
        seconds: About how long to time each run.
    """
    float_model, packed = float_model.eval(), packed.eval()
    size = sum(t.numel() * t.element_size() for t in (*float_model.parameters(), *float_model.buffers()))
    runs: dict[str, tuple[Callable[[], Any], int]] = {"float": (lambda: run_model(float_model, data), size)}
    expected = run_model(float_model, data)
    sparse = _on_csr(float_model, data, expected)
    if sparse is not None:
        runs["float, CSR"] = (lambda: run_model(float_model, sparse), size)
    packed_size = packed_bytes(packed).packed
    found = run_model(packed, data)  # and compiles kernels
    sparse_x = _on_sparse_features(float_model, data, expected), _on_sparse_features(packed, data, found)
    if sparse_x[0] is not None:
        runs["float, sparse x"] = (lambda: run_model(float_model, sparse_x[0]), size)
        both = None if sparse is None else _on_sparse_features(float_model, sparse, expected)
        if both is not None:
            runs["float, CSR, sparse x"] = (lambda: run_model(float_model, both), size)
    if sparse_x[1] is not None:
        runs[f"{PACKED}, sparse x"] = (lambda: run_model(packed, sparse_x[1]), packed_size)
    runs[PACKED] = (lambda: run_model(packed, data), packed_size)
    times = median_seconds({name: run for name, (run, _) in runs.items()}, seconds)
    measured = [Measurement(name, times[name], peak_bytes(run), size) for name, (run, size) in runs.items()]
    agreement = error = exact = None
    if same_weights and isinstance(expected, Tensor):
        labels = getattr(data, "y", None)
        has_numbers = isinstance(labels, Tensor) and labels.is_floating_point()
        if expected.dim() == 2 and expected.size(1) > 1 and not has_numbers:
            agreement = float((expected.argmax(1) == found.argmax(1)).float().mean())
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if qmodel is not None:
        converted = run_model(qmodel.eval(), data)
        exact = float((converted - found).abs().max()) if isinstance(found, Tensor) else None
    return Comparison(measured, agreement, error, exact, torch.get_num_threads())


def _on_csr(model: nn.Module, data: Any, expected: Any) -> Any:
    """``data`` with its adjacency as a CSR matrix where the model computes the same on it, else :obj:`None`."""
    edge_index = getattr(data, "edge_index", None)
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided or not isinstance(expected, Tensor):
        return None
    if any(getattr(data, name, None) is not None for name in ("edge_attr", "edge_weight", "edge_type")):
        return None
    sparse = copy.copy(data)
    del sparse.edge_index
    sparse.adj_t = to_torch_csr_tensor(edge_index.flip(0), size=(data.num_nodes, data.num_nodes))
    return sparse if _is_same(model, sparse, expected) else None


def _on_sparse_features(model: nn.Module, data: Any, expected: Any) -> Any:
    """``data`` with sparse features where most are zero and the model computes the same on them, else :obj:`None`."""
    x = getattr(data, "x", None)
    if not isinstance(x, Tensor) or x.dim() != 2 or not isinstance(expected, Tensor):
        return None
    sparse = to_sparse_features(data, max_density=SPARSE_BELOW)
    return sparse if sparse is not data and _is_same(model, sparse, expected) else None


def _is_same(model: nn.Module, data: Any, expected: Tensor) -> bool:
    """Whether the model takes ``data`` and computes what is expected, up to the order of sums."""
    try:
        found = run_model(model, data)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # such as a layer that only takes edges
    return found.shape == expected.shape and float((found - expected).norm()) <= SAME_PATH * float(expected.norm())


def median_seconds(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each, taking turns, for about ``seconds`` each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for count in range(MOST_RUNS):
        if count >= LEAST_RUNS and time.perf_counter() - start > seconds * len(runs):
            break
        for name, run in runs.items():
            _synchronize()
            before = time.perf_counter()
            run()
            _synchronize()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of tensors that ``run`` has allocated at its peak, beside what is there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
        del result
    inner: Any = profiler.profiler
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in inner.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's library writes to standard error; exceptions still come through."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def score(outputs: Tensor, labels: Tensor, mask: Tensor | None = None) -> float:
    """Accuracy of class logits; of regression outputs minus the mean squared error, so that more is better."""
    if mask is not None:
        outputs, labels = outputs[mask], labels[mask]
    if not labels.numel():
        return math.nan
    if labels.is_floating_point():
        return -float((outputs.view_as(labels) - labels).square().mean())
    return float((outputs.argmax(-1) == labels).float().mean())
