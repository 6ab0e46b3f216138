"""Whole models on the device: inference against PyG's best float paths, and one training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_timing import median_ms, peak_bytes
from benchmarks.stacks import STACKS, WIDTHS, build_stack
from qgnn_plugin.kernels.plan import GraphPlan

__all__ = ["inference_rows", "training_rows"]


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


def _edge_index(plan: GraphPlan) -> Tensor:
    return torch.stack([plan.col.long(), plan.dst])


def _adjacency(plan: GraphPlan) -> Tensor:
    value = torch.ones(plan.num_edges, device=plan.device)
    return torch.sparse_csr_tensor(plan.rowptr, plan.col.long(), value, (plan.num_dst, plan.num_src))


def inference_rows(plan: GraphPlan, widths: tuple[int, ...] = WIDTHS, repeats: int = 20) -> Iterator[dict[str, Any]]:
    device = plan.device
    x = torch.randn(plan.num_src, widths[0], device=device)
    edge_index = _edge_index(plan)
    for model_name in STACKS:
        # An edge list is normalized once, as a sparse adjacency would be beforehand.
        options = {"cached": True} if model_name == "GCN" else {}
        model = build_stack(model_name, widths, **options).to(device)

        def plain(model: nn.Module = model, edges: Any = edge_index) -> Callable[[], Any]:
            return torch.inference_mode()(lambda: model(x, edges))

        def autocast(model: nn.Module = model) -> Callable[[], Any]:
            def run() -> Any:
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                    return model(x, edge_index)

            return run

        def packed(bits: int, model: nn.Module = model) -> Callable[[], Any]:
            import qgnn_plugin as qgnn

            quantized = qgnn.quantize_model(copy.deepcopy(model), bits=bits)
            qgnn.calibrate(quantized, (x, edge_index))
            ready = qgnn.pack_model(quantized)
            return torch.inference_mode()(lambda: ready(x, edge_index))

        builds: dict[str, Callable[[], Callable[[], Any]]] = {
            "PyG edge_index fp32": plain,
            "PyG CSR fp32": lambda f=plain, m=model: f(  # type: ignore[misc]
                copy.deepcopy(m), _adjacency(plan)
            ),
            "PyG edge_index bf16 autocast": autocast,
            "int2": lambda f=packed: f(2),  # type: ignore[misc]
            "int4": lambda f=packed: f(4),  # type: ignore[misc]
        }
        for name, build in builds.items():
            for row in _row(name, build, repeats):
                yield {"model": model_name, **row}


def training_rows(plan: GraphPlan, widths: tuple[int, ...] = WIDTHS, repeats: int = 10) -> Iterator[dict[str, Any]]:
    """One step of a GCN: forward, backward and update."""
    device = plan.device
    x = torch.randn(plan.num_src, widths[0], device=device)
    target = torch.randint(widths[-1], (plan.num_src,), device=device)
    edge_index = _edge_index(plan)

    def step(bits: int | None) -> Callable[[], Any]:
        model: nn.Module = build_stack("GCN", widths, cached=True).to(device)
        if bits is not None:
            import qgnn_plugin as qgnn

            model = qgnn.quantize_model(model, bits=bits)
            qgnn.calibrate(model, (x, edge_index))
        model.train()
        optimizer = torch.optim.Adam(model.parameters())

        def run() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x, edge_index), target).backward()
            optimizer.step()

        return run

    for name, bits in (("fp32", None), ("int2", 2), ("int4", 4)):
        try:
            run = step(bits)
            row = {"ms": median_ms([run], repeats), "peak_bytes": peak_bytes(run)}
        except Exception as problem:
            row = {"error": f"{type(problem).__name__}: {problem}"}
        yield {"model": "GCN", "name": f"{name} training step", **row}
