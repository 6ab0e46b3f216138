"""``aggregate`` in operations that ONNX has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arithmetic import is_per_row, multiplied
from ..onnx import finish, into_rows, largest, spread, sums, unpack


def aggregate(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    reduce: str,
    edge_weight: Tensor | None,
    dst_scale: Tensor | None,
    multiplier: Tensor | None,
    **epilogue: Any,
) -> Any:
    codes = unpack(words, num_features, bits)
    degree = (rowptr[1:] - rowptr[:-1]).unsqueeze(1)
    per_row = is_per_row(scale) or is_per_row(offset)
    if reduce == "max":
        y = largest(codes[col.long()], rowptr, -1).to(torch.float32) * scale + offset
        y = torch.where(degree > 0, y, 0.0)
    elif edge_weight is None and not per_row:
        if multiplier is None:
            total, mass = sums(codes, rowptr, col), degree
        else:
            m = multiplier.to(torch.int64).unsqueeze(1)
            total, mass = sums(codes * m, rowptr, col), sums(m, rowptr, col)
        y = (total.to(torch.float32) * scale) + (mass.to(torch.float32) * offset)
    else:
        weight = None if edge_weight is None else spread(edge_weight, num_features)
        if multiplier is not None:
            scale, offset = multiplied(scale, offset, multiplier)
        if per_row or multiplier is not None:
            y = sums(codes.to(torch.float32) * scale + offset, rowptr, col, weight)
        else:
            assert weight is not None
            y = (sums(codes.to(torch.float32), rowptr, col, weight) * scale) + (into_rows(weight, rowptr) * offset)
    y = y if dst_scale is None else y * dst_scale.unsqueeze(1)
    return finish(y, **epilogue)
