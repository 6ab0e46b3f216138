"""Correctness where offsets pass 32 bits: sampled rows of a large graph against the reference on those rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import row_words
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize

from .checks import checked, differs, poisoned
from .graphs import generated, rows_of
from .kernels import random_words
from .record import Row
from .worker import Run, Unit

__all__ = ["sample", "units"]

SAMPLED = 2000
HUBS = 3  # of the largest
FEATURES, HEADS, OUTPUTS = 256, 4, 256
WIDE = 1152  # floats of a row: 2M rows of them pass 2^31 elements


def sample(plan: GraphPlan, count: int) -> Tensor:
    """Row numbers: the first, the last, the largest hubs and random ones."""
    degree = plan.rowptr[1:] - plan.rowptr[:-1]
    hubs = torch.topk(degree, min(HUBS, plan.num_dst)).indices
    ends = torch.tensor([0, plan.num_dst - 1], device=plan.device)
    return torch.cat([ends, hubs, torch.randint(plan.num_dst, (count,), device=plan.device)])


def units(run: Run) -> Iterator[Unit]:
    plan = generated("2M/100M", run.device, run.dry)
    features, wide = (16, 24) if run.dry else (FEATURES, WIDE)
    rows = sample(plan, 8 if run.dry else SAMPLED)
    part = rows_of(plan, rows)
    for bits in (2,) if run.dry else (2, 4, 8):
        for op, check in _checks(plan, part, rows, features, wide, bits).items():

            def row(op: str = op, bits: int = bits, check: Callable[[str], str | None] = check) -> Iterator[Row]:
                facts = {"check": f"{op} int{bits}, sampled rows", "features": features}
                yield checked(f"{op.split()[0]} int{bits}", lambda: check(run.backend), **facts)

            yield Unit(f"{op} int{bits}", row)


def _checks(
    plan: GraphPlan, part: GraphPlan, rows: Tensor, features: int, wide: int, bits: int
) -> dict[str, Callable[[str], str | None]]:
    device, nodes = plan.device, plan.num_src
    scale, offset = torch.rand(features, device=device) + 0.1, torch.randn(features, device=device)
    one, start = torch.tensor([0.3], device=device), torch.tensor([-0.5], device=device)
    out: dict[str, Any] = {"out_scale": one, "out_offset": start, "out_bits": bits}
    sources, targets = torch.randn(2, nodes, HEADS, device=device)

    def words(count: int = features) -> Tensor:
        return random_words(nodes, row_words(count, bits), device)

    def summed(backend: str, **more: Any) -> str | None:
        values = words()
        args = (scale, offset, features, bits)
        return _sampled(
            backend, rows, lambda: aggregate(values, plan, *args, **more),
            lambda: aggregate(values, part, *args, **more),
        )  # fmt: skip

    def attended(backend: str) -> str | None:
        values = words()
        more: dict[str, Any] = {"heads": HEADS, "alpha_src": sources, "attention_bits": 4}
        args = (scale, offset, features, bits)
        return _sampled(
            backend, rows, lambda: attention_aggregate(values, plan, *args, alpha_dst=targets, **more),
            lambda: attention_aggregate(values, part, *args, alpha_dst=targets[rows], **more),
        )  # fmt: skip

    def multiplied(backend: str) -> str | None:
        values, weights = words(), random_words(OUTPUTS, row_words(features, bits), device)
        return _sampled(
            backend, rows, lambda: linear(values, weights, one, start, one, start, features, bits, bits, **out),
            lambda: linear(values[rows], weights, one, start, one, start, features, bits, bits, **out),
        )  # fmt: skip

    def packed(backend: str) -> str | None:
        x = torch.randn(nodes, features, device=device)
        return _sampled(
            backend, rows, lambda: quantize_pack(x, scale, offset, bits),
            lambda: quantize_pack(x[rows], scale, offset, bits),
        )  # fmt: skip

    def unpacked(backend: str) -> str | None:
        values = words(wide)
        return _sampled(
            backend, rows, lambda: unpack_dequantize(values, one, start, wide, bits),
            lambda: unpack_dequantize(values[rows], one, start, wide, bits),
        )  # fmt: skip

    return {
        "aggregate": summed, "aggregate packed": lambda backend: summed(backend, **out),
        "aggregate max": lambda backend: summed(backend, reduce="max"), "attention": attended, "linear": multiplied,
        "quantize_pack": packed, "unpack_dequantize": unpacked,
    }  # fmt: skip


def _sampled(backend: str, rows: Tensor, whole: Callable[[], Tensor], reference: Callable[[], Tensor]) -> str | None:
    with use_backend(backend), poisoned():
        got = whole()[rows]
    with use_backend("torch"):
        return differs(reference(), got, exact=True)
