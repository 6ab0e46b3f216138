"""Every op under ``opcheck``, ``torch.compile(fullgraph=True)`` and ``torch.export``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_support import plan_of, random_words

from qgnn_plugin.kernels import (  # noqa: F401
    aggregate,
    attention_aggregate,
    fake_quantize,
    float_sum,
    head_dots,
    head_linear,
    linear,
    linear_pair,
    quantize_pack,
    smp_step,
    unpack_dequantize,
)

WIDTH = 40


def _cases() -> dict[str, Callable[[], tuple[Any, ...]]]:
    one, zero = torch.ones(1), torch.zeros(1)
    plan = plan_of("erdos_renyi")
    graph = (plan.rowptr, plan.col)

    def words(rows: int = plan.num_src) -> torch.Tensor:
        return random_words(rows, WIDTH, 2)

    def pair() -> tuple[Any, ...]:
        first = (words(), words(7), one, zero, one, zero, WIDTH, 2, 2)
        return (*first, torch.rand(7), None, *first, None, torch.ones(plan.num_src, dtype=torch.uint8), True)

    weight, edges = torch.rand(plan.num_edges, 2), torch.arange(plan.num_edges).flip(0)
    x, alpha = torch.randn(plan.num_src, WIDTH), torch.randn(plan.num_src, 2)
    return {
        "quantize_pack": lambda: (x, one, zero, 2),
        "unpack_dequantize": lambda: (words(), one, zero, WIDTH, 2),
        "fake_quantize": lambda: (
            x.clone().requires_grad_(),
            one.clone().requires_grad_(),
            zero.clone().requires_grad_(),
            2,
        ),
        "fake_quantize_backward": lambda: (x, x, one, zero, 2, True),
        "aggregate": lambda: (words(), *graph, one, zero, WIDTH, 2),
        "attention_aggregate": lambda: (
            words(), *graph, one, zero, WIDTH, 2, 2, 4, 0.2, alpha, alpha,
        ),
        "linear": lambda: (words(), words(7), one, zero, one, zero, WIDTH, 2, 2),
        "linear_pair": pair,
        "head_dots": lambda: (x, x[:2], 4),
        "head_linear": lambda: (
            words(), words(8), one, zero, one, zero, WIDTH, 2, 2, x[:2, :8], 4, one, zero, 2, None, None, one,
        ),
        "quantize_pack.rows": lambda: (x, one, zero, 2, one),
        "aggregate.rows": lambda: (words(), *graph, one, zero, WIDTH, 2, "sum", None, None, None, False, one, zero, 4),
        "linear.rows": lambda: (words(), words(7), one, zero, one, zero, WIDTH, 2, 2, None, True, one, zero, 4),
        "linear_pair.rows": lambda: (*pair(), one, zero, 4),
        "attention_aggregate.rows": lambda: (
            words(), *graph, one, zero, WIDTH, 2, 2, 4, 0.2, alpha, alpha, None, None, None, True, None, False, one,
            zero, 4,
        ),
        "linear with a row scale": lambda: (
            words(), words(7), one, zero, one, zero, WIDTH, 2, 2, None, True, one, zero, 4, alpha[:, 0],
        ),
        "attention with a range per head": lambda: (
            words(), *graph, alpha.abs(), alpha, WIDTH, 2, 2, 4, 0.2, alpha, alpha,
        ),
        "float_sum": lambda: (x, *graph, None, None, weight, edges),
        "edge_dots": lambda: (x, x, *graph, 2),
        "segment_largest": lambda: (weight, plan.rowptr, -1.0),
        "smp_step": lambda: (x, x, *graph, alpha[:, 0].abs(), 0.1, 9.0, 0.1, True),
    }  # fmt: skip


OPS = list(_cases())
NAMES = {"linear with a row scale": "linear", "attention with a range per head": "attention_aggregate"}


def _op(case: str) -> Any:
    name, _, overload = NAMES.get(case, case).partition(".")
    return getattr(getattr(torch.ops.qgnn, name), overload or "default")


def _keywords(case: str) -> dict[str, torch.Tensor]:
    """Overloads with multipliers take them in, and write others."""
    if not case.endswith(".rows") or case.startswith("quantize"):
        return {}
    if case == "linear_pair.rows":
        return {"out_unit": torch.tensor([2.0])}
    rows = plan_of("erdos_renyi").num_src
    return {"multiplier": torch.randint(1, 16, (rows,), dtype=torch.uint8), "out_unit": torch.tensor([2.0])}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(_op(op), _cases()[op](), _keywords(op))


class _Module(torch.nn.Module):
    def __init__(self, op: str, constants: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.constants, self.keywords = _op(op), constants, _keywords(op)

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.op(*tensors, *self.constants, **self.keywords)


def _module(op: str) -> tuple[_Module, tuple[torch.Tensor, ...]]:
    args = _cases()[op]()
    count = next(i for i, value in enumerate(args) if not isinstance(value, torch.Tensor))
    if any(isinstance(value, torch.Tensor) for value in args[count:]):
        pytest.skip("arguments alternate")
    tensors = tuple(value.detach() for value in args[:count])
    return _Module(op, args[count:]), tensors


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks(op: str) -> None:
    args = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in _cases()[op]())
    function, keywords = _op(op), _keywords(op)
    torch._dynamo.reset()  # each op compiles this one lambda anew
    compiled = torch.compile(lambda *a: function(*a, **keywords), fullgraph=True, backend="aot_eager")
    for want, got in zip(_flat(function(*args, **keywords)), _flat(compiled(*args)), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("op", [op for op in OPS if not NAMES.get(op, op).startswith("attention_aggregate")])
def test_exports(op: str) -> None:
    module, tensors = _module(op)
    program = torch.export.export(module, tensors)
    for want, got in zip(_flat(module(*tensors)), _flat(program.module()(*tensors)), strict=True):
        assert torch.equal(want, got)


def _flat(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
