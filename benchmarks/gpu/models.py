"""Whole models: inference against PyG's ways, small graphs, and a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import qgnn_plugin as qgnn
from benchmarks.stacks import STACKS, WIDTHS, build_stack
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.plan import GraphPlan

from .graphs import adjacency, edge_index_of, generated
from .record import Row
from .timing import timed
from .worker import Run, Unit

__all__ = [
    "MODEL_WIDTHS", "TINY_WIDTHS", "Subject", "float_units", "packed_model", "packed_units", "small_units",
    "subject_of", "training_units",
]  # fmt: skip

MODEL_WIDTHS, TINY_WIDTHS = WIDTHS, (8, 8, 8, 4)
BITS, DRY_BITS = (2, 4), (2,)
CORA = (2708, 10556, (1433, 64, 7))  # nodes, edges and widths
MOLECULES = (128, 25, 54, (32, 64, 64, 16))  # graphs, nodes and edges of each, widths


def packed_model(model: nn.Module, x: Tensor, edge_index: Tensor, bits: int) -> nn.Module:
    """``model`` converted, calibrated on ``x`` and packed."""
    quantized = qgnn.quantize_model(copy.deepcopy(model), bits=bits)
    qgnn.calibrate(quantized, (x, edge_index), method="ranges")
    return qgnn.pack_model(quantized)


class Subject:
    """A model with its input: what both sides run on."""

    def __init__(self, name: str, edge_index: Tensor, nodes: int, widths: Sequence[int]) -> None:
        # An edge list is normalized once, as a sparse adjacency would be beforehand.
        options = {"cached": True} if name == "GCN" else {}
        device = edge_index.device
        self.name, self.edge_index, self.nodes = name, edge_index, nodes
        self.model = build_stack(name, widths, **options).to(device).eval()
        self.x = torch.randn(nodes, widths[0], device=device)

    def packed(self, bits: int) -> Callable[[], Any]:
        # Ranges are set on a part of a large graph: a float pass over all of it may not fit.
        with torch.no_grad():
            model = packed_model(self.model, *self._calibration, bits)
        x, edge_index = self.x, self.edge_index

        def run() -> Any:
            with torch.no_grad():
                return model(x, edge_index)

        return run

    @cached_property
    def _calibration(self) -> tuple[Tensor, Tensor]:
        if self.edge_index.size(1) <= MOST_CALIBRATED:
            return self.x, self.edge_index
        nodes = self.nodes // 50
        kept = (self.edge_index < nodes).all(0)
        return self.x[:nodes], self.edge_index[:, kept].contiguous()

    def plain(self, edges: Any, dtype: torch.dtype = torch.float32, compiler: str | None = None) -> Callable[[], Any]:
        # A model of its own: a cached normalization belongs to one format of the graph.
        model = copy.deepcopy(self.model).to(dtype)
        x = self.x.to(dtype)
        if compiler is not None:
            model = torch.compile(model, dynamic=False, backend=compiler)  # type: ignore[assignment]

        def run() -> Any:
            with torch.no_grad():
                return model(x, edges)

        return run


MOST_CALIBRATED = 5_000_000  # edges


def subject_of(run: Run, model: str, size: str) -> Subject:
    plan = generated(size, run.device, run.dry)
    return Subject(model, edge_index_of(plan), plan.num_dst, TINY_WIDTHS if run.dry else MODEL_WIDTHS)


def packed_units(run: Run, model: str, size: str) -> Iterator[Unit]:
    subject = subject_of(run, model, size)
    for bits in DRY_BITS if run.dry else BITS:
        needs = (f"{model} int{bits}", f"aggregate int{bits}", f"linear int{bits}")
        yield Unit(f"int{bits}", lambda b=bits: _ours(run, subject, b, size), needs)  # type: ignore[misc]


def _ours(run: Run, subject: Subject, bits: int, graph: str) -> Iterator[Row]:
    with use_backend(run.backend):
        row = timed([subject.packed(bits)])
    yield {"kind": "inference", "model": subject.name, "graph": graph, "name": f"int{bits}", **row}


def float_units(run: Run, model: str, size: str, compiled: bool = False) -> Iterator[Unit]:
    """PyG's ways, the one that most people use first; or those by ``torch.compile``."""
    subject = subject_of(run, model, size)
    ways = _compiled_ways(subject, "eager" if run.dry else "inductor") if compiled else _ways(subject)
    for name, make in ways.items():
        yield Unit(name, lambda n=name, m=make: _theirs(subject, n, m, size))  # type: ignore[misc]


def _theirs(subject: Subject, name: str, make: Callable[[], Callable[[], Any]], graph: str) -> Iterator[Row]:
    yield {"kind": "inference", "model": subject.name, "graph": graph, "name": name, **timed([make()])}


