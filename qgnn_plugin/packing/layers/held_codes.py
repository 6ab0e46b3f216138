"""The codes of a frozen weight, as what holds them registers these."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.layout import pack_codes, row_words
from ...quantizers import QuantizedTensor
from .site_spec import SiteSpec

__all__ = ["HeldCodes"]


class HeldCodes(NamedTuple):
    """The codes of a weight ``[O, K]`` and their range, one or one per row.

    Args:
        words: ``[O, row_words(K, bits)]`` int32.
        scale: The step, one element or ``[O]`` float32, a parameter, as the weight was: it tells device and dtype.
        lower_end: Of the same shape, :obj:`None` where it follows from the step.
    """

    words: Tensor
    scale: Tensor
    lower_end: Tensor | None

    @classmethod
    def empty(cls, site: SiteSpec, num_out: int, num_in: int, device: torch.device | None) -> HeldCodes:
        """For the weights of a site that packs; numbers still to be filled in."""
        by_row = site.channels or site.granularity == "node"
        scale = torch.ones(num_out if by_row else 1, dtype=torch.float32, device=device)
        # With a range that follows from each row, the lower end is rounded on its own.
        is_free = site.zero_code is None or (site.granularity == "node" and site.zero_code != 0)
        words = torch.zeros(num_out, row_words(num_in, site.bits), dtype=torch.int32, device=device)
        lower_end = torch.zeros_like(scale) if is_free else None
        return cls(words, nn.Parameter(scale, requires_grad=False), lower_end)

    def fill(self, weight: QuantizedTensor, bits: int) -> None:
        """Take the codes ``[O, K]`` of ``bits`` bits and the range of the quantized weight."""
        self.words.copy_(pack_codes(weight.codes, bits))
        self.scale.copy_(weight.scale.reshape(-1))
        if self.lower_end is not None:
            self.lower_end.copy_(weight.lower.reshape(-1))
