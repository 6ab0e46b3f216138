r"""The canonical float arithmetic: one order of float32 operations for every backend.

The fake-quantized model and the packed model agree bit for bit because both follow these steps,
each operation rounded to float32 on its own (no fused multiply-add, no reassociation), division
correctly rounded:

* quantize: ``inv = 1 / s`` once; ``v = (x - l) * inv``; ``c = clamp(floor(v + 0.5), 0, Q)``, and 0
  for NaN;
* dequantize: ``x^ = (c * s) + l``;
* integer sum over a neighbourhood: ``y = (float(sum c) * s) + (deg * l)``; largest code: ``y =
  (float(max c) * s) + l``;
* sums that round (edge weights, a range per row) are in the order of each backend's own kernel: in
  eval mode the fake-quantized model calls that kernel as well, so the two agree on one backend, and
  backends agree to rounding;
* attention: ``y = ((float(sum k c) * s) * (1 / sum k)) + l``, with one division per row and head;
* integer product: ``y = (((acc * sw) + (rowsum * lw)) * sx) + (colterm * lx)`` with
  ``colterm_o = (float(sum_k cw_ok) * sw_o) + (float(K) * lw_o)``;
* dot products of the heads of a row: lane ``f mod 16`` of a head's features adds up its products in ascending order,
  then the upper half of the lanes is added to the lower one until one is left;
* epilogue, in this order: ``* dst_scale``, ``+ bias``, ``+ addend``, ``max(y, 0)``, ``* row_scale``,
  then quantize and pack if packed output is asked for.

A *range* is a pair of float32 tensors ``scale`` (``s > 0``) and ``offset`` (``l``), each of one
element, ``[F]`` (per column) or ``[N, 1]`` (per row).

*Row multipliers* (docs/arithmetic.md): a row's range is one of the tensor, or of its columns, times an integer ``m`` of
``1 .. 15``, uint8 ``[N]``; its values are ``m (s c + l)``.

* quantize: ``m = clamp(ceil(peak * (1 / p)), 1, 15)`` with ``peak`` the largest ``|x|`` of the row (NaN counts as 0)
  and ``p``, the *unit*, float32 of one element; then as a row of range ``(s * m, l * m)``, each rounded once;
* integer sum: ``y = (float(sum m c) * s) + (float(sum m) * l)``: exact in any order, on every backend;
* edge weights: to rounding, ``(s * sum w m c) + (l * sum w m)``;
* attention: ``y = ((float(sum k m c) * s) * r) + (l * (float(sum k m) * r))`` with ``r = 1 / sum k``;
* integer product: as an input of range ``(s * m, l * m)`` per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import pack_codes, top_code

__all__ = [
    "DOT_LANES",
    "LARGEST_MULTIPLIER",
    "attention_thresholds",
    "check_multiplier",
    "check_range",
    "check_unit",
    "dequantize_codes",
    "finish",
    "is_per_row",
    "multiplied",
    "quantize_codes",
    "row_multipliers",
]

LARGEST_MULTIPLIER = 15
DOT_LANES = 16


def check_range(scale: Tensor, offset: Tensor, rows: int, features: int, what: str = "") -> None:
    """Raise unless ``scale`` and ``offset`` are float32 tensors of one element, ``[features]`` or
    ``[rows, 1]``, and not one of each of the last two.
    """
    if scale.dtype is not torch.float32 or offset.dtype is not torch.float32:
        raise TypeError(f"Expected '{what}scale' and '{what}offset' to be float32 (got {scale.dtype}, {offset.dtype})")
    shared = scale.numel() == 1, offset.numel() == 1
    if all(shared):
        return
    for name, value, is_shared in (("scale", scale, shared[0]), ("offset", offset, shared[1])):
        if not is_shared and value.shape not in ((features,), (rows, 1)):
            raise ValueError(
                f"Expected '{what}{name}' of one element, of shape [{features}] or [{rows}, 1] "
                f"(got {list(value.shape)})"
            )
    if not any(shared) and scale.dim() != offset.dim():
        raise ValueError(
            f"Expected '{what}scale' and '{what}offset' both per column or both per row "
            f"(got {list(scale.shape)} and {list(offset.shape)})"
        )


def is_per_row(value: Tensor) -> bool:
    """Whether a range tensor holds one value per row."""
    return value.dim() == 2 and value.numel() != 1


def check_multiplier(multiplier: Tensor | None, scale: Tensor, offset: Tensor, rows: int) -> None:
    """Raise unless ``multiplier`` is None, or uint8 ``[rows]`` beside a range that is not per row already.

    Its values are not looked at: results hold for any of ``0 .. 15``, and the sums of larger ones could overflow.
    """
    if multiplier is None:
        return
    if multiplier.dtype is not torch.uint8:
        raise TypeError(f"Expected 'multiplier' to be uint8 (got {multiplier.dtype})")
    if multiplier.shape != (rows,):
        raise ValueError(f"Expected 'multiplier' of shape [{rows}] (got {list(multiplier.shape)})")
    if is_per_row(scale) or is_per_row(offset):
        raise ValueError(
            "Expected 'scale' and 'offset' of one element or per column beside 'multiplier' (got a range per row); "
            "leave one of them out"
        )


def check_unit(unit: Tensor | None, scale: Tensor | None, offset: Tensor | None, bits: int) -> None:
    """Raise unless ``unit`` is None, or a float32 element beside a range to quantize to that is not per row already."""
    if unit is None:
        return
    if unit.dtype is not torch.float32:
        raise TypeError(f"Expected the unit of row multipliers to be float32 (got {unit.dtype})")
    if unit.numel() != 1:
        raise ValueError(f"Expected the unit of row multipliers to have one element (got {list(unit.shape)})")
    if bits == 0 or scale is None or offset is None:
        raise ValueError("Expected row multipliers of packed output only (got float32 output); pass 'out_bits'")
    if is_per_row(scale) or is_per_row(offset):
        raise ValueError(
            "Expected a range of one element or per column beside the unit of row multipliers (got a range per row); "
            "leave one of them out"
        )


def row_multipliers(x: Tensor, unit: Tensor) -> Tensor:
    """``clamp(ceil(peak / unit), 1, 15)`` of the rows of ``x`` ``[N, F]``, uint8 ``[N]``; NaN counts as 0."""
    if x.size(1) == 0:
        return torch.ones(x.size(0), dtype=torch.uint8, device=x.device)
    peak = x.abs().nan_to_num_(0.0, float("inf")).amax(1)
    steps = torch.ceil(peak * unit.reshape(1).reciprocal())
    return steps.nan_to_num_(1.0, float("inf")).clamp_(1, LARGEST_MULTIPLIER).to(torch.uint8)


def multiplied(scale: Tensor, offset: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """The range of each row, ``(s * m, l * m)``: ``[N, 1]``, or ``[N, F]`` where it is per column."""
    factor = multiplier.to(torch.float32).unsqueeze(1)
    return scale.reshape(1, -1) * factor, offset.reshape(1, -1) * factor


def quantize_codes(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` (``[N, F]`` float32) as uint8."""
    v = (x - offset) * scale.reciprocal()
    return torch.floor(v + 0.5).clamp_(0, top_code(bits)).nan_to_num_(0).to(torch.uint8)


