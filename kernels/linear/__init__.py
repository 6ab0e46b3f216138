r"""``linear``: packed activations times packed weights through an integer product.

With codes :math:`c^x, c^w` of ranges :math:`(s_x, l_x)`, :math:`(s_w, l_w)` over ``K`` input
features,

.. math::
    y_{no} = s_x \Big(s_w \sum_k c^x_{nk} c^w_{ok} + l_w \sum_k c^x_{nk}\Big) + l_x \Big(s_w \sum_k
    c^w_{ok} + K l_w\Big) + b_o
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..aggregate import check_output_range, new_output
from ..arithmetic import check_multiplier, finish, multiplied
from ..backend import implementation, is_direct
from ..checks import check_float
from ..layout import check_packed, most_products, unpack_codes
from ..library import register

__all__ = ["Product", "check_product", "linear", "linear_reference"]


class Product(NamedTuple):
    """``x^ w^T + b`` of packed codes, as :func:`linear` takes it."""

    x_words: Tensor
    w_words: Tensor
    x_scale: Tensor
    x_offset: Tensor
    w_scale: Tensor
    w_offset: Tensor
    in_features: int
    x_bits: int
    w_bits: int
    bias: Tensor | None = None
    multiplier: Tensor | None = None


def linear_reference(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    x = unpack_codes(x_words, in_features, x_bits)
    w = unpack_codes(w_words, in_features, w_bits)
    # float64 products of small integers are exact, and run on every device.
    product = (x.to(torch.float64) @ w.to(torch.float64).t()).to(torch.float32)
    rowsum = x.sum(1, keepdim=True, dtype=torch.int32).to(torch.float32)
    y = (product * w_scale.reshape(1, -1)) + (rowsum * w_offset.reshape(1, -1))
    if multiplier is not None:
        x_scale, x_offset = multiplied(x_scale, x_offset, multiplier)
    y = (y * x_scale) + (linear_colterm(w, w_scale, w_offset) * x_offset)
    return finish(y, bias, relu, out_scale, out_offset, out_bits, row_scale, addend, out_unit)


def linear_colterm(w_codes: Tensor, w_scale: Tensor, w_offset: Tensor) -> Tensor:
    """``(float(sum_k cw_ok) * sw_o) + (float(K) * lw_o)``, ``[O]``: what an input of ones would
    give.
    """
    colsum = w_codes.sum(1, dtype=torch.int32).to(torch.float32)
    return (colsum * w_scale.reshape(-1)) + (float(w_codes.size(1)) * w_offset.reshape(-1))


def _fake(x_words: Tensor, w_words: Tensor, out_bits: int, out_unit: Tensor | None) -> Any:
    return new_output(x_words, x_words.size(0), w_words.size(0), out_bits, out_unit)


def check_product(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    out_bits: int,
    row_scale: Tensor | None,
    addend: Tensor | None,
    multiplier: Tensor | None,
    out_unit: Tensor | None,
) -> None:
    """Raise on arguments of :func:`linear` that a kernel cannot take."""
    check_packed(x_words, in_features, x_bits, "x_words")
    check_packed(w_words, in_features, w_bits, "w_words")
    num_rows, num_out = x_words.size(0), w_words.size(0)
    limit = most_products(x_bits, w_bits)
    if in_features > limit:
        raise ValueError(
            f"Expected at most {limit} features at {x_bits} x {w_bits} bits (got {in_features})"
        )
    for name, value in (("x_scale", x_scale), ("x_offset", x_offset)):
        if value.numel() != 1:
            check_float(value, name, (num_rows, 1))
        elif value.dtype is not torch.float32:
            raise TypeError(f"Expected '{name}' to be float32 (got {value.dtype})")
    check_multiplier(multiplier, x_scale, x_offset, num_rows)
    for name, value in (("w_scale", w_scale), ("w_offset", w_offset)):
        if value.numel() != 1:
            check_float(value, name, (num_out,), (num_out, 1))
        elif value.dtype is not torch.float32:
            raise TypeError(f"Expected '{name}' to be float32 (got {value.dtype})")
    check_float(bias, "bias", (num_out,))
    check_float(row_scale, "row_scale", (num_rows,))
    check_float(addend, "addend", (num_rows, num_out))
    check_output_range(out_scale, out_offset, out_bits, num_rows, num_out, out_unit)


register(linear_reference, _fake, check_product, rows="out_unit")


def linear(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
    is_checked: bool = False,
) -> Any:
    r"""``y_n = r_n (x^ w^T + b + a)_n`` on packed codes, exact in int32 up to the affine step.

    Args:
        x_words: ``[N, row_words(K, x_bits)]`` int32.
        w_words: ``[O, row_words(K, w_bits)]`` int32.
        x_scale, x_offset: Activation range: one element or ``[N, 1]`` (a range per input column
            does not factor out).
        w_scale, w_offset: Weight range: one element, ``[O]`` or ``[O, 1]``, per output channel.
        in_features: ``K``, below ``2^31 / (Q_x Q_w)``.
        x_bits, w_bits: Widths: 1, 2, 4 or 8.
        bias: ``[O]`` float32.
        relu: Whether to clamp at 0.
        out_scale, out_offset, out_bits: Range and width of packed output (one element, ``[O]`` or
            ``[N, 1]``).
        row_scale: ``[N]`` float32 factor of each result row, after bias and ReLU: with the source
            factor of a normalized adjacency, packed output is what neighbours send.
        addend: ``[N, O]`` float32, added before ReLU.
        multiplier: ``[N]`` uint8: row ``n`` of ``x`` has the range ``(s_x m_n, l_x m_n)``.  Not with a range per row.
        out_unit: Unit ``p`` of the row multipliers of packed output, one element, float32: row ``n`` is packed at the
            range ``(s m_n, l m_n)`` of ``out_scale``, ``out_offset``, ``m_n = clamp(ceil(max_o |y_no| / p), 1, 15)``.
        is_checked: Whether shapes, dtypes and devices are known to be as described: on the CPU the kernel is then run
            at once, where nobody looks at what is dispatched.

    Returns:
        ``[N, O]`` float32, or ``[N, row_words(O, out_bits)]`` int32 with ``out_bits``; with ``out_unit`` a pair, the
        words and the multipliers of their rows, ``[N]`` uint8.  Bitwise the same on every backend.

    Raises:
        TypeError: If an argument has another dtype.
        ValueError: If one has another shape, or is on another device, or if there are too many features for sums of
            31 bits.
    """
    args = (
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias,
        relu, out_scale, out_offset, out_bits, row_scale, addend, multiplier,
    )  # fmt: skip
    if is_checked and x_words.is_cpu and is_direct():
        return implementation("linear", "cpu")(*args, out_unit)
    if out_unit is None:
        return torch.ops.qgnn.linear.default(*args)
    return torch.ops.qgnn.linear.rows(*args, out_unit=out_unit)
