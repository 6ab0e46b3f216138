"""What a quantization site of a packed model does, apart from its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import OFF
from ..quantizers import QLRQuantizer, RangeKind

__all__ = ["ONE_BIT", "UNSET", "SiteSpec"]

UNSET = 0  # a site that saw no data: nothing may pass through it
ONE_BIT = 1


@dataclass(frozen=True)
class SiteSpec:
    """What a site does, apart from its numbers: plain values that go into a file's header.

    Args:
        bits: Width of a stored code: 1 (data of zero and one value), 2, 4, 8, or 32 for off; 0 for a
            site whose range was never set because nothing reached it.
        granularity: ``"tensor"``, ``"channel"``, ``"node"`` or ``"row"``.
        zero_code: Code that stands for zero, :obj:`None` where the lower end is free.
        truncated: Whether 8-bit codes are truncated (BT, BT*).
        channels: Number of ranges, with ``"channel"``.
    """

    bits: int
    granularity: str = "tensor"
    zero_code: float | None = 0.0
    truncated: bool = False
    channels: int = 0

    @classmethod
    def of(cls, quantizer: QLRQuantizer) -> SiteSpec:
        """The description of a quantizer whose range is set.

        Raises:
            ValueError: If it is not.
        """
        if quantizer.bits == OFF:
            return cls(OFF)
        if not quantizer.is_set:
            raise ValueError(
                f"Expected every range to be set (got none at '{quantizer.site}'): call "
                f"qgnn_plugin.calibrate(model, data) or train before packing"
            )
        if quantizer.is_one_bit:
            rows = quantizer.range_kind == RangeKind.ONE_BIT_ROWS
            return cls(ONE_BIT, "node" if rows else "tensor")
        channels = quantizer.log_scale.numel() if quantizer.granularity == "channel" else 0
        truncated = quantizer.skew is not None
        return cls(quantizer.bits, quantizer.granularity, quantizer.zero_code, truncated, channels)

    @classmethod
    def outline(cls, quantizer: QLRQuantizer) -> SiteSpec:
        """The description of a quantizer that stays as it is, set or not."""
        if quantizer.bits == OFF:
            return cls(OFF)
        return cls(quantizer.bits, quantizer.granularity, truncated=quantizer.skew is not None)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        default = asdict(SiteSpec(self.bits))
        return {k: v for k, v in asdict(self).items() if k == "bits" or v != default[k]}

    @property
    def is_fixed(self) -> bool:
        """Whether what a row's range follows from is known before the data: a kernel's epilogue can quantize to it."""
        known = self.bits not in (UNSET, ONE_BIT, OFF) and self.granularity != "node"
        return known and not self.truncated

    @property
    def has_multipliers(self) -> bool:
        """Whether rows have multiples of the range."""
        return self.granularity == "row" and self.bits not in (UNSET, ONE_BIT, OFF)

    @property
    def is_row_local(self) -> bool:
        """Whether a row's codes depend on that row alone: blocks of rows can be quantized one by one."""
        return self.bits not in (UNSET, OFF) and (self.bits != ONE_BIT or self.granularity == "node")

    @property
    def stays_sparse(self) -> bool:
        """Whether code 0 stands for zero in every column, so that only stored values need codes."""
        return self.zero_code == 0 and self.granularity != "channel"
