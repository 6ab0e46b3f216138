"""What a quantization site of a packed model does, apart from its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...config import OFF
from ...quantizers import QLRQuantizer, RangeKind

__all__ = ["UNSET", "ZERO_ONE", "ZERO_ONE_ROWS", "SiteSpec"]

UNSET = 0  # a site that saw no data: nothing may pass through it


@dataclass(frozen=True)
class SiteSpec:
    """What a site does, apart from its numbers: plain values that go into a file's header.

    Args:
        bits: Width of a stored code: 1, 2, 4, 8, or 32 for off; 0 for a site whose range was never set because
            nothing reached it.
        granularity: ``"tensor"``, ``"channel"``, ``"node"`` or ``"row"``.
        zero_code: Code that stands for zero, :obj:`None` where the lower end is free.
        truncated: Whether 8-bit codes are truncated (BT, BT*).
        channels: Number of ranges, with ``"channel"``.
        two_levels: Of codes of one bit: whether they are the two levels of a range (a width of 1); else they are data
            of zero and one value, whose range is their own.
    """

    bits: int
    granularity: str = "tensor"
    zero_code: float | None = 0.0
    truncated: bool = False
    channels: int = 0
    two_levels: bool = False

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
        if quantizer.is_zero_one:
            rows = quantizer.range_kind == RangeKind.ZERO_ONE_ROWS
            return ZERO_ONE_ROWS if rows else ZERO_ONE
        channels = quantizer.log_scale.numel() if quantizer.granularity == "channel" else 0
        truncated = quantizer.skew is not None
        two_levels = quantizer.bits == 1
        return cls(quantizer.bits, quantizer.granularity, quantizer.zero_code, truncated, channels, two_levels)

    @classmethod
    def outline(cls, quantizer: QLRQuantizer) -> SiteSpec:
        """The description of a quantizer that stays as it is, set or not."""
        if quantizer.bits == OFF:
            return cls(OFF)
        truncated = quantizer.skew is not None
        return cls(quantizer.bits, quantizer.granularity, truncated=truncated, two_levels=quantizer.bits == 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        default = asdict(SiteSpec(self.bits))
        return {k: v for k, v in asdict(self).items() if k == "bits" or v != default[k]}

    @property
    def is_zero_one(self) -> bool:
        """Whether what passes are zeros and one value, per matrix or per row, each held in one bit."""
        return self.bits == 1 and not self.two_levels

    @property
    def has_range(self) -> bool:
        """Whether codes have a range that is known before the data, but for what follows from a row."""
        return self.bits not in (UNSET, OFF) and not self.is_zero_one

    @property
    def is_fixed(self) -> bool:
        """Whether what a row's range follows from is known before the data: a kernel's epilogue can quantize to it."""
        return self.has_range and self.granularity != "node" and not self.truncated

    @property
    def has_multipliers(self) -> bool:
        """Whether rows have multiples of the range."""
        return self.granularity == "row" and self.has_range

    @property
    def is_row_local(self) -> bool:
        """Whether a row's codes depend on that row alone: blocks of rows can be quantized one by one."""
        return self.bits not in (UNSET, OFF) and (not self.is_zero_one or self.granularity == "node")

    @property
    def stays_sparse(self) -> bool:
        """Whether code 0 stands for zero in every column, so that only stored values need codes."""
        return self.zero_code == 0 and self.granularity != "channel"


ZERO_ONE = SiteSpec(1)
ZERO_ONE_ROWS = SiteSpec(1, "node")
