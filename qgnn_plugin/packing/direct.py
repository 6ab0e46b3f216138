"""The short way of a packed linear layer: few float rows in, float rows out, by one compiled call.

It computes what the long way does, bit for bit, where nothing has to be known of the call that a look at the input does
not tell: whoever watches operations, differentiates, traces or runs elsewhere goes the long way, and so does what is to
be refused.  Results are floats at once, since on few rows putting them off costs more than writing them.
"""

from __future__ import annotations

from operator import is_not
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import has_numba, is_direct
from ..kernels.linear import few_rows_linear
from ..quantizers.autocast import is_autocasting
from .ranges import ONE_BIT, SiteSpec

__all__ = ["FEW_RESULTS", "Direct", "direct_product"]

FEW_RESULTS = 1 << 16  # of more, codes that are handed on save more than the long way costs
ROW_COST, ALONE = 1 << 9, 1 << 14  # products of a row and rows of that cost, from which on threads share the work


class Direct:
    """What the short way of a layer was prepared from, and the prepared call: :obj:`None` where it has none."""

    __slots__ = ("call", "most_rows", "num_in", "num_out", "sources")

    def __init__(self, layer: Any, sources: tuple[Any, ...]) -> None:
        self.sources = sources
        self.num_in, self.num_out = layer._num_in, layer._num_out
        self.call = _prepared(layer, sources)
        self.most_rows = FEW_RESULTS // max(1, self.num_out)


def _sources(layer: Any) -> tuple[Any, ...]:
    """The objects that the short way reads: another one in the place of any has it prepared again."""
    range_, buffers, parameters = layer._modules.get("input_quantizer"), layer._buffers, layer._parameters
    if range_ is None:
        return ()
    ranges = range_._buffers
    return (
        range_, buffers.get("words"), parameters.get("weight_scale"), buffers.get("weight_lower_end"),
        parameters.get("bias"), ranges.get("scale"), ranges.get("lower_end"), ranges.get("unit"),
    )  # fmt: skip


def _prepared(layer: Any, sources: tuple[Any, ...]) -> Any:
    """The prepared call; :obj:`None` where the layer, or one of its numbers, is not as the short way takes them."""
    if not sources or not has_numba() or layer.output_quantizer is not None or "bias" not in layer._parameters:
        return None
    range_, words, scale, lower, bias, x_scale, x_lower, x_unit = sources
    site, own = range_.spec, layer._site
    if words is None or scale is None or not site.is_fixed or site.granularity not in ("tensor", "row"):
        return None
    if own.bits == ONE_BIT or layer._num_in * layer._num_out == 0 or layer._num_in > _widest(site, own):
        return None
    shapes = {words: words.shape, x_scale: (), x_lower: (), x_unit: ()}
    count = scale.numel()
    shapes |= {scale: (count,), lower: (count,), bias: (layer._num_out,)}
    for tensor, shape in shapes.items():
        if tensor is not None and not _is_plain(tensor, shape, torch.int32 if tensor is words else torch.float32):
            return None
    if count not in (1, layer._num_out) or layer._matrix.prepared is None:
        return None
    ends = (own.zero_code if lower is None else lower), (site.zero_code if x_lower is None else x_lower)
    if None in ends or (x_unit is None) == site.has_multipliers:
        return None
    bits = (site.bits, own.bits)
    return few_rows_linear(words, scale, ends[0], layer._num_in, bits, x_scale, ends[1], x_unit, bias)


def _widest(site: SiteSpec, own: SiteSpec) -> int:
    """The most features whose products fit a sum of 31 bits."""
    return (2**31 - 1) // (((1 << site.bits) - 1) * ((1 << own.bits) - 1))


def _is_plain(tensor: Tensor, shape: Any, dtype: torch.dtype) -> bool:
    kind = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.dtype is dtype
    return kind and tensor.layout is torch.strided and tuple(tensor.shape) == tuple(shape) and tensor.is_contiguous()


def direct_product(layer: Any, x: Any) -> Tensor | None:
    """What the packed linear ``layer`` gives for ``x``, :obj:`None` where that is for the long way to say."""
    if not is_direct() or type(x) is not Tensor or layer.training:
        return None
    if x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided or not x.is_contiguous():
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or x.is_neg() or is_autocasting():
        return None
    last = layer._packed.last
    direct, sources = last.direct, _sources(layer)
    if direct is None or len(direct.sources) != len(sources) or any(map(is_not, direct.sources, sources)):
        direct = last.direct = Direct(layer, sources)
    shape = x.shape
    if direct.call is None or not shape or shape[-1] != direct.num_in:
        return None
    rows = x.numel() // direct.num_in
    range_ = sources[0]
    if not 0 < rows <= direct.most_rows or not range_.check or range_._forward_hooks or range_._forward_pre_hooks:
        return None
    if rows * (1 + direct.num_in * direct.num_out // ROW_COST) >= ALONE and torch.get_num_threads() > 1:
        return None
    return direct.call(x, rows, (rows, direct.num_out) if len(shape) == 2 else (*shape[:-1], direct.num_out))
