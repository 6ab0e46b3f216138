"""``linear`` in operations that ONNX has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arithmetic import multiplied
from ..onnx import finish, unpack


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
    multiplier: Tensor | None,
    **epilogue: Any,
) -> Any:
    if multiplier is not None:
        x_scale, x_offset = multiplied(x_scale, x_offset, multiplier)
    x, w = unpack(x_words, in_features, x_bits), unpack(w_words, in_features, w_bits)
    # Products of small integers are exact in float64.
    product = (x.to(torch.float64) @ w.to(torch.float64).t()).to(torch.float32)
    rows, columns = x.sum(1, keepdim=True).to(torch.float32), w.sum(1).to(torch.float32)
    y = (product * w_scale.reshape(1, -1)) + (rows * w_offset.reshape(1, -1))
    column = (columns * w_scale.reshape(-1)) + (float(in_features) * w_offset.reshape(-1))
    y = (y * x_scale) + (column * x_offset)
    return finish(y, **epilogue)
