"""``head_linear`` in operations that ONNX has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..head_dots import head_dots_reference
from ..linear.onnx import linear
from ..onnx import finish
from . import with_multipliers


def head_linear(
    vectors: Tensor,
    heads: int,
    out_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    out_unit: Tensor | None,
    **product: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    y = linear(**product)
    packed = finish(y, None, False, out_scale, out_offset, out_bits, out_unit=out_unit)
    return *with_multipliers(packed), head_dots_reference(y, vectors, heads)
