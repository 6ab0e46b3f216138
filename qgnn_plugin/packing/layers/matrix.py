"""A weight matrix in packed words, and what multiplies by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.aggregate import aggregate
from ...kernels.head_linear import head_linear
from ...kernels.layout import most_products, pack_codes, top_code, unpack_codes
from ...kernels.linear import Product, linear
from ...kernels.plan import plan_cache
from ...layers import arithmetic
from ...layers.arithmetic import EXACT_FLOAT32
from ...quantizers import QuantizedTensor
from ..lazy.producers import Producer, with_epilogue
from .ranges import PackedRange, PackedTensor

__all__ = ["Activation", "PackedMatrix", "wide_product"]

Activation = PackedTensor | QuantizedTensor


def wide_product(x: Activation, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` of ``[N, K]`` and ``[O, K]`` in floats over unpacked codes, as the converted layer computes it."""
    quantized = QuantizedTensor.unpacked(x) if isinstance(x, PackedTensor) else x
    return arithmetic.linear(quantized, weight, bias, exact=True)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    r"""A weight ``[O, K]``, :math:`\hat w = c s + l` with one range or one per row.

    Args:
        packed: Its rows.
        scale: One element or ``[O]``, float32, as products take it.
        lower: Lower end, of the same shape.
        is_checked: Whether its tensors are known to be as described.
    """

    packed: PackedTensor
    scale: Tensor
    lower: Tensor
    is_checked: bool = False

    @classmethod
    def of(cls, words: Tensor, scale: Tensor, lower: Tensor, num_in: int, bits: int, unsigned: bool) -> PackedMatrix:
        """Of words ``[O, row_words(K, bits)]`` int32; ``unsigned`` where the lower end is known to be zero."""
        step, start = (v.view(-1, 1) if v.numel() > 1 else v for v in (scale, lower))
        return cls(PackedTensor(words, step, start, num_in, bits, unsigned), scale, lower)

    @property
    def words(self) -> Tensor:
        return self.packed.words

    @property
    def num_in(self) -> int:
        return self.packed.num_features

    @property
    def num_out(self) -> int:
        return self.packed.words.size(0)

    @property
    def bits(self) -> int:
        return self.packed.bits

    def rows(self, start: int, stop: int) -> PackedMatrix:
        """The rows ``[start, stop)``."""
        packed = self.packed.rows(start, stop)
        return PackedMatrix(packed, packed.scale.view(-1), packed.lower.view(-1))

    def codes(self) -> QuantizedTensor:
        """The matrix unpacked."""
        return QuantizedTensor.unpacked(self.packed)

    def times(self, x: Activation, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b`` of ``[N, K]``: by integer products where that can be, else as the converted layer does."""
        product = self.product(x, bias)
        return wide_product(x, self.codes(), bias) if product is None else product()

    def product(self, x: Activation, bias: Tensor | None, row_scale: Tensor | None = None) -> Producer | None:
        """``x W^T + b``, by a factor ``[N]`` per row, as integer products; :obj:`None` where it is none.

        That takes input whose range factors out of the product.
        """
        if isinstance(x, QuantizedTensor):
            return self._sparse_product(x, bias, row_scale)
        if not self._factors_out(x):
            return None
        fits = bias is None or (bias.shape == (self.num_out,) and bias.dtype is torch.float32)
        is_checked = self.is_checked and fits and self.words.is_cpu

        def product(start: int, stop: int) -> Product:
            rows = x.rows(start, stop)
            return Product(
                rows.words, self.words, rows.scale, rows.lower, self.scale, self.lower, self.num_in, x.bits, self.bits,
                bias, rows.multiplier,
            )  # fmt: skip

        def run(start: int, stop: int, **out: Any) -> Tensor:
            factor = None if row_scale is None else row_scale[start:stop]
            of_rows = product(start, stop)
            return linear(
                *of_rows[:-2], bias=bias, row_scale=factor, multiplier=of_rows.multiplier, is_checked=is_checked, **out
            )

        def taken(index: Tensor) -> Producer:
            factor = None if row_scale is None else row_scale[index]
            return self.product(x.take(index), bias, factor)  # type: ignore[return-value]

        adds = row_scale is None
        shape = (x.words.size(0), self.num_out)
        return Producer(*shape, x.words.device, run, adds=adds, taken=taken, product=product if adds else None)

    def with_head_dots(
        self, x: Activation, bias: Tensor | None, target: PackedRange, vectors: Tensor, heads: int
    ) -> tuple[PackedTensor, Tensor] | None:
        """``y = x W^T + b`` quantized to ``target`` and dot products of its heads with ``vectors`` ``[V, O]``,
        ``[V, N, H]``; :obj:`None` where these are not one kernel's.
        """
        if not isinstance(x, PackedTensor) or not target.spec.is_fixed or not self._factors_out(x):
            return None
        out = target.output_range()
        words, times, dots = head_linear(
            x.words, self.words, x.scale, x.lower, self.scale, self.lower, self.num_in, x.bits, self.bits, vectors,
            heads, **out, bias=bias, multiplier=x.multiplier, is_checked=True,
        )  # fmt: skip
        return target.wrap((words, times) if target.has_multipliers else words, self.num_out), dots

    def _factors_out(self, x: PackedTensor) -> bool:
        """Whether ``x W^T`` is a product of integers, its range a factor, and these stay below ``2^31``."""
        factors_out = x.scale.dim() != 1 or x.scale.numel() <= 1
        return factors_out and self.num_in <= most_products(x.bits, self.bits)

    def _sparse_product(self, x: QuantizedTensor, bias: Tensor | None, row_scale: Tensor | None) -> Producer | None:
        """Sparse codes times the weight: a sum of the packed rows of ``W^T`` that a row of ``x`` names."""
        if x.pattern is None or x.qmax is None:
            return None
        pattern, words, bits, num_in, num_out = x.pattern, self.words, self.bits, self.num_in, self.num_out
        if pattern.max_degree * x.qmax * top_code(bits) >= EXACT_FLOAT32:
            return None

        def transposed() -> Tensor:
            return pack_codes(unpack_codes(words, num_in, bits).t(), bits)

        messages = plan_cache.get((words,), ("transposed", num_in, bits), transposed)
        scale, lower = (v.expand(num_out).contiguous() for v in (self.scale, self.lower))
        step = x.scale.expand(pattern.num_dst, 1).reshape(-1)
        codes = None if x.qmax == 1 and bool(x.codes.all()) else x.codes

        def run(start: int, stop: int, **out: Any) -> Tensor:
            weight = None if codes is None else codes[pattern.edges(start, stop)]
            fused = out if row_scale is None else {}
            y = aggregate(
                messages, pattern.rows(start, stop), scale, lower, num_out, bits, edge_weight=weight,
                dst_scale=step[start:stop], bias=bias, **fused,
            )  # fmt: skip
            return y if row_scale is None else with_epilogue(y.mul_(row_scale[start:stop].view(-1, 1)), **out)

        return Producer(pattern.num_dst, num_out, words.device, run, is_fused=row_scale is None)
