"""A matrix held as packed words, with the range of its codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.aggregate import per_feature
from ..kernels.layout import top_code, unpack_codes
from ..kernels.unpack_dequantize import unpack_dequantize
from ..quantizers import QuantizedTensor
from ..quantizers.rows import RowRange

__all__ = ["PackedTensor", "joined"]


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A matrix ``[N, F]`` as packed codes and an affine map.

    Args:
        words: ``[N, row_words(F, bits)]`` int32.
        scale: One element, ``[F]``, ``[N, 1]`` or, for ``H`` heads with ranges of their own, ``[N, H]``, float32.
        lower: Lower end of the range, of the same shape.
        num_features: ``F``.
        bits: Width of a code: 1, 2, 4 or 8.
        unsigned: Whether ``lower`` is known to be zero.
        multiplier: ``[N]`` uint8, where each row has a multiple of the range, of one element.
    """

    words: Tensor
    scale: Tensor
    lower: Tensor
    num_features: int
    bits: int
    unsigned: bool
    multiplier: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, F)``."""
        return self.words.size(0), self.num_features

    @property
    def row_range(self) -> tuple[Tensor, Tensor]:
        """Scale and lower end with the multiples that rows have of them, ``[N, 1]`` then."""
        if self.multiplier is None:
            return self.scale, self.lower
        multiplier = self.multiplier.to(torch.float32).unsqueeze(1)
        return self.scale * multiplier, self.lower * multiplier

    def dequantize(self) -> Tensor:
        """``[N, F]`` float32."""
        if self.scale.numel() == 1:
            options: dict[str, Any] = {"multiplier": self.multiplier, "is_checked": True}
            return unpack_dequantize(self.words, self.scale, self.lower, self.num_features, self.bits, **options)
        scale, lower = self.row_range
        if scale.dim() == 2 and scale.size(1) > 1:
            scale, lower = (per_feature(v, self.num_features) for v in (scale, lower))
            return unpack_codes(self.words, self.num_features, self.bits) * scale + lower
        return unpack_dequantize(self.words, scale, lower, self.num_features, self.bits)

    def rows(self, start: int, stop: int) -> PackedTensor:
        """The rows ``[start, stop)``."""
        if (start, stop) == (0, self.words.size(0)):
            return self
        per_row = self.scale.dim() == 2
        scale, lower = (v[start:stop] if per_row else v for v in (self.scale, self.lower))
        multiplier = None if self.multiplier is None else self.multiplier[start:stop]
        return replace(self, words=self.words[start:stop], scale=scale, lower=lower, multiplier=multiplier)

    def take(self, rows: Tensor) -> PackedTensor:
        """The rows numbered by ``rows`` ``[M]``, integers."""
        per_row = self.scale.dim() == 2
        scale, lower = (v.index_select(0, rows) if per_row else v for v in (self.scale, self.lower))
        multiplier = None if self.multiplier is None else self.multiplier.index_select(0, rows)
        words = self.words.index_select(0, rows)
        return replace(self, words=words, scale=scale, lower=lower, multiplier=multiplier)

    def quantized(self) -> QuantizedTensor:
        """The same tensor with its codes as floats: what the arithmetic of converted layers takes."""
        codes = unpack_codes(self.words, self.num_features, self.bits).to(torch.float32)
        rows = None
        if self.multiplier is not None:
            rows = RowRange(self.multiplier.to(torch.float32).unsqueeze(1), self.scale, self.lower)
        return QuantizedTensor(codes, *self.row_range, top_code(self.bits), self.unsigned, rows=rows)


def joined(parts: Sequence[PackedTensor]) -> PackedTensor:
    """Blocks of rows as one matrix."""
    if len(parts) == 1:
        return parts[0]
    words, scale, lower = torch.cat([p.words for p in parts]), parts[0].scale, parts[0].lower
    if scale.dim() == 2:
        scale, lower = torch.cat([p.scale for p in parts]), torch.cat([p.lower for p in parts])
    found = [p.multiplier for p in parts if p.multiplier is not None]
    return replace(parts[0], words=words, scale=scale, lower=lower, multiplier=torch.cat(found) if found else None)
