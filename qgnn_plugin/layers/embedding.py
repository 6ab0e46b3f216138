"""Tables that are looked up: a row is quantized when it is taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import OFF
from ..quantizers import QLRQuantizer
from .base import QuantizedLayer, SiteFactory
from .factors import not_reading, readings

__all__ = ["QuantizedEmbedding", "table_site"]


def table_site(sites: SiteFactory) -> QLRQuantizer:
    """The site of a weight whose rows are taken: a range per row, relative to it, or one for all."""
    granularity: Any = "node" if sites.config.weight_granularity == "channel" else "tensor"
    return sites.make("weight", "weight", levels=sites.config.weight_levels, granularity=granularity)


class QuantizedEmbedding(QuantizedLayer):
    """Quantized :class:`torch.nn.Embedding`.

    Site: ``weight``, the rows of the table.  With ``weight_granularity="channel"`` each row has a range of its own: a
    learned factor times its largest magnitude, so that a look-up quantizes the rows it takes and nothing else, and
    gradients stay sparse where the table asks for that.  The row ``padding_idx`` is what it was, in any width.
    """

    weight_quantizer: QLRQuantizer
    weight: Tensor
    padding_idx: int | None

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.weight_quantizer = table_site(sites)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or readings(self) is None:
            return self._quantized(super().forward(input), input)  # type: ignore[misc]
        with not_reading(self):
            rows = super().forward(input)  # type: ignore[misc]
        return self._quantized(rows, input)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        found = None if name != "weight" or torch.compiler.is_compiling() else readings(self)
        if found is None:
            return value
        if name not in found:  # every row as a look-up would give it
            found[name] = self._quantized(value, torch.arange(value.size(0), device=value.device))
        return found[name]

    def _quantized(self, rows: Tensor, index: Tensor) -> Tensor:
        if self.weight_quantizer.bits == OFF or not rows.numel():
            return rows
        values = self.weight_quantizer(rows.reshape(-1, rows.size(-1))).dequantize().view(rows.shape)
        if self.padding_idx is None:
            return values
        return torch.where((index == self.padding_idx).unsqueeze(-1), rows, values)

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the state of a version that left tables as they were."""
        for name, tensor in self.weight_quantizer.state_dict().items():
            state_dict.setdefault(f"{prefix}weight_quantizer.{name}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
