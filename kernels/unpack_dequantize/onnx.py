"""``unpack_dequantize`` in operations that ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import multiplied
from ..onnx import unpack


def unpack_dequantize(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int, multiplier: Tensor | None = None
) -> Tensor:
    if multiplier is not None:
        scale, offset = multiplied(scale, offset, multiplier)
    return unpack(words, num_features, bits).to(torch.float32) * scale + offset
