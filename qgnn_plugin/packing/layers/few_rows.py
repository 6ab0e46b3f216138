"""The short way of packed layers: few float rows in, float rows out, by one compiled call or a few.

It computes what the long way does, bit for bit, where nothing has to be known of the call that a look at the input does
not tell: whoever watches operations, differentiates, traces or runs elsewhere goes the long way, and so does what is to
be refused.  Results are floats at once, since on few rows putting them off costs more than writing them.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from ...kernels.backend import has_numba, is_direct
from ...kernels.few_rows import Range, few_rows_linear
from ...kernels.layout import most_products
from ...quantizers.autocast import is_autocasting
from ..lazy import sizes

__all__ = [
    "Direct",
    "direct_call",
    "direct_product",
    "is_few",
    "is_plain_call",
    "is_shared",
    "prepared",
    "prepared_map",
    "range_of",
]

ROW_COST, ALONE = 1 << 9, 1 << 14  # products of a row and rows of that cost, from which on threads share the work


class Direct:
    """What the short way of a layer was prepared from, and the prepared call: :obj:`None` where it has none."""

    __slots__ = ("call", "sources")

    def __init__(self, call: Any, sources: list[Any]) -> None:
        self.call, self.sources = call, sources


def prepared(layer: Any, inner: tuple[Any, ...], make: Callable[..., Any], *options: Any) -> Any:
    """What ``make(layer, *inner)`` gives, made again once any object that it reads is another one.

    :obj:`None` where somebody looks at calls of one of ``inner``, which the short way does not make.

    Args:
        layer: A packed layer.
        inner: The maps and ranges of its that ``make`` reads, :obj:`None` for one that it has not.
        make: Prepares the short way.
        options: Attributes of the layer that it reads, beside tensors.
    """
    sources = [*options, *layer._buffers.values(), *layer._parameters.values()]
    for module in inner:
        if module is not None:
            if module._forward_hooks or module._forward_pre_hooks:
                return None
            spec = module.__dict__.get("spec")
            sources += (module, spec, *module._buffers.values(), *module._parameters.values())
    if _has_any_global_hook():
        return None
    last = layer._packed.last
    direct = last.direct
    if direct is None or len(direct.sources) != len(sources) or any(map(is_not, direct.sources, sources)):
        direct = last.direct = Direct(make(layer, *inner) if has_numba() else None, sources)
    return direct.call


# What is read #########################################################################################################


def range_of(range_: Any) -> Range | None:
    """The range of a site; :obj:`None` where its numbers are not as the short way takes them."""
    if range_ is None:
        return None
    site, ranges = range_.spec, range_._buffers
    scale, lower, unit = ranges["scale"], ranges["lower_end"], ranges["unit"]
    if not site.is_fixed or site.granularity not in ("tensor", "row") or scale is None:
        return None
    if not all(tensor is None or is_plain(tensor, ()) for tensor in (scale, lower, unit)):
        return None
    end = site.zero_code if lower is None else lower
    if end is None or (unit is None) == site.has_multipliers:
        return None
    return Range(site.bits, scale, end, unit)


def prepared_map(lin: Any, site: Any, bias: Tensor | None, target: Any = None) -> Any:
    """The map ``lin`` of what has the range ``site``, with a bias, to floats or to messages in the range ``target``.

    :obj:`None` where the layer, or one of its numbers, is not as the short way takes them.
    """
    taken, out = range_of(site), range_of(target)
    if taken is None or (out is None and target is not None) or lin.output_quantizer is not None:
        return None
    words, lower, own = lin._buffers["words"], lin._buffers["weight_lower_end"], lin._site
    scale = lin._parameters.get("weight_scale")
    if words is None or scale is None or "bias" not in lin._parameters or own.is_zero_one:
        return None
    if lin._num_in * lin._num_out == 0 or lin._num_in > most_products(site.spec.bits, own.bits):
        return None
    count = scale.numel()
    shapes = {scale: (count,), lower: (count,), bias: (lin._num_out,)}
    fits = all(tensor is None or is_plain(tensor, shape) for tensor, shape in shapes.items())
    if not fits or not is_plain(words, words.shape, torch.int32):
        return None
    if count not in (1, lin._num_out) or not lin._matrix.is_checked:
        return None
    end = own.zero_code if lower is None else lower
    if end is None:
        return None
    return few_rows_linear(words, scale, end, lin._num_in, own.bits, taken, bias, out)


def is_plain(tensor: Tensor, shape: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether compiled code may read a tensor of that shape where it is."""
    kind = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.dtype is dtype
    return kind and tensor.layout is torch.strided and tuple(tensor.shape) == tuple(shape) and tensor.is_contiguous()


# What a call may be ###################################################################################################


def is_plain_call(layer: Any, x: Any) -> bool:
    """Whether a call of ``layer`` with ``x`` is nothing but inference, of float rows that lie one after another."""
    if not is_direct() or type(x) is not Tensor or layer.training:
        return False
    if x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided or not x.is_contiguous():
        return False
    return not ((x.requires_grad and torch.is_grad_enabled()) or x.is_neg() or is_autocasting())


def is_few(results: int) -> bool:
    """Whether so many floats, of a matrix that is read or written, go the short way."""
    return results <= sizes.FEW_RESULTS


def is_shared(cost: int) -> bool:
    """Whether threads share work that costs as much as ``cost`` rows."""
    return cost >= ALONE and torch.get_num_threads() > 1


# Linear layers ########################################################################################################


def _make_linear(layer: Any, site: Any) -> Any:
    return None if site is None else prepared_map(layer, site, layer._parameters.get("bias"))


def direct_call(layer: Any) -> Any:
    """The prepared call of the packed linear ``layer``, :obj:`None` where it has none or somebody looks at its site."""
    return prepared(layer, (layer._modules.get("input_quantizer"),), _make_linear)


def direct_product(layer: Any, x: Any) -> Tensor | None:
    """What the packed linear ``layer`` gives for ``x``, :obj:`None` where that is for the long way to say."""
    if not is_plain_call(layer, x):
        return None
    call = direct_call(layer)
    shape, num_in, num_out = x.shape, layer._num_in, layer._num_out
    if call is None or not shape or shape[-1] != num_in:
        return None
    rows = x.numel() // num_in
    if rows == 0 or not is_few(rows * num_out) or is_shared(rows * (1 + num_in * num_out // ROW_COST)):
        return None
    out = torch.empty((rows, num_out) if len(shape) == 2 else (*shape[:-1], num_out), dtype=torch.float32)
    return out if call(x.data_ptr(), rows, out.data_ptr()) else None
