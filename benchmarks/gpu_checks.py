"""Correctness of every op on the device against its reference; timings start only when it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.smp_step import smp_step
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize

__all__ = ["checks", "model_checks", "poisoned", "run_checks"]

Check = tuple[str, bool, Callable[[], Any]]  # name, whether bitwise, what to run


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialized tensors start as NaN or the largest integer, so unwritten outputs show."""
    saved = {(owner, name): getattr(owner, name) for owner, name in _ALLOCATORS}

    def wrap(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return allocated

    for (owner, name), allocate in saved.items():
        setattr(owner, name, wrap(allocate))
    try:
        yield
    finally:
        for (owner, name), allocate in saved.items():
            setattr(owner, name, allocate)


_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))


def _packed(rows: int, features: int, bits: int, device: torch.device) -> Tensor:
    return pack_codes(torch.randint(0, 2**bits, (rows, features), device=device), bits)


def checks(plan: GraphPlan, features: int, heads: int) -> Iterator[Check]:
    """Every op at 2, 4 and 8 bits with fresh random inputs."""
    for bits in (2, 4, 8):
        for name, exact, run in _rowwise(plan, features, bits):
            yield f"{name} int{bits}", exact, run
        for name, exact, run in _over_edges(plan, features, heads, bits):
            yield f"{name} int{bits}", exact, run


def _ranges(features: int, bits: int, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """A range per tensor, one per column, and the arguments of packed output."""
    one = torch.tensor([0.3], device=device), torch.tensor([-0.5], device=device)
    column = torch.rand(features, device=device) + 0.1, torch.randn(features, device=device)
    return one, column, {"out_scale": one[0], "out_offset": one[1], "out_bits": bits}


def _rowwise(plan: GraphPlan, features: int, bits: int) -> list[Check]:
    device, nodes = plan.device, plan.num_src
    one, column, out = _ranges(features, bits, device)
    x, grad = torch.randn(2, nodes, features, device=device)
    words, w = _packed(nodes, features, bits, device), _packed(64, features, bits, device)
    product = (words, w, *one, *one, features, bits, bits)
    return [
        ("quantize_pack", True, lambda: quantize_pack(x, *column, bits)),
        ("unpack_dequantize", True, lambda: unpack_dequantize(words, *column, features, bits)),
        ("fake_quantize", False, lambda: _fake_quantize(x, grad, *column, bits)),
        ("fake_quantize, one range", False, lambda: _fake_quantize(x, grad, *one, bits)),
        ("linear", True, lambda: linear(*product, relu=True)),
        ("linear packed", True, lambda: linear(*product, **out)),
    ]


def _over_edges(plan: GraphPlan, features: int, heads: int, bits: int) -> list[Check]:
    device, nodes = plan.device, plan.num_src
    _, column, out = _ranges(features, bits, device)
    rows = (_packed(nodes, features, bits, device), plan, *column, features, bits)
    x, x_dst = torch.randn(2, nodes, features, device=device)
    norm = plan.degree.clamp(min=1).rsqrt()
    weight = torch.rand(plan.num_edges, device=device)
    source, target = torch.randn(2, nodes, heads, device=device)
    gat = {"heads": heads, "alpha_src": source, "alpha_dst": target}
    att = torch.randn(heads, features // heads, device=device)
    v2 = {"heads": heads, "att": att, "x_dst": x_dst}
    smp: dict[str, Any] = {
        "eta": 0.1, "mu": 9.0, "multiplier": 0.1, "words": rows[0], "scale": column[0],
        "offset": column[1], "bits": bits,
    }  # fmt: skip
    return [
        ("aggregate sum", True, lambda: aggregate(*rows, dst_scale=norm, relu=True)),
        ("aggregate packed", True, lambda: aggregate(*rows, reduce="mean", **out)),
        ("aggregate max", True, lambda: aggregate(*rows, reduce="max")),
        ("aggregate weighted", False, lambda: aggregate(*rows, edge_weight=weight)),
        ("attention 4 bits", True, lambda: attention_aggregate(*rows, attention_bits=4, **gat)),
        ("attention float", False, lambda: attention_aggregate(*rows, **gat)),
        ("attention v2", False, lambda: attention_aggregate(*rows, **v2)),
        ("smp_step", False, lambda: smp_step(x, x_dst, plan, norm, **smp)),
    ]


def _fake_quantize(x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor, bits: int) -> tuple[Tensor | None, ...]:
    leaves = [v.clone().requires_grad_() for v in (x, scale, offset)]
    y = fake_quantize(*leaves, bits)
    y.backward(grad)
    return y.detach(), *(leaf.grad for leaf in leaves)


def _differs(want: Tensor, got: Tensor, exact: bool) -> str | None:
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
    if exact or not want.is_floating_point():
        wrong = int((want != got).sum())
        return f"{wrong} of {want.numel()} entries differ" if wrong else None
    scale = max(1e-6, float(want.abs().max())) if want.numel() else 1.0
    error = float((want - got).abs().max()) / scale if want.numel() else 0.0
    return None if error <= 1e-4 else f"relative error {error:.2e}"


def run_checks(plan: GraphPlan, features: int, heads: int, backend: str) -> list[dict[str, Any]]:
    """One row per check; ``error`` is :obj:`None` where it holds."""
    rows = []
    for name, exact, run in checks(plan, features, heads):
        try:
            with use_backend("torch"):
                want = run()
            with use_backend(backend), poisoned():
                got = run()
            pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (want, got)), strict=True)
            found = [message for a, b in pairs if (message := _differs(a, b, exact))]
            error = "; ".join(found) or None
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        rows.append({"check": name, "features": features, "exact": exact, "error": error})
        print(f"{name:28} F={features:4} {'ok' if error is None else 'FAILED ' + error}", flush=True)
    return rows


def model_checks(plan: GraphPlan, widths: tuple[int, ...], backend: str) -> list[dict[str, Any]]:
    """Packed models on the device against the same models on the reference backend."""
    from benchmarks.gpu_models import edge_index_of, packed_model
    from benchmarks.stacks import STACKS, build_stack

    x, edge_index = torch.randn(plan.num_src, widths[0], device=plan.device), edge_index_of(plan)
    rows = []
    for name in STACKS:
        for bits in (2, 4):
            try:
                model = packed_model(build_stack(name, widths).to(plan.device).eval(), x, edge_index, bits)
                fresh = torch.randn_like(x)
                with use_backend("torch"):
                    want = model(fresh, edge_index)
                with use_backend(backend), poisoned():
                    got = model(fresh, edge_index)
                error = _differs(want, got, exact=False)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
            rows.append({"check": f"{name} int{bits}", "features": widths[0], "exact": False, "error": error})
            print(f"{name:24} int{bits} {'ok' if error is None else 'FAILED ' + error}", flush=True)
    return rows