def _compiled_ways(subject: Subject, compiler: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    edge_index = subject.edge_index
    return {
        "PyG edge_index fp32, compiled": lambda: subject.plain(edge_index, compiler=compiler),
        "PyG edge_index bf16, compiled": lambda: subject.plain(edge_index, torch.bfloat16, compiler),
    }


def _ways(subject: Subject) -> dict[str, Callable[[], Callable[[], Any]]]:
    edge_index, nodes = subject.edge_index, subject.nodes

    def csr(dtype: torch.dtype = torch.float32) -> Tensor:
        return adjacency(GraphPlan.from_edges(edge_index[0], edge_index[1], nodes, nodes), dtype)

    def sorted_index() -> Any:
        from torch_geometric import EdgeIndex

        found = EdgeIndex(edge_index, sparse_size=(nodes, nodes), sort_order="col")
        return found.fill_cache_()

    def tf32() -> Callable[[], Any]:
        run = subject.plain(csr())

        def allowed() -> Any:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                return run()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return allowed

    return {
        "PyG CSR fp32": lambda: subject.plain(csr()),
        "PyG EdgeIndex fp32": lambda: subject.plain(sorted_index()),
        "PyG edge_index fp32": lambda: subject.plain(edge_index),
        "PyG CSR fp32, TF32": tf32,
        "PyG CSR fp16": lambda: subject.plain(csr(torch.float16), torch.float16),
        "PyG edge_index bf16": lambda: subject.plain(edge_index, torch.bfloat16),
        "PyG edge_index fp16": lambda: subject.plain(edge_index, torch.float16),
    }


def _random_graph(nodes: int, edges: int, device: torch.device) -> Tensor:
    return torch.randint(nodes, (2, edges), device=device)


def _molecules(graphs: int, nodes: int, edges: int, device: torch.device) -> Tensor:
    """A batch of graphs, one block of the adjacency matrix each."""
    first = torch.arange(graphs, device=device).repeat_interleave(edges) * nodes
    return torch.randint(nodes, (2, graphs * edges), device=device) + first


def small_units(run: Run) -> Iterator[Unit]:
    """Where launches decide: ``ms`` is the replayed graph, ``eager_ms`` and ``host_us`` what a plain call takes."""
    nodes, edges, widths = (24, 60, (16, 8, 4)) if run.dry else CORA
    graphs, atoms, bonds, molecule_widths = (2, 6, 10, (8, 8, 4)) if run.dry else MOLECULES
    inputs = {
        "one graph of Cora's size": (lambda: _random_graph(nodes, edges, run.device), nodes, widths),
        "128 molecules": (lambda: _molecules(graphs, atoms, bonds, run.device), graphs * atoms, molecule_widths),
    }
    for graph, (make, count, sizes) in inputs.items():
        for model in STACKS:
            subject = Subject(model, make(), count, sizes)
            for bits in DRY_BITS if run.dry else BITS:
                needs = (f"{model} int{bits}",)
                call = lambda s=subject, b=bits, g=graph: _ours(run, s, b, g)  # type: ignore[misc] # noqa: E731
                yield Unit(f"{graph}: {model} int{bits}", call, needs)
    for graph, (make, count, sizes) in inputs.items():
        for model in STACKS:
            subject = Subject(model, make(), count, sizes)
            for name, way in _ways(subject).items():
                if name in ("PyG CSR fp32", "PyG edge_index fp32"):
                    call = lambda s=subject, n=name, w=way, g=graph: _theirs(s, n, w, g)  # type: ignore[misc] # noqa: E731
                    yield Unit(f"{graph}: {model} {name}", call)


def training_units(run: Run, plan: GraphPlan | None = None, models: Sequence[str] | None = None) -> Iterator[Unit]:
    """One step: forward, backward and update, eagerly."""
    plan = plan or generated("170k/2M", run.device, run.dry)
    widths = TINY_WIDTHS if run.dry else MODEL_WIDTHS
    x = torch.randn(plan.num_src, widths[0], device=run.device)
    target = torch.randint(widths[-1], (plan.num_src,), device=run.device)
    edge_index = edge_index_of(plan)

    def step(name: str, bits: int | None, compress: bool) -> Callable[[], Any]:
        model: nn.Module = build_stack(name, widths).to(run.device)
        if bits is not None:
            model = qgnn.quantize_model(model, bits=bits)
            qgnn.calibrate(model, (x, edge_index), method="ranges")
        model.train()
        optimizer = torch.optim.Adam(model.parameters())

        def once() -> None:
            optimizer.zero_grad()
            with qgnn.compressed_activations() if compress else nullcontext():
                loss = nn.functional.cross_entropy(model(x, edge_index), target)
            loss.backward()
            optimizer.step()

        return once

    def rows(name: str, bits: int | None, compress: bool) -> Iterator[Row]:
        label = "fp32" if bits is None else f"int{bits}{', compressed' if compress else ''}"
        with use_backend(run.backend):
            figures = timed([step(name, bits, compress)], graphed=False)
        yield {"kind": "training", "model": name, "graph": "170k/2M", "name": label, **figures}

    for name in models or (("GCN",) if run.dry else STACKS):
        for bits, compress in ((None, False), (2, False), (2, True), (4, False)):
            needs = () if bits is None else (f"fake_quantize int{bits}",)
            call = lambda n=name, b=bits, c=compress: rows(n, b, c)  # type: ignore[misc] # noqa: E731
            yield Unit(f"{name} {bits or 'fp32'}{' compressed' if compress else ''}", call, needs)
