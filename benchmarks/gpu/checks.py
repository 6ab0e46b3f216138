"""Correctness of every op and model on the device against its reference: what fails is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.attention_aggregate import attention_aggregate
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.head_dots import head_dots
from qgnn_plugin.kernels.head_linear import head_linear
from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.linear import Product, linear
from qgnn_plugin.kernels.linear_pair import linear_pair
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.smp_step import smp_step
from qgnn_plugin.kernels.triton.autotune import power_law_plan
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize

from .graphs import edge_index_of
from .record import Row
from .worker import Run, Unit

__all__ = ["checked", "checks", "compare", "differs", "model_units", "op_units", "poisoned"]

BITS, DRY_BITS = (2, 4, 8), (2,)

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


def checks(plan: GraphPlan, features: int, heads: int, widths: tuple[int, ...] = BITS) -> Iterator[Check]:
    """Every op at these widths with fresh random inputs."""
    for bits in widths:
        for name, exact, run in _rowwise(plan, features, bits):
            yield f"{name} int{bits}", exact, run
        for name, exact, run in _over_edges(plan, features, heads, bits):
            yield f"{name} int{bits}", exact, run
        for name, exact, run in _of_multiplied_rows(plan, features, heads, bits):
            yield f"{name}, rows int{bits}", exact, run


def _ranges(features: int, bits: int, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """A range per tensor, one per column, and the arguments of packed output."""
    one = torch.tensor([0.3], device=device), torch.tensor([-0.5], device=device)
    column = torch.rand(features, device=device) + 0.1, torch.randn(features, device=device)
    return one, column, {"out_scale": one[0], "out_offset": one[1], "out_bits": bits}


def _rowwise(plan: GraphPlan, features: int, bits: int) -> list[Check]:
    device, nodes = plan.device, plan.num_src
    one, column, out = _ranges(features, bits, device)
    x, grad = torch.randn(2, nodes, features, device=device)
    awkward = x.clone()
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 0.0, -0.0, 1e-44)):
        awkward[i::8, i % features] = value
    words, w = _packed(nodes, features, bits, device), _packed(64, features, bits, device)
    product, bias = (words, w, *one, *one, features, bits, bits), torch.randn(64, device=device)
    return [
        ("quantize_pack", True, lambda: quantize_pack(x, *column, bits)),
        ("quantize_pack, no numbers", True, lambda: quantize_pack(awkward, *one, bits)),
        ("unpack_dequantize", True, lambda: unpack_dequantize(words, *column, features, bits)),
        ("fake_quantize", False, lambda: _fake_quantize(x, grad, *column, bits)),
        ("fake_quantize, one range", False, lambda: _fake_quantize(x, grad, *one, bits)),
        ("linear", True, lambda: linear(*product, relu=True)),
        ("linear packed", True, lambda: linear(*product, **out)),
        ("linear pair", True, lambda: linear_pair(Product(*product), Product(*product, bias), relu=True)),
        ("linear pair packed", True, lambda: linear_pair(Product(*product, bias), Product(*product), **out)),
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


def _of_multiplied_rows(plan: GraphPlan, features: int, heads: int, bits: int) -> list[Check]:
    """What the default configuration runs: rows with integer multipliers, in and out."""
    device, nodes = plan.device, plan.num_src
    one, _, out = _ranges(features, bits, device)
    to = out | {"out_unit": torch.tensor([0.7], device=device)}
    m = torch.randint(1, LARGEST_MULTIPLIER + 1, (nodes,), dtype=torch.uint8, device=device)
    words, w = _packed(nodes, features, bits, device), _packed(features, features, bits, device)
    product, rows = (words, w, *one, *one, features, bits, bits), (words, plan, *one, features, bits)
    half = features // 2
    narrow = (_packed(nodes, half, bits, device), _packed(features, half, bits, device), *one, *one, half, bits, bits)
    x, x_dst = torch.randn(2, nodes, features, device=device)
    source, target = torch.randn(2, nodes, heads, device=device)
    gat = {"heads": heads, "alpha_src": source, "alpha_dst": target}
    v2 = {"heads": heads, "att": torch.randn(heads, features // heads, device=device), "x_dst": x_dst}
    vectors, weight = torch.randn(2, features, device=device), torch.rand(plan.num_edges, device=device)
    return [
        ("quantize_pack", True, lambda: quantize_pack(x, one[0], one[1], bits, to["out_unit"])),
        ("unpack_dequantize", True, lambda: unpack_dequantize(words, *one, features, bits, m)),
        ("linear", True, lambda: linear(*product, multiplier=m, **to)),
        ("linear, added", True, lambda: linear(*product, multiplier=m, addend=x, relu=True, **to)),
        ("linear pair", True, lambda: linear_pair(Product(*product, None, m), Product(*narrow), relu=True, **to)),
        ("head_linear", True, lambda: head_linear(*product, vectors, heads, **to, multiplier=m)),
        ("head_dots", True, lambda: head_dots(x, vectors, heads)),
        ("aggregate sum", True, lambda: aggregate(*rows, multiplier=m, **to)),
        ("aggregate weighted", False, lambda: aggregate(*rows, multiplier=m, edge_weight=weight)),
        ("attention 4 bits", True, lambda: attention_aggregate(*rows, attention_bits=4, multiplier=m, **gat, **to)),
        ("attention 8 bits", True, lambda: attention_aggregate(*rows, attention_bits=8, multiplier=m, **gat, **to)),
        ("attention float", False, lambda: attention_aggregate(*rows, multiplier=m, **gat)),
        ("attention v2", False, lambda: attention_aggregate(*rows, multiplier=m, **v2)),
    ]


def _fake_quantize(x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor, bits: int) -> tuple[Tensor | None, ...]:
    leaves = [v.clone().requires_grad_() for v in (x, scale, offset)]
    y = fake_quantize(*leaves, bits)
    y.backward(grad)
    return y.detach(), *(leaf.grad for leaf in leaves)


def differs(want: Tensor, got: Tensor, exact: bool) -> str | None:
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
    if exact or not want.is_floating_point():
        wrong = int((want != got).sum())
        return f"{wrong} of {want.numel()} entries differ" if wrong else None
    scale = max(1e-6, float(want.abs().max())) if want.numel() else 1.0
    error = float((want - got).abs().max()) / scale if want.numel() else 0.0
    return None if error <= 1e-4 else f"relative error {error:.2e}"


def compare(run: Callable[[], Any], exact: bool, backend: str) -> str | None:
    """How ``run`` on ``backend``, its outputs poisoned, differs from the reference; :obj:`None` if it does not."""
    with use_backend("torch"):
        want = run()
    with use_backend(backend), poisoned():
        got = run()
    pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (want, got)), strict=True)
    return "; ".join(message for a, b in pairs if (message := differs(a, b, exact))) or None


def checked(key: str, run: Callable[[], str | None], **facts: Any) -> Row:
    """The row of one check; ``error`` is :obj:`None` where it holds.  An exception is a failed check."""
    try:
        error = run()
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:600]
    return {"kind": "check", "key": key, **facts, "error": error}


def op_units(run: Run) -> Iterator[Unit]:
    """Every op at 2, 4 and 8 bits, at a width that fills words and at one that does not."""
    sizes = [(24, 60, 8, 2)] if run.dry else [(5000, 80_000, 256, 4), (3000, 40_000, 40, 4)]
    for nodes, edges, features, heads in sizes:
        plan = power_law_plan(nodes, edges, run.device)
        for name, exact, op in checks(plan, features, heads, DRY_BITS if run.dry else BITS):

            def rows(
                op: Callable[[], Any] = op, exact: bool = exact, name: str = name, features: int = features
            ) -> Iterator[Row]:
                facts = {"check": name, "features": features, "exact": exact}
                yield checked(key_of(name), lambda: compare(op, exact, run.backend), **facts)

            yield Unit(f"{name} F={features}", rows)


def key_of(name: str) -> str:
    """What is left out when a check fails, ``"aggregate int2"`` for ``"aggregate packed int2"``."""
    return f"{name.split()[0].rstrip(',')} {name.split()[-1]}"


def model_units(run: Run) -> Iterator[Unit]:
    """Packed models against the same models on the reference backend; replayed from a CUDA graph as well."""
    from benchmarks.gpu.models import MODEL_WIDTHS, TINY_WIDTHS, packed_model
    from benchmarks.stacks import STACKS, build_stack

    widths = TINY_WIDTHS if run.dry else MODEL_WIDTHS
    plan = power_law_plan(*((24, 60) if run.dry else (3000, 40_000)), run.device)
    edge_index = edge_index_of(plan)
    for name in STACKS:
        for bits in (2,) if run.dry else (2, 4):

            def rows(name: str = name, bits: int = bits) -> Iterator[Row]:
                x, fresh = torch.randn(2, plan.num_src, widths[0], device=run.device)
                model = packed_model(build_stack(name, widths).to(run.device).eval(), x, edge_index, bits)

                def forward(model: nn.Module = model) -> Tensor:
                    with torch.no_grad():
                        return model(fresh, edge_index)

                key = f"{name} int{bits}"
                yield checked(key, lambda: compare(forward, False, run.backend), check=key)
                if not run.dry:
                    yield checked(key, lambda: _replayed(model, x, fresh, edge_index), check=f"{key}, replayed")

            yield Unit(f"{name} int{bits}", rows)


def _replayed(model: nn.Module, x: Tensor, fresh: Tensor, edge_index: Tensor) -> str | None:
    """A captured forward pass on features that it was not captured with, against an eager one."""
    import qgnn_plugin as qgnn

    captured = qgnn.capture(model, x, edge_index)
    with torch.no_grad():
        return differs(model(fresh, edge_index), captured(fresh, edge_index), exact=True)
