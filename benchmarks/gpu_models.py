"""Whole models on the device: inference against PyG's best float paths, and one training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_timing import median_ms, peak_bytes
from benchmarks.stacks import STACKS, WIDTHS, build_stack
from qgnn_plugin.kernels.plan import GraphPlan

__all__ = ["edge_index_of", "inference_rows", "packed_model", "training_rows"]


def _graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _row(name: str, build: Callable[[], Callable[[], Any]], repeats: int) -> list[dict[str, Any]]:
    """Eager and CUDA-graphed; a failure is recorded, not hidden and not fatal to the others."""
    rows = []
    try:
        run = build()
        eager = {"name": name, "ms": median_ms([run], repeats), "peak_bytes": peak_bytes(run)}
        rows.append(eager)
        if torch.cuda.is_available():
            rows.append({"name": f"{name}, CUDA graph", "ms": median_ms([_graphed(run)], repeats)})
    except Exception as problem:
        rows.append({"name": name, "error": f"{type(problem).__name__}: {problem}"})
    return rows


def edge_index_of(plan: GraphPlan) -> Tensor:
    """The graph as PyG's ``edge_index``."""
    return torch.stack([plan.col.long(), plan.dst])


def _adjacency(plan: GraphPlan) -> Tensor:
    value = torch.ones(plan.num_edges, device=plan.device)
    return torch.sparse_csr_tensor(plan.rowptr, plan.col.long(), value, (plan.num_dst, plan.num_src))


def packed_model(model: nn.Module, x: Tensor, edge_index: Tensor, bits: int) -> nn.Module:
    """``model`` converted, calibrated on ``x`` and packed."""
    import qgnn_plugin as qgnn

    quantized = qgnn.quantize_model(copy.deepcopy(model), bits=bits)
    qgnn.calibrate(quantized, (x, edge_index))
    return qgnn.pack_model(quantized)


def inference_rows(plan: GraphPlan, widths: tuple[int, ...] = WIDTHS, repeats: int = 20) -> Iterator[dict[str, Any]]:
    device = plan.device
    x = torch.randn(plan.num_src, widths[0], device=device)
    edge_index = edge_index_of(plan)
    for model_name in STACKS:
        # An edge list is normalized once, as a sparse adjacency would be beforehand.
        options = {"cached": True} if model_name == "GCN" else {}
        model = build_stack(model_name, widths, **options).to(device).eval()

        # Each side has a model of its own: a cached normalization belongs to one format of the graph.
        def plain(edges: Any, model: nn.Module = model) -> Callable[[], Any]:
            own = copy.deepcopy(model)
            return torch.inference_mode()(lambda: own(x, edges))

        def autocast(dtype: torch.dtype, model: nn.Module = model) -> Callable[[], Any]:
            own = copy.deepcopy(model)

            def run() -> Any:
                with torch.inference_mode(), torch.autocast(device.type, dtype):
                    return own(x, edge_index)

            return run

        def packed(bits: int, model: nn.Module = model) -> Callable[[], Any]:
            ready = packed_model(model, x, edge_index, bits)
            return torch.no_grad()(lambda: ready(x, edge_index))

        builds: dict[str, Callable[[], Callable[[], Any]]] = {
            "PyG edge_index fp32": partial(plain, edge_index),
            "PyG CSR fp32": lambda f=plain: f(_adjacency(plan)),  # type: ignore[misc]
            "PyG edge_index bf16 autocast": partial(autocast, torch.bfloat16),
            "int2": partial(packed, 2),
            "int4": partial(packed, 4),
        }
        for name, build in builds.items():
            for row in _row(name, build, repeats):
                yield {"model": model_name, **row}


def training_rows(plan: GraphPlan, widths: tuple[int, ...] = WIDTHS, repeats: int = 10) -> Iterator[dict[str, Any]]:
    """One step of a GCN: forward, backward and update."""
    device = plan.device
    x = torch.randn(plan.num_src, widths[0], device=device)
    target = torch.randint(widths[-1], (plan.num_src,), device=device)
    edge_index = edge_index_of(plan)

    def step(bits: int | None, compress: bool) -> Callable[[], Any]:
        import qgnn_plugin as qgnn

        model: nn.Module = build_stack("GCN", widths).to(device)
        if bits is not None:
            model = qgnn.quantize_model(model, bits=bits)
            qgnn.calibrate(model, (x, edge_index))
        model.train()
        optimizer = torch.optim.Adam(model.parameters())

        def run() -> None:
            optimizer.zero_grad()
            with qgnn.compressed_activations() if compress else nullcontext():
                loss = nn.functional.cross_entropy(model(x, edge_index), target)
            loss.backward()
            optimizer.step()

        return run

    for name, bits in (("fp32", None), ("int2", 2), ("int4", 4)):
        for compress in (False, True) if bits else (False,):
            try:
                run = step(bits, compress)
                row = {"ms": median_ms([run], repeats), "peak_bytes": peak_bytes(run)}
            except Exception as problem:
                row = {"error": f"{type(problem).__name__}: {problem}"}
            yield {"model": "GCN", "name": f"{name} training step{', compressed' if compress else ''}", **row}
