"""A quantized tensor in code space: what layers compute with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import OFF
from ..kernels.layout import top_code
from ..kernels.plan import GraphPlan
from . import compressed
from .functional import HALF
from .packed import PackedTensor
from .rows import RowRange

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    r"""Values :math:`\hat x = c s + l` as codes and an affine map.

    Args:
        codes: ``[*, F]`` integer-valued floats (any floats where the site is off), or the ``[nnz]`` codes at the
            stored positions of a sparse ``[N, F]`` matrix whose other codes are 0.
        scale: Step size ``s``: scalar, ``[F]`` (channel) or ``[N, 1]`` (node, row).
        lower: Lower end ``l``, of the same shape.
        qmax: Largest code, :obj:`None` where the site is off and ``codes`` are the values themselves.
        unsigned: Whether ``l`` is known to be zero.
        pattern: For sparse codes, their positions: rows over ``F`` columns.
        packed: In :func:`qgnn_plugin.compressed_activations`, the same codes packed; the gradient of ``codes`` is then
            that of the values.
        rows: Where ``scale`` and ``lower`` are integer multiples of one range, these: sums over rows are then sums of
            integers.
    """

    codes: Tensor
    scale: Tensor
    lower: Tensor
    qmax: int | None
    unsigned: bool = False
    pattern: GraphPlan | None = None
    packed: PackedTensor | None = None
    rows: RowRange | None = None

    @classmethod
    def identity(cls, x: Tensor, pattern: GraphPlan | None = None) -> QuantizedTensor:
        """Wrap unquantized values."""
        one = x.new_ones(())
        return cls(x, one, torch.zeros_like(one), None, True, pattern)

    @classmethod
    def unpacked(cls, packed: PackedTensor) -> QuantizedTensor:
        """The same codes as floats, outside the autograd graph: what the arithmetic of converted layers takes."""
        qmax, rows = None if packed.bits == OFF else top_code(packed.bits), None
        if packed.multiplier is not None:
            rows = RowRange(packed.multiplier.to(torch.float32).unsqueeze(1), packed.scale, packed.lower)
        return cls(packed.codes(), *packed.row_range, qmax, packed.unsigned, rows=rows)

    @property
    def bits(self) -> int:
        """Width of a stored code; 32 where the site is off."""
        return OFF if self.qmax is None else self.qmax.bit_length()

    @property
    def shape(self) -> tuple[int, ...]:
        if self.pattern is not None:
            return (self.pattern.num_dst, self.pattern.num_src)
        return tuple(self.codes.shape)

    def detached(self) -> QuantizedTensor:
        """The same tensor outside the autograd graph."""
        parts = {name: getattr(self, name).detach() for name in ("codes", "scale", "lower")}
        return replace(self, **parts, packed=None, rows=None if self.rows is None else self.rows.detach())

    @property
    def per_node(self) -> bool:
        """Whether every row has a range of its own."""
        return self.scale.dim() >= 2 and self.scale.size(-1) == 1 and self.scale.numel() != 1

    def dense(self) -> QuantizedTensor:
        """The same tensor with a code for every element."""
        if self.pattern is None:
            return self
        positions = (self.pattern.dst, self.pattern.col.long())
        codes = self.codes.new_zeros(self.shape).index_put(positions, self.codes)
        return QuantizedTensor(codes, self.scale, self.lower, self.qmax, self.unsigned, rows=self.rows)

    def to(self, dtype: torch.dtype) -> QuantizedTensor:
        """The same codes and range in another precision."""
        parts = {name: getattr(self, name).to(dtype) for name in ("codes", "scale", "lower")}
        return replace(self, **parts, rows=None if self.rows is None else self.rows.to(dtype))

    def dequantize(self) -> Tensor:
        r"""The values :math:`c s + l` as a dense tensor."""
        if self.packed is not None:
            return compressed.dequantize(self.codes, self.scale, self.lower)
        codes = self.dense().codes
        if self.qmax is None:
            return codes
        if codes.dtype in HALF:
            return self.dense().to(torch.float32).dequantize().to(codes.dtype)
        values = codes * self.scale
        return values if self.unsigned else values + self.lower
