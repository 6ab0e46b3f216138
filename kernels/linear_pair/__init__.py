r"""``linear_pair``: the sum of two products of :func:`~..linear.linear`, of features and of what neighbours bring, say,
without a float matrix in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, ops

from .. import linear as product
from ..aggregate import new_output
from ..library import register
from ..linear import Product

__all__ = ["linear_pair", "linear_pair_reference"]


def linear_pair_reference(
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
    multiplier: Tensor | None,
    x2_words: Tensor,
    w2_words: Tensor,
    x2_scale: Tensor,
    x2_offset: Tensor,
    w2_scale: Tensor,
    w2_offset: Tensor,
    in_features2: int,
    x2_bits: int,
    w2_bits: int,
    bias2: Tensor | None,
    multiplier2: Tensor | None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    out_unit: Tensor | None = None,
) -> Any:
    other = product.linear_reference(
        x2_words, w2_words, x2_scale, x2_offset, w2_scale, w2_offset, in_features2, x2_bits, w2_bits, bias2,
        multiplier=multiplier2,
    )  # fmt: skip
    return product.linear_reference(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias, relu, out_scale,
        out_offset, out_bits, addend=other, multiplier=multiplier, out_unit=out_unit,
    )  # fmt: skip


def _fake(x_words: Tensor, w_words: Tensor, out_bits: int, out_unit: Tensor | None) -> Any:
    return new_output(x_words, x_words.size(0), w_words.size(0), out_bits, out_unit)


def _check(
    x2_words: Tensor,
    w2_words: Tensor,
    x2_scale: Tensor,
    x2_offset: Tensor,
    w2_scale: Tensor,
    w2_offset: Tensor,
    in_features2: int,
    x2_bits: int,
    w2_bits: int,
    bias2: Tensor | None,
    multiplier2: Tensor | None,
    relu: bool,
    **first: Any,
) -> None:
    del relu
    product.check_product(row_scale=None, addend=None, **first)
    product.check_product(
        x2_words, w2_words, x2_scale, x2_offset, w2_scale, w2_offset, in_features2, x2_bits, w2_bits, bias2, None, None,
        0, None, None, multiplier2, None,
    )  # fmt: skip
    sizes = [(x.size(0), w.size(0)) for x, w in ((first["x_words"], first["w_words"]), (x2_words, w2_words))]
    if sizes[0] != sizes[1]:
        raise ValueError(f"Expected two products of one size (got {list(sizes[0])} and {list(sizes[1])})")


register(linear_pair_reference, _fake, _check, rows="out_unit")


def linear_pair(
    first: Product,
    second: Product,
    *,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    out_unit: Tensor | None = None,
) -> Any:
    r"""``y_n = (x^ w^T + b)_n + (x'^ w'^T + b')_n`` on packed codes, each exact in int32 up to its affine step.

    Args:
        first, second: Products ``[N, O]``, as :func:`~..linear.linear` takes them.
        relu, out_scale, out_offset, out_bits, out_unit: As those of :func:`~..linear.linear`.

    Returns:
        As :func:`~..linear.linear`: floats, packed rows, or these and the multipliers of the rows.  Bitwise what
        :func:`~..linear.linear` of ``first`` gives with the other as ``addend``, on every backend.

    Raises:
        TypeError, ValueError: As :func:`~..linear.linear`; if the products differ in size.
    """
    args = (*first, *second, relu, out_scale, out_offset, out_bits)
    if out_unit is None:
        return ops.qgnn.linear_pair.default(*args)
    return ops.qgnn.linear_pair.rows(*args, out_unit=out_unit)
