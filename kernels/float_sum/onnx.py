"""``float_sum`` and ``segment_largest`` in operations that ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..onnx import largest, spread, sums


def float_sum(
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    dst_scale: Tensor | None = None,
    src_scale: Tensor | None = None,
    weight: Tensor | None = None,
    edge: Tensor | None = None,
) -> Tensor:
    if weight is not None:
        weight = spread(weight if edge is None else weight[edge], x.size(1))
    out = sums(x if src_scale is None else x * src_scale.unsqueeze(1), rowptr, col, weight)
    return out if dst_scale is None else out * dst_scale.unsqueeze(1)


def segment_largest(values: Tensor, rowptr: Tensor, fill: float = 0.0) -> Tensor:
    some = (rowptr[1:] > rowptr[:-1]).unsqueeze(1)
    return torch.where(some, largest(values, rowptr, float("-inf")), fill)
