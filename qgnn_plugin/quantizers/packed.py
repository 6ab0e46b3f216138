"""Packed codes that a backward pass reads: :class:`Packed`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import OFF
from ..kernels.quantize_pack import quantize_pack
from ..kernels.unpack_dequantize import unpack_dequantize

__all__ = ["Packed", "pack", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer-valued ``codes`` ``[*, F]`` of any dtype into rows of words."""
    one = torch.ones(1, dtype=torch.float32, device=codes.device)
    return quantize_pack(codes.float().reshape(-1, codes.shape[-1]), one, torch.zeros_like(one), bits)


def unpack(words: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """Codes of ``shape`` from rows of words, in float32."""
    one = torch.ones(1, dtype=torch.float32, device=words.device)
    return unpack_dequantize(words, one, torch.zeros_like(one), shape[-1], bits).view(shape)


class Packed(NamedTuple):
    """Packed codes of a tensor of ``shape`` ``[*, F]`` with their affine map; with 32 bits, the values themselves.

    The first three fields are what a backward pass saves; the others are its ``layout``.
    """

    words: Tensor
    scale: Tensor
    lower: Tensor
    bits: int
    shape: torch.Size
    unsigned: bool  # whether ``lower`` is known to be zero

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, lower: Tensor, bits: int, unsigned: bool = False) -> Packed:
        """Pack ``codes``; the range broadcasts to them (one element, per channel or per row)."""
        words = codes.detach() if bits == OFF else pack(codes.detach(), bits)
        return cls(words, scale.detach(), lower.detach(), bits, codes.shape, unsigned)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scale and lower end."""
        return self.words, self.scale, self.lower

    @property
    def layout(self) -> tuple[int, torch.Size, bool]:
        """The rest: ``Packed(*tensors, *layout)``."""
        return self.bits, self.shape, self.unsigned

    def codes(self) -> Tensor:
        """The codes as float32."""
        return self.words if self.bits == OFF else unpack(self.words, self.shape, self.bits)

    def values(self) -> Tensor:
        """``c s + l``."""
        if self.bits == OFF:
            return self.words
        return unpack_dequantize(self.words, *self.kernel_range(), self.shape[-1], self.bits).view(self.shape)

    def kernel_range(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``lower`` in the forms that kernels know for ``[N, F]``."""
        return _kernel_range(self.scale, self.shape), _kernel_range(self.lower, self.shape)


def _kernel_range(value: Tensor, shape: torch.Size) -> Tensor:
    """A range that broadcasts to ``shape``: one element, ``[F]`` or ``[N, 1]``."""
    if value.numel() == 1:
        return value.reshape(1)
    return value if value.dim() == 1 else value.expand(*shape[:-1], 1).reshape(-1, 1)
