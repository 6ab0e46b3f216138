"""The state of a quantizer: what is saved of it, what kind of range that is, and the range itself."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OFF, Granularity, Levels, Truncation
from ..kernels.layout import top_code
from ..saved import REMEDY, encode, refusal, refuse, whole

__all__ = ["ZERO_ONE_KINDS", "QuantizerState", "RangeKind"]


class RangeKind(enum.IntEnum):
    """What the range of a quantizer is, the more general the smaller; saved in its ``kind`` buffer."""

    UNSET = 0
    FREE = 1
    NONNEGATIVE = 2  # the data are non-negative: the lower end is fixed at zero
    ZERO_ONE_ROWS = 3  # each row is 0 or one value of its own: one bit and a scale per row are exact
    ZERO_ONE = 4  # the data are 0 or one common value: one bit is exact
    ZEROS = 5  # the data were all zero: a default range with zero as a level, until training meets other data


ZERO_ONE_KINDS = (RangeKind.ZERO_ONE_ROWS, RangeKind.ZERO_ONE)


class QuantizerState(nn.Module):
    """A quantizer's settings, buffers and learned range; see :class:`.qlr.QLRQuantizer`, which makes them."""

    bits: int
    levels: Levels
    granularity: Granularity
    truncation: Truncation | None
    channel_dim: int
    site: str
    kind: Tensor
    skew: Tensor | None
    log_scale: Tensor
    offset: Tensor | None
    unit: Tensor | None  # p, fixed once the range is set
    shift: Tensor | None  # of a weight: how far each code is from the nearest
    row_dims: int = 1
    _range_kind: RangeKind
    _kind_seen: tuple[int, int] | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("unit", "shift"):  # which pickles of version 1 do not have
            self._buffers.setdefault(name, None)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, beside its numbers, what the quantizer computes."""
        if self.bits == OFF:
            return {"bits": OFF}
        return {name: getattr(self, name) for name in ("bits", "levels", "granularity", "truncation")}

    def get_extra_state(self) -> Tensor:
        """:attr:`settings`, so that a state dict of others is refused."""
        return encode(self.settings)

    def set_extra_state(self, state: Any) -> None:
        """Compare with :attr:`settings`.

        Raises:
            ValueError: If they differ.
        """
        message = refusal(self.site, self.settings, state)
        if message is not None:
            raise ValueError(message + REMEDY)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}_extra_state"
        message = refusal(self.site, self.settings, state_dict[key]) if key in state_dict else None
        if message is not None:
            refuse(error_msgs, message)
            return
        given = [name for name in ("log_scale", "unit") if f"{prefix}{name}" in state_dict]
        if key not in state_dict and self.unit is not None and given == ["log_scale"]:
            # Of version 1, whose default was one range per tensor; it knew no rows.
            self.granularity, self.unit = "tensor", None
        state_dict[key] = self.get_extra_state()  # which it did not have either
        for name in ("kind", "shift"):
            value = state_dict.get(f"{prefix}{name}")
            if value is not None and value.is_floating_point() and not value.is_meta:  # an average, or all as floats
                try:
                    state_dict[f"{prefix}{name}"] = whole(value)
                except ValueError as error:
                    error_msgs.append(
                        f"'{self.site}': Expected integers as '{name}' (got {error}); average models that were "
                        f"calibrated once, before they parted, and calibrate(method='outputs') afterwards"
                    )
                    return
        shift = state_dict.get(f"{prefix}shift")
        self.shift = None if shift is None else torch.zeros_like(shift, device=self.log_scale.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @property
    def range_kind(self) -> RangeKind:
        """What the range is; :attr:`RangeKind.UNSET` before calibration.

        A mirror on the host of the buffer ``kind``, read anew whenever that was written: by loading, by averaging
        models, by a broadcast.
        """
        kind = self._buffers["kind"]  # asked for a dozen times in a call: past the look-ups of a module
        assert kind is not None
        if not torch.compiler.is_compiling() and not kind.is_meta:
            try:
                seen = (id(kind), kind._version)
            except RuntimeError:  # a tensor made in inference mode counts no versions: it is read in every call
                seen = None
            if seen is None or seen != self._kind_seen:
                self._range_kind, self._kind_seen = RangeKind(int(kind)), seen
        return self._range_kind

    @property
    def is_set(self) -> bool:
        return self.bits == OFF or self.range_kind != RangeKind.UNSET

    @property
    def is_one_bit(self) -> bool:
        """The former name of :attr:`is_zero_one`: one bit is a width of its own now."""
        warnings.warn("is_one_bit is now is_zero_one; it goes in the next minor version", DeprecationWarning, 2)
        return self.is_zero_one

    @property
    def is_zero_one(self) -> bool:
        """Whether the data are 0 or one value (per row): stored in one bit, exactly, whatever the width."""
        return self.range_kind in ZERO_ONE_KINDS

    @property
    def qmax(self) -> int:
        """The largest code: 1 for 0/1 data, else ``2^bits - 1``."""
        return 1 if self.is_zero_one else top_code(self.bits)

    @property
    def stored_bits(self) -> int:
        """Bits per stored code."""
        return 1 if self.is_zero_one else self.bits

    def _set_kind(self, kind: RangeKind) -> None:
        self.kind.fill_(int(kind))

    def unset(self) -> None:
        """Forget the range; the next training batch or calibration sets it anew."""
        self._set_kind(RangeKind.UNSET)
        self.shift = None

    @property
    def is_activation(self) -> bool:
        """Whether what passes here differs from call to call, as a weight does not."""
        return self.channel_dim == -1

    @property
    def zero_code(self) -> float | None:
        """The code that stands for zero, :obj:`None` where the lower end is free."""
        return self._zero_code(self.range_kind)

    def _zero_code(self, kind: RangeKind) -> float | None:
        qmax = top_code(self.bits)
        if kind in ZERO_ONE_KINDS:
            return 0.0
        if kind == RangeKind.ZEROS and self.levels != "unsigned":
            return (qmax + 1) / 2
        fixed = {"unsigned": 0.0, "symmetric": (qmax + 1) / 2, "half": qmax / 2}.get(self.levels)
        return 0.0 if fixed is None and kind == RangeKind.NONNEGATIVE else fixed

    def range(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``lower`` of the range itself: scalars, or one per channel (per node: relative to the row)."""
        scale = self.log_scale.exp()
        if self.levels == "affine":
            assert self.offset is not None
            kind = self.range_kind
            steps = self.offset * float(kind == RangeKind.FREE)
            return scale, scale * (steps - (self.zero_code or 0.0) if kind == RangeKind.ZEROS else steps)
        assert self.zero_code is not None
        return scale, scale * -self.zero_code
