r"""Sums of float rows over neighbours, products per edge and largest values per destination: what training needs.

.. math::
    y_i = d_i \sum_{e = (j, i)} w_e\, s_j\, x_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..aggregate import destinations
from ..checks import check_float, check_matrix
from ..indices import check_csr, check_edge_rows, check_rowptr
from ..library import register

__all__ = ["edge_dots_reference", "float_sum_reference", "segment_largest_reference"]


def float_sum_reference(
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    dst_scale: Tensor | None = None,
    src_scale: Tensor | None = None,
    weight: Tensor | None = None,
    edge: Tensor | None = None,
) -> Tensor:
    """``[num_dst, F]``.

    Args:
        x: ``[num_src, F]``, float32 or float64.
        rowptr, col: The graph, by destination.
        dst_scale, src_scale: ``[num_dst]`` and ``[num_src]``, or ones.
        weight: ``[E, H]``, head ``h`` covering the features ``[h F / H, (h + 1) F / H)``, or ones.
        edge: ``[E]`` int64, the row of ``weight`` of each edge; default its position.
    """
    if x.size(1) == 0 or rowptr.numel() == 1:
        return x.new_zeros((rowptr.numel() - 1, x.size(1)))
    source = col.long()
    gathered = x[source]
    if src_scale is not None:
        gathered = gathered * src_scale[source].unsqueeze(1)
    if weight is not None:
        weight = weight if edge is None else weight[edge]
        heads = weight.size(1)
        by_head = gathered.view(gathered.size(0), heads, x.size(1) // heads)
        gathered = (by_head * weight.unsqueeze(2)).view_as(gathered)
    out = torch.segment_reduce(gathered, "sum", offsets=rowptr, axis=0, initial=0)
    return out if dst_scale is None else out * dst_scale.unsqueeze(1)


def edge_dots_reference(a: Tensor, b: Tensor, rowptr: Tensor, col: Tensor, heads: int = 1) -> Tensor:
    """``<a_i, b_j>`` per edge and head, ``[E, heads]``, of ``a`` ``[num_dst, F]`` and ``b`` ``[num_src, F]``."""
    products = a[destinations(rowptr, col.numel())] * b[col.long()]
    return products.view(products.size(0), heads, a.size(1) // heads).sum(-1)


def segment_largest_reference(values: Tensor, rowptr: Tensor, fill: float = 0.0) -> Tensor:
    """The largest of ``values`` ``[E, H]`` in each segment, or ``fill``: ``[num_dst, H]``."""
    index = destinations(rowptr, values.size(0)).unsqueeze(1).expand_as(values)
    out = values.new_full((rowptr.numel() - 1, values.size(1)), fill)
    return out.scatter_reduce_(0, index, values, "amax", include_self=False)


def _fake_sum(x: Tensor, rowptr: Tensor) -> Tensor:
    return x.new_empty((rowptr.numel() - 1, x.size(1)))


def _fake_dots(a: Tensor, col: Tensor, heads: int) -> Tensor:
    return a.new_empty((col.numel(), heads))


def _fake_largest(values: Tensor, rowptr: Tensor) -> Tensor:
    return values.new_empty((rowptr.numel() - 1, values.size(1)))


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_sum(
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    dst_scale: Tensor | None,
    src_scale: Tensor | None,
    weight: Tensor | None,
    edge: Tensor | None,
) -> None:
    check_matrix(x, "x", *FLOATS)
    check_csr(rowptr, col, x.size(0))
    check_float(dst_scale, "dst_scale", (rowptr.numel() - 1,), dtype=x.dtype)
    check_float(src_scale, "src_scale", (x.size(0),), dtype=x.dtype)
    if weight is None:
        if edge is not None:
            raise ValueError("Expected 'weight' with 'edge' (got None)")
        return
    check_matrix(weight, "weight", x.dtype)
    heads = weight.size(1)
    if heads == 0 or x.size(1) % heads:
        raise ValueError(f"Expected 'weight' of heads that divide {x.size(1)} features (got {heads})")
    if edge is not None:
        check_edge_rows(edge, col.numel(), weight.size(0))
    elif weight.size(0) != col.numel():
        raise ValueError(f"Expected a row of 'weight' per edge, {col.numel()} (got {weight.size(0)})")


def _check_dots(a: Tensor, b: Tensor, rowptr: Tensor, col: Tensor, heads: int) -> None:
    check_matrix(a, "a", *FLOATS)
    check_matrix(b, "b", a.dtype)
    check_csr(rowptr, col, b.size(0))
    if a.shape != (rowptr.numel() - 1, b.size(1)):
        raise ValueError(f"Expected 'a' of shape {[rowptr.numel() - 1, b.size(1)]} (got {list(a.shape)})")
    if heads < 1 or a.size(1) % heads:
        raise ValueError(f"Expected 'heads' to divide {a.size(1)} features (got {heads})")


def _check_largest(values: Tensor, rowptr: Tensor) -> None:
    check_matrix(values, "values", *FLOATS)
    check_rowptr(rowptr, values.size(0))


register(float_sum_reference, _fake_sum, _check_sum)
register(edge_dots_reference, _fake_dots, _check_dots)
register(segment_largest_reference, _fake_largest, _check_largest)
