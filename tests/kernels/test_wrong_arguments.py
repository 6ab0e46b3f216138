"""No argument, however wrong, crashes the interpreter or is answered: every op, called by its function and directly.

Each op has one call that works.  It is repeated with one argument replaced at a time: another dtype, rank, length,
device or object for a tensor, other numbers for a number, index arrays that contradict each other.  Whatever the op
cannot take it refuses with a ValueError, a TypeError or a RuntimeError; all of that in a process of its own, which ends
where a kernel reads out of bounds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qgnn_plugin.kernels import (
    aggregate,
    attention_aggregate,
    fake_quantize,
    indices,
    layout,
    linear,
    quantize_pack,
    smp_step,
    spmm,
    unpack_dequantize,
)
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.plan import GraphPlan

ROWS, WIDTH, OUT, HEADS, BITS = 6, 40, 5, 2, 2
REFUSED = (ValueError, TypeError, RuntimeError)
Call = tuple[Callable[..., Any], dict[str, Any]]


def _words(rows: int = ROWS) -> Tensor:
    return layout.pack_codes(torch.randint(0, 2**BITS, (rows, WIDTH)), BITS)


def _graph() -> dict[str, Tensor]:
    """Eight edges into three of six nodes."""
    return {
        "rowptr": torch.tensor([0, 3, 3, 4, 4, 8, 8]),
        "col": torch.tensor([0, 1, 5, 2, 0, 2, 3, 4], dtype=torch.int32),
    }


def _plan() -> GraphPlan:
    return GraphPlan(**_graph(), num_src=ROWS)


def _calls() -> dict[str, Call]:
    ops = torch.ops.qgnn
    x, alpha, edges = torch.randn(ROWS, WIDTH), torch.randn(ROWS, HEADS), 8
    one, rows = (
        {"scale": torch.ones(1), "offset": torch.zeros(1)},
        {"scale": torch.ones(ROWS, 1), "offset": torch.zeros(ROWS, 1)},
    )
    columns = {"scale": torch.ones(WIDTH), "offset": torch.zeros(WIDTH)}
    codes = {"words": _words(), "num_features": WIDTH, "bits": BITS}
    out = {"out_scale": torch.ones(WIDTH), "out_offset": torch.zeros(WIDTH), "out_bits": BITS}
    tail = {"dst_scale": torch.rand(ROWS), "bias": torch.randn(WIDTH), **out}
    gat = {
        "heads": HEADS,
        "attention_bits": 8,
        "alpha_src": alpha,
        "alpha_dst": alpha,
        "alpha_edge": torch.randn(edges, HEADS),
    }
    gatv2 = {"heads": HEADS, "attention_bits": 32, "att": torch.randn(HEADS, WIDTH // HEADS), "x_dst": x}
    slope = {"negative_slope": 0.2}
    product_ = {
        "x_words": _words(), "w_words": _words(OUT), "x_scale": torch.ones(ROWS, 1), "x_offset": torch.ones(ROWS, 1),
        "w_scale": torch.ones(OUT), "w_offset": torch.zeros(OUT), "in_features": WIDTH, "x_bits": BITS, "w_bits": BITS,
        "bias": torch.randn(OUT), "row_scale": torch.rand(ROWS), "addend": torch.randn(ROWS, OUT),
        "out_scale": torch.ones(1), "out_offset": torch.zeros(1), "out_bits": 8,
    }  # fmt: skip
    pair = {name: product_[name] for name in ("x_words", "w_words", "in_features", "x_bits", "w_bits", "bias")}
    pair |= {name: product_[name] for name in ("x_scale", "x_offset", "w_scale", "w_offset")}
    pair |= {re.sub("^[xw]|^in_features|^bias", r"\g<0>2", name): value for name, value in pair.items()}
    pair |= {name: product_[name] for name in ("out_scale", "out_offset", "out_bits")}
    pair |= {"multiplier": None, "multiplier2": None}
    step = {
        "h": x, "x0": x, "norm": torch.rand(ROWS), "eta": 0.1, "mu": 9.0, "multiplier": 0.1, **codes, **one, **out,
    }  # fmt: skip
    step.pop("num_features")
    sums = {"dst_scale": torch.rand(ROWS), "src_scale": torch.rand(ROWS), "weight": torch.rand(edges, HEADS)}
    return {
        "quantize_pack": (quantize_pack.quantize_pack, {"x": x, **columns, "bits": BITS}),
        "qgnn::quantize_pack": (ops.quantize_pack, {"x": x, **rows, "bits": BITS}),
        "unpack_dequantize": (unpack_dequantize.unpack_dequantize, {**codes, **columns}),
        "qgnn::unpack_dequantize": (ops.unpack_dequantize, {**codes, **rows}),
        "fake_quantize": (fake_quantize.fake_quantize, {"x": x, **columns, "bits": BITS}),
        "qgnn::fake_quantize": (ops.fake_quantize, {"x": x, **rows, "bits": BITS}),
        "qgnn::fake_quantize_backward": (ops.fake_quantize_backward, {"grad": x, "x": x, **rows, "bits": BITS}),
        "linear": (linear.linear, product_),
        "qgnn::linear": (ops.linear, product_),
        "qgnn::linear_pair": (ops.linear_pair, pair),
        "aggregate": (
            aggregate.aggregate,
            {**codes, "plan": _plan(), **columns, "edge_weight": torch.rand(edges, 2), **tail},
        ),
        "aggregate, mean": (aggregate.aggregate, {**codes, "plan": _plan(), **one, "reduce": "mean", **tail}),
        "aggregate, max": (aggregate.aggregate, {**codes, "plan": _plan(), **one, "reduce": "max", **tail}),
        "qgnn::aggregate": (ops.aggregate, {**codes, **_graph(), **one, **tail}),
        "qgnn::aggregate, weighted": (
            ops.aggregate,
            {**codes, **_graph(), **rows, "edge_weight": torch.rand(edges), **tail},
        ),
        "attention_aggregate": (
            attention_aggregate.attention_aggregate,
            {**codes, "plan": _plan(), **one, **gat, **out},
        ),
        "qgnn::attention_aggregate": (ops.attention_aggregate, {**codes, **_graph(), **one, **gat, **slope, **out}),
        "qgnn::attention_aggregate, v2": (
            ops.attention_aggregate,
            {**codes, **_graph(), **rows, **gatv2, **slope, **out},
        ),
        "smp_step": (smp_step.smp_step, {**step, "plan": _plan()}),
        "qgnn::smp_step": (ops.smp_step, {**step, **_graph()}),
        "qgnn::float_sum": (ops.float_sum, {"x": x, **_graph(), **sums, "edge": torch.arange(edges)}),
        "qgnn::edge_dots": (ops.edge_dots, {"a": x, "b": x, **_graph(), "heads": HEADS}),
        "qgnn::segment_largest": (
            ops.segment_largest,
            {"values": torch.randn(edges, 2), "rowptr": _graph()["rowptr"], "fill": 0.0},
        ),
        "spmm": (spmm.spmm, {"plan": _plan(), "x": x, "weight": torch.rand(edges)}),
        "edge_products": (
            spmm.edge_products,
            {"plan": _plan(), "a": torch.randn(ROWS, 2, 4), "b": torch.randn(ROWS, 2, 4)},
        ),
        "segment_sum": (spmm.segment_sum, {"plan": _plan(), "per_edge": torch.randn(edges, 3)}),
        "segment_max": (spmm.segment_max, {"plan": _plan(), "per_edge": torch.randn(edges, 3)}),
        "pack_codes": (layout.pack_codes, {"codes": torch.randint(0, 4, (3, WIDTH)), "bits": BITS}),
        "unpack_codes": (layout.unpack_codes, codes),
    }


CALLS = _calls()

ONE_ELEMENT = {
    "scale", "offset", "x_scale", "x_offset", "w_scale", "w_offset", "x2_scale", "x2_offset", "w2_scale", "w2_offset",
    "out_scale", "out_offset",
}  # fmt: skip
FREE_ROWS, FREE_COLUMNS = ("a row less", "a row more"), ("a column less", "a column more", "no columns")
OTHER_FLOATS = ("torch.float64", "torch.float16")
OTHER_DTYPES = (*OTHER_FLOATS, "torch.int64", "torch.int32", "torch.uint8", "torch.bool")
UNUSED_SOURCES = ("col -1", "col 1000000", f"col {ROWS}", "64-bit col", "more sources", "fewer sources")
# What else an op takes.
ALLOWED: dict[tuple[str, str], tuple[str, ...]] = {
    ("quantize_pack", "x"): FREE_ROWS,
    ("fake_quantize", "x"): FREE_ROWS,
    ("unpack_dequantize", "words"): FREE_ROWS,
    ("qgnn::quantize_pack", "x"): FREE_COLUMNS,
    ("qgnn::fake_quantize", "x"): FREE_COLUMNS,
    ("aggregate", "edge_weight"): ("a column less",),
    ("qgnn::aggregate", "words"): ("a row more",),
    ("qgnn::float_sum", "x"): ("no columns",),
    ("qgnn::float_sum", "weight"): ("a row more", "a column less"),
    ("qgnn::edge_dots", "b"): ("a row more",),
    ("qgnn::segment_largest", "values"): (*OTHER_FLOATS, *FREE_COLUMNS),
    ("qgnn::segment_largest", "rowptr"): ("flat", "a row less"),  # it still ends at the last edge
    ("segment_sum", "plan"): UNUSED_SOURCES,
    ("segment_max", "plan"): UNUSED_SOURCES,
    ("segment_sum", "per_edge"): (*OTHER_FLOATS, *FREE_COLUMNS),
    ("segment_max", "per_edge"): (*OTHER_FLOATS, *FREE_COLUMNS),
    ("spmm", "x"): (*OTHER_FLOATS, *FREE_COLUMNS),
    ("spmm", "weight"): OTHER_FLOATS,
    ("pack_codes", "codes"): (*OTHER_DTYPES, *FREE_ROWS, *FREE_COLUMNS, "transposed", "another device"),
    ("unpack_codes", "words"): (*FREE_ROWS, "another device"),
}


def _tensors_instead(value: Tensor) -> Iterator[tuple[str, Any]]:
    for dtype in (torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64):
        if dtype != value.dtype:
            yield str(dtype), value.to(dtype)
    yield "a rank more", value.unsqueeze(0)
    yield "flat", value.reshape(-1)[:-1]
    yield "a scalar", value.reshape(-1)[0]
    yield "empty", value.new_empty(0)
    yield "a row less", value[:-1]
    yield "a row more", torch.cat([value, value[:1]])
    if value.dim() == 2:
        yield "a column less", value[:, :-1]
        yield "a column more", torch.cat([value, value[:, :1]], 1)
        yield "transposed", value.t()
        yield "no columns", value[:, :0]
    yield "another device", value.to("meta")
    yield "sparse", value.to_sparse() if value.dtype != torch.int32 else None


def _indices_instead(name: str, value: Tensor) -> Iterator[tuple[str, Any]]:
    if name == "rowptr":
        yield "past the edges", torch.cat([value[:-1], value[-1:] + 1000])
        yield "short of the edges", torch.cat([value[:-1], value[-1:] - 1])
        yield "falls", torch.cat([value[:2], value[1:2] - 2, value[3:]])
        yield "starts late", torch.cat([value[:1] + 1, value[1:]])
        yield "negative", value - 4
    elif name in ("col", "edge"):
        for where in (-1, 10**6, 8 if name == "edge" else ROWS):
            changed = value.clone()
            changed[3] = where
            yield f"{where}", changed


def _plans_instead() -> Iterator[tuple[str, Any]]:
    graph = _graph()
    for name in graph:
        for what, value in _indices_instead(name, graph[name]):
            yield f"{name} {what}", GraphPlan(**{**graph, name: value}, num_src=ROWS)
    yield "32-bit rowptr", GraphPlan(graph["rowptr"].int(), graph["col"], ROWS)
    yield "64-bit col", GraphPlan(graph["rowptr"], graph["col"].long(), ROWS)
    yield "more sources", GraphPlan(**graph, num_src=ROWS + 1)
    yield "fewer sources", GraphPlan(**graph, num_src=ROWS - 1)
    yield "another device", GraphPlan(graph["rowptr"].to("meta"), graph["col"].to("meta"), ROWS)
    yield "none", None
    yield "an edge list", torch.zeros(2, 8, dtype=torch.int64)


def _numbers_instead(name: str, value: int) -> Iterator[tuple[str, Any]]:
    others = (-(2**40), -1, 0, 3, 16, 2**31, 2**62, 0.5, "2", None)
    yield from ((repr(other), other) for other in others if other != value)


def _instead(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from ((what, other) for what, other in _tensors_instead(value) if other is not None)
        yield from _indices_instead(name, value)
        yield "an array", value.numpy()
        yield "a list", [1.0, 2.0]
        yield "a string", "x"
    elif isinstance(value, GraphPlan):
        yield from _plans_instead()
    elif type(value) is int:
        yield from _numbers_instead(name, value)
    elif isinstance(value, str):
        yield from (("'other'", "other"), ("None", None), ("3", 3))


def _is_one_element(name: str, value: Any, other: Any) -> bool:
    """Whether ``other`` is one range for all: these may have any rank."""
    tensors = isinstance(other, Tensor) and isinstance(value, Tensor)
    same = tensors and other.dtype == value.dtype and other.device == value.device
    return name in ONE_ELEMENT and same and other.numel() == 1 and not other.is_sparse


def _outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except REFUSED:
        return None


def wrong_calls(op: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions and arguments of the calls that ``op`` has to refuse."""
    arguments = CALLS[op][1]
    for name, value in arguments.items():
        for what, other in _instead(name, value):
            if what not in ALLOWED.get((op, name), ()) and not _is_one_element(name, value, other):
                yield f"{name}: {what}", {**arguments, name: other}


