"""Kernels alone: ``aggregate`` against cuSPARSE and copies, ``linear`` against half-precision products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import row_words
from qgnn_plugin.kernels.linear import Product, linear
from qgnn_plugin.kernels.linear_pair import linear_pair
from qgnn_plugin.kernels.plan import GraphPlan

from .graphs import adjacency, generated
from .record import Row
from .timing import copies, copy_bandwidth, timed
from .worker import Run, Unit

__all__ = [
    "FORMS", "PAIR", "aggregate_calls", "aggregate_units", "device_units", "linear_calls", "linear_units",
    "random_words",
]  # fmt: skip

FEATURES, DRY_FEATURES = (256, 128, 64, 512), (8,)
SHAPES, DRY_SHAPES = ((256, 256), (128, 256), (256, 40), (512, 256)), ((16, 16),)
BITS, DRY_BITS = (2, 4, 8), (2,)
# What leaves a kernel: codes with row multipliers, as the default configuration has them in and out; codes of one
# range; floats.
FORMS = {"rows": " rows out", "packed": " packed out", "floats": ""}
PAIR = "pair"  # of linear alone: the sum of two products, as GraphSAGE has it, in the first of these forms


def device_units(run: Run) -> Iterator[Unit]:
    """The card, and the two ceilings: copies and half-precision products."""

    def described() -> Iterator[Row]:
        row: Row = {"kind": "device", "name": "dry run", "environment": environment(torch.get_num_threads())}
        if not run.dry:
            properties = torch.cuda.get_device_properties(run.device)
            row |= {
                "name": properties.name, "capability": list(torch.cuda.get_device_capability(run.device)),
                "processors": properties.multi_processor_count, "memory": properties.total_memory,
                "cache": getattr(properties, "L2_cache_size", None), "cuda": torch.version.cuda,
            }  # fmt: skip
        yield row

    def copied() -> Iterator[Row]:
        for exponent in (16,) if run.dry else (26, 30, 32):
            size = 1 << exponent
            yield {"kind": "ceiling", "name": "copy", "bytes": size, **copy_bandwidth(run.device, size)}

    def multiplied() -> Iterator[Row]:
        size = 32 if run.dry else 8192
        a, b = torch.randn(2, size, size, device=run.device).to(torch.float32 if run.dry else torch.bfloat16)
        row = timed([lambda: a @ b], peak=False)
        yield {"kind": "ceiling", "name": "bf16 product", **row, "operations_per_second": 2e3 * size**3 / row["ms"]}

    yield Unit("card", described)
    yield Unit("copies", copied)
    yield Unit("products", multiplied)


def random_words(rows: int, words: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, words), device=device).to(torch.int32)


@contextmanager
def _tf32(enabled: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _form(form: str, rows: int, bits: int, device: torch.device) -> dict[str, Any]:
    """Arguments of an op in one of :data:`FORMS`."""
    assert form in FORMS
    if form == "floats":
        return {}
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    out = {"out_scale": one, "out_offset": zero, "out_bits": bits}
    if form == "packed":
        return out
    multiplier = torch.randint(1, LARGEST_MULTIPLIER + 1, (rows,), device=device, dtype=torch.uint8)
    return {**out, "multiplier": multiplier, "out_unit": one}


def aggregate_calls(plan: GraphPlan, features: int, bits: int, form: str) -> list[Callable[[], Any]]:
    """One call per buffer, in one of :data:`FORMS`."""
    device, words = plan.device, row_words(features, bits)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    out = _form(form, plan.num_src, bits, device)
    inputs = copies(lambda: random_words(plan.num_src, words, device))
    return [lambda x=x: aggregate(x, plan, one, zero, features, bits, **out) for x in inputs]  # type: ignore[misc]


def aggregate_bytes(plan: GraphPlan, features: int, row: int, written: int) -> Row:
    """Bytes that must move: every source row read once, or once per edge; columns, row ends and results."""
    once = min(plan.num_edges, plan.num_src) * row
    must = once + plan.num_dst * written + 4 * plan.num_edges + 20 * plan.num_dst
    return {"bytes_once": must, "bytes_gathered": must - once + plan.num_edges * row}


def aggregate_units(run: Run, size: str) -> Iterator[Unit]:
    """Ours first, then what there is otherwise."""
    plan = generated(size, run.device, run.dry)
    for features in DRY_FEATURES if run.dry else FEATURES:
        base = {
            "kind": "aggregate", "graph": size, "nodes": plan.num_dst, "edges": plan.num_edges, "features": features,
        }  # fmt: skip
        for bits in DRY_BITS if run.dry else BITS:
            needs = (f"aggregate int{bits}",)
            name = f"int{bits} F={features}"
            yield Unit(name, lambda f=features, b=bits, r=base: _packed(run, plan, f, b, r), needs)  # type: ignore[misc]
        for name, rows in _otherwise(plan, features).items():
            yield Unit(f"{name} F={features}", lambda n=name, r=rows, b=base: _one(n, r, b))  # type: ignore[misc]


def _one(name: str, make: Callable[[], Row], base: Row) -> Iterator[Row]:
    yield {**base, "name": name, **make()}


def _packed(run: Run, plan: GraphPlan, features: int, bits: int, base: Row) -> Iterator[Row]:
    words = row_words(features, bits)
    for form, label in FORMS.items():
        with use_backend(run.backend):
            row = timed(aggregate_calls(plan, features, bits, form))
        multipliers = form == "rows"
        written = 4 * features if form == "floats" else 4 * words + multipliers
        moved = aggregate_bytes(plan, features, 4 * words + multipliers, written)
        yield {**base, "name": f"int{bits}{label}", **row, **moved}


def _otherwise(plan: GraphPlan, features: int) -> dict[str, Callable[[], Row]]:
    """cuSPARSE on a matrix made beforehand, by index and value type, and message passing over an edge list."""
    device = plan.device

    def inputs(dtype: torch.dtype) -> list[Tensor]:
        return copies(lambda: torch.randn(plan.num_src, features, device=device).to(dtype))

    def sparse(dtype: torch.dtype, index: torch.dtype, tf32: bool = False) -> Callable[[], Row]:
        def row() -> Row:
            matrix = adjacency(plan, dtype, index)
            size = dtype.itemsize
            with _tf32(tf32):
                figures = timed([lambda x=x: matrix @ x for x in inputs(dtype)])  # type: ignore[misc]
            return {**figures, **aggregate_bytes(plan, features, size * features, size * features)}

        return row

    def scattered() -> Row:
        source = plan.col.long()

        def run(x: Tensor) -> Tensor:
            return x.new_zeros(plan.num_dst, x.size(1)).index_add_(0, plan.dst, x.index_select(0, source))

        return timed([lambda x=x: run(x) for x in inputs(torch.float32)])  # type: ignore[misc]

    return {
        "cuSPARSE fp32 int32": sparse(torch.float32, torch.int32),
        "cuSPARSE fp32 int64": sparse(torch.float32, torch.int64),
        "cuSPARSE fp32 int32 TF32": sparse(torch.float32, torch.int32, tf32=True),
        "cuSPARSE fp16 int32": sparse(torch.float16, torch.int32),
        "cuSPARSE fp16 int64": sparse(torch.float16, torch.int64),
        "edge_index fp32": scattered,
    }


def linear_calls(
    rows: int, inputs: int, outputs: int, bits: int, form: str, device: torch.device
) -> list[Callable[[], Any]]:
    """One call per buffer, in one of :data:`FORMS` or as a :data:`PAIR`, with a range per output channel, as packed
    models call it.
    """
    weights = random_words(outputs, row_words(inputs, bits), device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    scale, offset = torch.rand(outputs, device=device) + 0.1, torch.randn(outputs, device=device)
    out = _form("rows" if form == PAIR else form, rows, bits, device)
    if form == PAIR:
        times = out.pop("multiplier")
        ranges = (one, zero, scale, offset, inputs, bits, bits, None, times)
        buffers = copies(lambda: random_words(rows, 2 * row_words(inputs, bits), device).view(2, rows, -1))
        return [
            lambda x=x: linear_pair(Product(x[0], weights, *ranges), Product(x[1], weights, *ranges), relu=True, **out)  # type: ignore[misc]
            for x in buffers
        ]
    buffers = copies(lambda: random_words(rows, row_words(inputs, bits), device))
    return [
        lambda x=x: linear(x, weights, one, zero, scale, offset, inputs, bits, bits, relu=True, **out)  # type: ignore[misc]
        for x in buffers
    ]


def linear_units(run: Run, size: str) -> Iterator[Unit]:
    rows = generated(size, run.device, run.dry).num_dst
    for inputs, outputs in DRY_SHAPES if run.dry else SHAPES:
        base = {"kind": "linear", "rows": rows, "shape": f"{inputs}x{outputs}"}

        def ours(bits: int, inputs: int = inputs, outputs: int = outputs, base: Row = base) -> Iterator[Row]:
            for form, label in {**FORMS, PAIR: " pair, rows out"}.items():
                with use_backend(run.backend):
                    row = timed(linear_calls(rows, inputs, outputs, bits, form, run.device))
                yield {**base, "name": f"int{bits}{label}", **row}

        def product(dtype: torch.dtype, tf32: bool, inputs: int = inputs, outputs: int = outputs) -> Row:
            weight = torch.randn(inputs, outputs, device=run.device).to(dtype)
            buffers = copies(lambda: torch.randn(rows, inputs, device=run.device).to(dtype))
            with _tf32(tf32):
                return timed([lambda x=x: x @ weight for x in buffers])  # type: ignore[misc]

        for bits in DRY_BITS if run.dry else BITS:
            yield Unit(f"int{bits} {inputs}x{outputs}", lambda b=bits, f=ours: f(b), (f"linear int{bits}",))  # type: ignore[misc]
        for name, dtype, tf32 in (
            ("fp32", torch.float32, False), ("fp32 TF32", torch.float32, True), ("bf16", torch.bfloat16, False),
        ):  # fmt: skip
            make = lambda d=dtype, t=tf32, f=product: f(d, t)  # type: ignore[misc] # noqa: E731
            yield Unit(f"{name} {inputs}x{outputs}", lambda n=name, m=make, b=base: _one(n, m, b))  # type: ignore[misc]
