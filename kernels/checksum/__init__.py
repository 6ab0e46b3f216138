"""Checksums of tensors: what shows that memory was written where no version counter counts.

NumPy, ``.data``, DLPack and other processes change a tensor without a trace.  A checksum reads it once, at the speed of
memory, and depends on every bit and its place:

.. math::
    h = \\sum_i \\operatorname{mix}(w_i \\oplus i \\, \\kappa) \\mod 2^{64}

over the 64-bit words ``w_i`` of the values in their logical order, zeros after the last byte, with the finalizer of
MurmurHash3 as ``mix``.  Sums have no order, so threads and devices agree.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backend import has_numba

__all__ = ["checksum", "checksum_reference"]

WORD = 8
SHIFT = 33
FACTORS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)  # of MurmurHash3's 64-bit finalizer
PLACE = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def checksum_reference(tensor: Tensor) -> Tensor:
    """The checksum of a strided tensor, as a scalar int64 tensor on its device; nothing waits for the device."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padding = -data.numel() % WORD
    data = torch.cat([data, data.new_zeros(padding)]) if padding else data
    words = data.clone().view(torch.int64) if data.storage_offset() % WORD else data.view(torch.int64)
    x = words ^ (torch.arange(words.numel(), device=words.device) * _signed(PLACE))
    for factor in FACTORS:
        x = (x ^ _shifted(x)) * _signed(factor)
    return (x ^ _shifted(x)).sum()


def _shifted(x: Tensor) -> Tensor:
    return (x >> SHIFT) & ((1 << (64 - SHIFT)) - 1)


@cache
def _compiled() -> Any:
    """The compiled form for memory of the CPU; :obj:`None` without numba."""
    if not has_numba():
        return None
    return importlib.import_module(f"{__package__}.cpu").checksum_bytes


def checksum(tensor: Tensor) -> int:
    """The checksum of a strided tensor, as a signed 64-bit integer.

    It is read from where the tensor is: unlike ``tensor.numpy()``, that marks no storage as shared with NumPy.
    """
    if not tensor.is_cpu or (compiled := _compiled()) is None:
        return int(checksum_reference(tensor))
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    address = tensor.data_ptr()
    if address % WORD:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        address = tensor.data_ptr()
    return compiled(address, tensor.numel() * tensor.element_size())
