"""Whole models on the device: inference against PyG's best float paths, and one training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_timing import median_ms, peak_bytes
from qgnn_plugin.kernels.plan import GraphPlan

__all__ = ["inference_rows", "training_rows"]

WIDTHS = (128, 256, 256, 40)
HEADS = 4


class Stack(nn.Module):
    """Three convolutions with ReLU between them."""

    def __init__(self, convs: list[nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x, edge_index)
            if i + 1 < len(self.convs):
                x = x.relu()
        return x


def _models(widths: tuple[int, ...]) -> dict[str, Callable[[], Stack]]:
    from torch_geometric.nn import GATConv, GCNConv, SAGEConv

    pairs = list(pairwise(widths))
    last = len(pairs) - 1

    def gat(i: int, a: int, b: int) -> nn.Module:
        out = b if i == last else b // HEADS
        return GATConv(a, out, heads=1 if i == last else HEADS)

    return {
        "GCN": lambda: Stack([GCNConv(a, b, cached=True) for a, b in pairs]),
        "GraphSAGE": lambda: Stack([SAGEConv(a, b) for a, b in pairs]),
        "GAT": lambda: Stack([gat(i, a, b) for i, (a, b) in enumerate(pairs)]),
    }


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
    for model_name, make in _models(widths).items():
        torch.manual_seed(0)
        model = make().to(device).eval()

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
        model: nn.Module = _models(widths)["GCN"]().to(device)
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