def dequantize_codes(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``(c * s) + l`` in float32."""
    return codes.to(torch.float32) * scale + offset


def finish(
    y: Tensor,
    bias: Tensor | None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    """The tail of every epilogue: bias, another matrix, ReLU, a factor per row and, where
    ``out_bits`` is not 0, quantization and packing; with ``out_unit`` a pair, the words and the rows' multipliers.
    """
    if bias is not None:
        y = y + bias
    if addend is not None:
        y = y + addend
    if relu:
        y = y.clamp(min=0)
    if row_scale is not None:
        y = y * row_scale.view(-1, 1)
    if out_bits == 0:
        return y
    assert out_scale is not None
    assert out_offset is not None
    if out_unit is None:
        return pack_codes(quantize_codes(y, out_scale, out_offset, out_bits), out_bits)
    multiplier = row_multipliers(y, out_unit)
    scale, offset = multiplied(out_scale, out_offset, multiplier)
    return pack_codes(quantize_codes(y, scale, offset, out_bits), out_bits), multiplier


def attention_thresholds(bits: int) -> Tensor:
    r"""``[Q]`` float32 thresholds of quantized softmax numerators.

    The numerator :math:`\exp(e - m)` rounds to ``q / Q`` or more exactly where :math:`e - m \ge
    \log((q - 1/2) / Q)`, so the code of an edge is the number of thresholds that ``e - m`` reaches:
    no exponential, hence the same codes everywhere.
    """
    top = top_code(bits)
    levels = torch.arange(1, top + 1, dtype=torch.float64)
    return torch.log((levels - 0.5) / top).to(torch.float32)