def answered(op: str) -> list[str]:
    """The calls among them that it answers."""
    function = CALLS[op][0]
    found = []
    for what, arguments in wrong_calls(op):
        print(op, what, file=sys.stderr, flush=True)  # the last line names the call that ended the process
        if _outcome(function, arguments) is not None:
            found.append(what)
    return found


@pytest.fixture(scope="module")
def outcome() -> dict[str, list[str]]:
    """The calls that each op answered, found in another process: where that ends, the call that ended it is named."""
    code = "import json, test_wrong_arguments as t; print(json.dumps({op: t.answered(op) for op in t.CALLS}))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode} after {done.stderr.splitlines()[-3:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", CALLS)
def test_wrong_arguments_are_refused(op: str, outcome: dict[str, list[str]]) -> None:
    assert outcome[op] == []


@pytest.mark.parametrize("op", CALLS)
def test_right_arguments_are_not(op: str) -> None:
    function, arguments = CALLS[op]
    function(**arguments)


def test_a_plan_is_scanned_once_until_it_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, words = _plan(), _words()
    scans: list[Tensor] = []
    largest = indices._largest
    monkeypatch.setattr(indices, "_largest", lambda index, what: scans.append(index) or largest(index, what))

    def run(graph: GraphPlan) -> None:
        aggregate.aggregate(words, graph, torch.ones(1), torch.zeros(1), WIDTH, BITS)

    for _ in range(3):
        run(plan)
        run(plan.rows(2, 5))  # a part of what was found right
    assert len(scans) == 1
    plan.col[0] = ROWS
    with pytest.raises(ValueError, match=r"source nodes in \[0, 6\)"):
        run(plan)


