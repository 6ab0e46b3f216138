"""Codes in packed words, with their range: what packed layers hand on, and what backward passes of training keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import OFF
from ..kernels.aggregate import per_feature
from ..kernels.layout import unpack_codes
from ..kernels.quantize_pack import quantize_pack
from ..kernels.unpack_dequantize import unpack_dequantize

__all__ = ["PackedTensor", "joined", "pack", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer-valued ``codes`` ``[*, F]`` of any dtype into rows of words."""
    one = torch.ones(1, dtype=torch.float32, device=codes.device)
    return quantize_pack(codes.float().reshape(-1, codes.shape[-1]), one, torch.zeros_like(one), bits)


def unpack(words: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """Codes of ``shape`` from rows of words, in float32."""
    one = torch.ones(1, dtype=torch.float32, device=words.device)
    return unpack_dequantize(words, one, torch.zeros_like(one), shape[-1], bits).view(shape)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A matrix ``[N, F]``, or a tensor ``[*, F]`` as the rows of one, as packed codes and an affine map.

    Args:
        words: ``[N, row_words(F, bits)]`` int32; the values themselves, ``[*, F]``, at 32 bits.
        scale: One element, ``[F]``, ``[N, 1]`` or, for ``H`` heads with ranges of their own, ``[N, H]``, float32; of a
            tensor ``[*, F]`` one element, ``[F]`` or ``[*, 1]``.
        lower: Lower end of the range, of the same shape.
        num_features: ``F``.
        bits: Width of a code: 1, 2, 4 or 8; 32 where values are not quantized.
        unsigned: Whether ``lower`` is known to be zero.
        multiplier: ``[N]`` uint8, where each row has a multiple of the range, of one element.
        leading: The dimensions before the last, where they are not ``(N,)``.
    """

    words: Tensor
    scale: Tensor
    lower: Tensor
    num_features: int
    bits: int
    unsigned: bool
    multiplier: Tensor | None = None
    leading: torch.Size | None = None

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, lower: Tensor, bits: int, unsigned: bool = False) -> PackedTensor:
        """Pack ``codes`` ``[*, F]``; the range broadcasts to them (one element, per channel or per row)."""
        words = codes.detach() if bits == OFF else pack(codes.detach(), bits)
        *leading, num_features = codes.shape
        return cls(
            words, scale.detach(), lower.detach(), num_features, bits, unsigned, leading=torch.Size(leading)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, F)`` or ``(*, F)``."""
        return (self.words.size(0), self.num_features) if self.leading is None else (*self.leading, self.num_features)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scale and lower end: what a backward pass saves of one without multipliers."""
        return self.words, self.scale, self.lower

    @property
    def layout(self) -> tuple[Any, ...]:
        """The rest: ``PackedTensor(*tensors, *layout)``."""
        return self.num_features, self.bits, self.unsigned, None, self.leading

    @property
    def row_range(self) -> tuple[Tensor, Tensor]:
        """Scale and lower end with the multiples that rows have of them, ``[N, 1]`` then."""
        if self.multiplier is None:
            return self.scale, self.lower
        multiplier = self.multiplier.to(torch.float32).unsqueeze(1)
        return self.scale * multiplier, self.lower * multiplier

    def kernel_range(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``lower`` in the forms that kernels know for ``[N, F]``."""
        return self._of_rows(self.scale), self._of_rows(self.lower)

    def _of_rows(self, value: Tensor) -> Tensor:
        if value.numel() == 1:
            return value.reshape(1)
        return value if value.dim() == 1 else value.expand(*self.shape[:-1], 1).reshape(-1, 1)

    def codes(self) -> Tensor:
        """The codes as float32, of :attr:`shape`; at 32 bits the values."""
        return self.words if self.bits == OFF else unpack(self.words, self.shape, self.bits)

    def dequantize(self) -> Tensor:
        """The values ``c s + l`` in float32, of :attr:`shape`."""
        if self.bits == OFF:
            return self.words
        if self.leading is not None:
            return unpack_dequantize(self.words, *self.kernel_range(), self.num_features, self.bits).view(self.shape)
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


def joined(parts: Sequence[PackedTensor]) -> PackedTensor:
    """Blocks of rows as one matrix."""
    if len(parts) == 1:
        return parts[0]
    words, scale, lower = torch.cat([p.words for p in parts]), parts[0].scale, parts[0].lower
    if scale.dim() == 2:
        scale, lower = torch.cat([p.scale for p in parts]), torch.cat([p.lower for p in parts])
    found = [p.multiplier for p in parts if p.multiplier is not None]
    return replace(parts[0], words=words, scale=scale, lower=lower, multiplier=torch.cat(found) if found else None)
