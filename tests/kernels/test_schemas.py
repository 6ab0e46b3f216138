"""Schemas of the ops: what exported programs and compiled code name, so they stay as they are."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qgnn_plugin.kernels import (  # noqa: F401
    aggregate,
    attention_aggregate,
    fake_quantize,
    float_sum,
    guard,
    head_dots,
    head_linear,
    linear,
    linear_pair,
    plan_op,
    quantize_pack,
    smp_step,
    unpack_dequantize,
)
from qgnn_plugin.kernels.backend import available_backends, implementation

_AGGREGATE = (
    "Tensor words, Tensor rowptr, Tensor col, Tensor scale, Tensor offset, int num_features, int bits, "
    'str reduce="sum", '
    "Tensor? edge_weight=None, Tensor? dst_scale=None, Tensor? bias=None, bool relu=False, Tensor? out_scale=None, "
    "Tensor? out_offset=None, int out_bits=0, Tensor? multiplier=None"
)
_ATTENTION = (
    "Tensor words, Tensor rowptr, Tensor col, Tensor scale, Tensor offset, int num_features, int bits, int heads, "
    "int attention_bits, float negative_slope, Tensor? alpha_src=None, Tensor? alpha_dst=None, "
    "Tensor? alpha_edge=None, Tensor? att=None, Tensor? x_dst=None, bool concat=True, Tensor? bias=None, "
    "bool relu=False, Tensor? out_scale=None, Tensor? out_offset=None, int out_bits=0, "
    "Tensor? multiplier=None"
)
_LINEAR = (
    "Tensor x_words, Tensor w_words, Tensor x_scale, Tensor x_offset, Tensor w_scale, Tensor w_offset, "
    "int in_features, int x_bits, int w_bits, Tensor? bias=None, bool relu=False, Tensor? out_scale=None, "
    "Tensor? out_offset=None, int out_bits=0, Tensor? row_scale=None, Tensor? addend=None, Tensor? multiplier=None"
)
_PAIR = (
    "Tensor x_words, Tensor w_words, Tensor x_scale, Tensor x_offset, Tensor w_scale, Tensor w_offset, "
    "int in_features, int x_bits, int w_bits, Tensor? bias, Tensor? multiplier, "
    "Tensor x2_words, Tensor w2_words, Tensor x2_scale, Tensor x2_offset, Tensor w2_scale, Tensor w2_offset, "
    "int in_features2, int x2_bits, int w2_bits, Tensor? bias2, Tensor? multiplier2, bool relu=False, "
    "Tensor? out_scale=None, Tensor? out_offset=None, int out_bits=0"
)
SCHEMAS = {
    "aggregate": f"({_AGGREGATE}) -> Tensor",
    "aggregate.rows": f"({_AGGREGATE}, *, Tensor out_unit) -> (Tensor, Tensor)",
    "attention_aggregate": f"({_ATTENTION}) -> Tensor",
    "attention_aggregate.rows": f"({_ATTENTION}, *, Tensor out_unit) -> (Tensor, Tensor)",
    "edge_dots": "(Tensor a, Tensor b, Tensor rowptr, Tensor col, int heads=1) -> Tensor",
    "fake_quantize": "(Tensor x, Tensor scale, Tensor offset, int bits, bool as_codes=False) -> Tensor",
    "fake_quantize_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor offset, int bits, bool as_codes=False) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "float_sum": (
        "(Tensor x, Tensor rowptr, Tensor col, Tensor? dst_scale=None, Tensor? src_scale=None, Tensor? weight=None, "
        "Tensor? edge=None) -> Tensor"
    ),
    "head_dots": "(Tensor x, Tensor vectors, int heads) -> Tensor",
    "head_linear": (
        "(Tensor x_words, Tensor w_words, Tensor x_scale, Tensor x_offset, Tensor w_scale, Tensor w_offset, "
        "int in_features, int x_bits, int w_bits, Tensor vectors, int heads, Tensor out_scale, Tensor out_offset, "
        "int out_bits, Tensor? bias=None, Tensor? multiplier=None, Tensor? out_unit=None) -> (Tensor, Tensor, Tensor)"
    ),
    "holds": "(Tensor[] tensors, str checksums, str message) -> Tensor",
    "inverse_root": "(Tensor degree) -> Tensor",
    "linear": f"({_LINEAR}) -> Tensor",
    "linear.rows": f"({_LINEAR}, *, Tensor out_unit) -> (Tensor, Tensor)",
    "linear_pair": f"({_PAIR}) -> Tensor",
    "linear_pair.rows": f"({_PAIR}, *, Tensor out_unit) -> (Tensor, Tensor)",
    "plan": (
        '(Tensor src, Tensor dst, SymInt num_src, SymInt num_dst, str loops="none") -> (Tensor, Tensor, Tensor)'
    ),
    "quantize_pack": "(Tensor x, Tensor scale, Tensor offset, int bits) -> Tensor",
    "quantize_pack.rows": "(Tensor x, Tensor scale, Tensor offset, int bits, Tensor unit) -> (Tensor, Tensor)",
    "segment_largest": "(Tensor values, Tensor rowptr, float fill=0.) -> Tensor",
    "smp_step": (
        "(Tensor h, Tensor x0, Tensor rowptr, Tensor col, Tensor norm, float eta, float mu, float multiplier, "
        "bool measure=False, Tensor? words=None, Tensor? scale=None, Tensor? offset=None, int bits=0, "
        "Tensor? out_scale=None, Tensor? out_offset=None, int out_bits=0) -> (Tensor, Tensor, Tensor)"
    ),
    "unpack_dequantize": (
        "(Tensor words, Tensor scale, Tensor offset, int num_features, int bits, Tensor? multiplier=None) -> Tensor"
    ),
}


def test_schemas_are_those_of_the_version_before() -> None:
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("qgnn::"):
            name = schema.name.removeprefix("qgnn::") + (f".{schema.overload_name}" if schema.overload_name else "")
            found[name] = str(schema).removeprefix(f"qgnn::{name}")
    assert found == SCHEMAS


# Of functions that people call; plans stand for their arrays.
PUBLIC = (
    aggregate.aggregate, attention_aggregate.attention_aggregate, fake_quantize.fake_quantize, head_dots.head_dots,
    head_linear.head_linear, linear.linear, quantize_pack.quantize_pack, smp_step.smp_step,
    unpack_dequantize.unpack_dequantize,
)  # fmt: skip
NO_ARGUMENTS = {"plan", "is_checked", "addend"}  # how a call is executed, not what it computes


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_public_functions_have_the_arguments_of_the_op(function: Callable[..., Any]) -> None:
    op = inspect.signature(implementation(function.__name__, "torch")).parameters
    public = inspect.signature(function).parameters
    own = set(public) - (NO_ARGUMENTS - set(op))
    assert own == set(op) - ({"rowptr", "col"} if "plan" in public else set())
    for name in own:
        assert public[name].annotation == op[name].annotation, name
        if op[name].default is not inspect.Parameter.empty:
            assert public[name].default == op[name].default, name


OWN = [name for name in SCHEMAS if "." not in name and name not in ("holds", "inverse_root", "plan")]


@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "torch"])
@pytest.mark.parametrize("op", OWN)
def test_every_backend_takes_the_arguments_of_the_op(op: str, backend: str) -> None:
    expected = inspect.signature(implementation(op, "torch")).parameters
    found = inspect.signature(implementation(op, backend)).parameters
    assert [(p.name, p.default) for p in found.values()][: len(expected)] == [
        (p.name, p.default) for p in expected.values()
    ]