def test_graphs_that_are_gone_are_forgotten() -> None:
    indices._graphs.clear()
    for _ in range(indices.REMEMBERED):
        spmm.spmm(_plan(), torch.ones(ROWS, 1))
    assert len(indices._graphs) <= indices.REMEMBERED


def _strided(value: Any) -> Any:
    """The same tensor with gaps between its elements and rows, in memory that starts off a word."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    wide = value.new_zeros((*(2 * n + 1 for n in value.shape),))
    view = wide[tuple(slice(1, None, 2) for _ in value.shape)]
    return view.copy_(value)


@pytest.mark.parametrize("backend", ["torch", "cpu", "interpret"])
@pytest.mark.parametrize("op", [op for op in CALLS if "plan" not in CALLS[op][1]])
def test_strided_arguments_give_the_same(op: str, backend: str) -> None:
    function, arguments = CALLS[op]
    if backend == "interpret" and op.startswith("qgnn::linear"):
        arguments = {**arguments, "out_scale": torch.ones(OUT), "out_offset": torch.zeros(OUT)}
    strided = {name: _strided(value) for name, value in arguments.items()}
    with use_backend(backend):
        expected, actual = function(**arguments), function(**strided)
    expected, actual = (v if isinstance(v, tuple) else (v,) for v in (expected, actual))
    for want, got in zip(expected, actual, strict=True):
        assert torch.equal(want, got)


def test_a_hub_whose_attention_passes_32_bits() -> None:
    degree, top = 34_000, 255
    hub = GraphPlan(torch.tensor([0, degree]), torch.zeros(degree, dtype=torch.int32), 1)
    alpha = {"alpha_src": torch.zeros(1, 1), "alpha_dst": torch.zeros(1, 1)}
    for backend in ("torch", "cpu"):
        with use_backend(backend):
            out = attention_aggregate.attention_aggregate(
                layout.pack_codes(torch.full((1, 3), top), 8), hub, torch.ones(1), torch.zeros(1), 3, 8,
                attention_bits=8, **alpha,
            )  # fmt: skip
        assert out.flatten().tolist() == pytest.approx([top] * 3)


@pytest.mark.parametrize("op", ["qgnn::aggregate", "qgnn::smp_step"])
def test_sums_that_pass_31_bits_are_refused_directly_too(op: str) -> None:
    function, arguments = CALLS[op]
    degree = 2**31 // 255 + 1
    graph = {"rowptr": torch.tensor([0, *[degree] * ROWS]), "col": torch.zeros((), dtype=torch.int32).expand(degree)}
    words = layout.pack_codes(torch.randint(0, 256, (ROWS, WIDTH)), 8)
    with pytest.raises(ValueError, match="at most 8421504 edges into a node at 8 bits"):
        function(**{**arguments, **graph, "words": words, "bits": 8})
