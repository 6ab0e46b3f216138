"""How the range of a quantizer is found: from one tensor, or from a sample of all that pass during calibration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import OFF
from ..kernels.plan import GraphPlan
from .functional import passed
from .range_search import SMALLEST, Sample, search_range
from .rows import SMALLEST_STEP, RowSample, search_rows
from .state import ZERO_ONE_KINDS, QuantizerState, RangeKind
from .tensor import QuantizedTensor
from .values import largest, peak, row_peaks, skewness

__all__ = ["FittedQuantizer", "InputCheck"]

InputCheck = Callable[[Tensor, GraphPlan | None], bool]


class FittedQuantizer(QuantizerState):
    """A quantizer whose range is set by least mean-squared error; see :class:`.qlr.QLRQuantizer`."""

    _observed: Sample | None
    _observed_kind: RangeKind
    _is_input: InputCheck | None

    @torch.no_grad()
    def set_range(self, x: Tensor, pattern: GraphPlan | None = None, *, may_be_zero_one: bool = True) -> None:
        """Set the range by least mean-squared error on ``x`` (see :mod:`.range_search`).

        Args:
            x: The values, of a sparse matrix the stored ones.
            pattern: Their positions in a sparse matrix.
            may_be_zero_one: Whether 0/1 data may be taken to stay so.

        Raises:
            ValueError: If ``x`` is empty or holds a NaN or an infinity.
        """
        if self.bits != OFF:
            self._fit(*self._kind_and_rows(x, pattern, lambda *_: may_be_zero_one))

    def _kind_and_rows(
        self, x: Tensor, pattern: GraphPlan | None, may_be_zero_one: InputCheck
    ) -> tuple[RangeKind, Tensor]:
        kind = self._kind_of(x, pattern)
        if kind in ZERO_ONE_KINDS and self.is_activation and not may_be_zero_one(x, pattern):
            kind = RangeKind.NONNEGATIVE
        if pattern is not None and (self.granularity == "channel" or not self._stays_sparse(kind)):
            x, pattern = QuantizedTensor.identity(x, pattern).dequantize(), None
        return kind, self._rows(x, pattern)

    def _stays_sparse(self, kind: RangeKind) -> bool:
        """Whether code 0 stands for zero in every column, so that only stored values need codes."""
        per_column = self.granularity == "channel" and kind not in ZERO_ONE_KINDS
        return self._zero_code(kind) == 0 and not per_column

    def _fit(self, kind: RangeKind, rows: Tensor) -> None:
        """Set the range to ``kind`` and to the best fit of ``rows`` [ranges, samples] (see :meth:`_rows`)."""
        self._set_kind(kind)
        self.shift = None
        if self.skew is not None:
            values = rows if self.unit is None else rows[:1]
            self.skew.copy_(skewness(values).round() if self.truncation == "sbt" else torch.zeros(()))
        if kind in ZERO_ONE_KINDS:
            return
        if self.unit is not None:
            unit, scale, lower = search_rows(rows, self.qmax, self.zero_code)
            self.unit.copy_(unit)
            rows = rows[:1]
        else:
            scale, lower = search_range(rows, self.qmax, self.zero_code)
        zeros = (rows == 0).all(1)
        if self.zero_code is None or self.zero_code.is_integer():
            scale = torch.where(zeros, self._default_scale(scale.view(-1)[~zeros]), scale)
        least = SMALLEST if self.unit is None else SMALLEST_STEP
        smallest = max(least, torch.finfo(self.log_scale.dtype).tiny)
        self.log_scale.copy_(scale.clamp_min(smallest).log().view_as(self.log_scale))
        if self.offset is not None:
            # In steps as they will be read: exp(log(s)) is a few ulp off, which many steps from zero is many steps.
            steps = lower.view_as(self.offset) / self.log_scale.exp().to(lower.dtype)
            middle = -(self.qmax + 1) / 2  # a whole number of steps: zero stays exact
            self.offset.copy_(torch.where(zeros.view_as(steps), middle, steps))
        if not self.is_activation:
            self._hold_single_values(rows)

    def _hold_single_values(self, rows: Tensor) -> None:
        """Widen ranges that all values of a weight lie outside of, by the rounding of its ends.

        They are those of a channel of one magnitude, none of whose weights would get a gradient.
        """
        scale, lower = (end.view(-1, 1).to(rows.dtype) for end in self.range())
        steps = (rows - lower) * (1 / scale)
        least, most = passed(self.qmax)
        outside = ((steps < least) | (steps > most)).all(1).view_as(self.log_scale)
        few = 4 * torch.finfo(self.log_scale.dtype).eps * self.log_scale.abs().clamp_min(1)
        self.log_scale.copy_(torch.where(outside, self.log_scale + few, self.log_scale))

    def _default_scale(self, others: Tensor) -> Tensor:
        """The step of a range that saw nothing but zeros: the largest of the other channels, or one that reaches 1."""
        if others.numel():
            return others.amax()
        below_one = (self.qmax + 1) / 2 if self.zero_code is None else self.zero_code
        return others.new_tensor(1 / (below_one or self.qmax))

    def _kind_of(self, x: Tensor, pattern: GraphPlan | None) -> RangeKind:
        if x.numel() == 0:
            raise ValueError(f"Expected values to set the range of '{self.site}' from (got an empty tensor)")
        self._check_finite(x, always=True)
        low = float(x.amin())
        if low == 0 == float(x.amax()):
            return self._kind_of_zeros(pattern)
        if low < 0 and self.levels == "unsigned":
            raise ValueError(f"Expected non-negative values for the unsigned '{self.site}' (got {low:g})")
        if low < 0 or self.levels in ("symmetric", "half"):
            return RangeKind.FREE
        return self._nonnegative_kind(x, pattern)

    def _kind_of_zeros(self, pattern: GraphPlan | None) -> RangeKind:
        # Of sparse features zero must be the code 0, so that they stay sparse.
        return RangeKind.ZEROS if pattern is None or self.levels != "affine" else RangeKind.NONNEGATIVE

    def _rows(self, x: Tensor, pattern: GraphPlan | None) -> Tensor:
        """Arrange ``x`` as one row per range; with multipliers as values and largest magnitudes of their rows."""
        if self.unit is not None:
            peaks = largest(x, pattern, self.row_dims)
            peaks = peaks.expand_as(x) if pattern is None else peaks[pattern.dst, 0]
            return torch.stack([x.reshape(-1), peaks.reshape(-1)])
        if self.granularity == "node":
            peaks = row_peaks(x, pattern)
            return (x / (peaks if pattern is None else peaks[pattern.dst, 0])).reshape(1, -1)
        if self.granularity == "channel" and pattern is None:
            return x.movedim(self.channel_dim, 0).reshape(self.log_scale.numel(), -1)
        return x.reshape(1, -1)

    def _nonnegative_kind(self, x: Tensor, pattern: GraphPlan | None) -> RangeKind:
        if x.dim() < 2 and pattern is None:
            return RangeKind.NONNEGATIVE
        if bool(((x == 0) | (x == peak(x))).all()):
            return RangeKind.ZERO_ONE
        peaks = row_peaks(x, pattern)
        if pattern is not None:
            peaks, width = peaks[pattern.dst, 0], pattern.num_src
        else:
            width = x.size(-1)
        # A float scale per row must not cost more than the bits it saves; an eighth more where there are none to save.
        if width + 32 <= width * max(self.bits, 1.125) and bool(((x == 0) | (x == peaks)).all()):
            return RangeKind.ZERO_ONE_ROWS
        return RangeKind.NONNEGATIVE

    def _check_finite(self, x: Tensor, always: bool = False) -> None:
        # One cheap pass decides in all but the overflowing case; on an accelerator it would force a synchronization.
        if not always and (x.device.type != "cpu" or torch.compiler.is_compiling() or bool(x.sum().isfinite())):
            return
        bad = int((~x.isfinite()).sum())
        if bad:
            raise ValueError(
                f"Expected finite values at '{self.site}' (got {bad} NaN or infinite of {x.numel()}); "
                f"check the features, the learning rate and the layers before it"
            )

    # Calibration ######################################################################################################

    @property
    def is_observing(self) -> bool:
        """Whether values pass through unquantized."""
        return self._observed is not None

    @property
    def values_seen(self) -> int:
        """How many, while observing."""
        return 0 if self._observed is None else self._observed.count

    def observe(self, is_input: InputCheck | None = None) -> None:
        """Pass values through unquantized and remember a sample of them until :meth:`finish`.

        Args:
            is_input: Tells of 0/1 values (and their positions in a sparse matrix) whether they are an input of the
                model, which stays 0/1; by default all are taken to be.
        """
        self._observed = Sample() if self.unit is None else RowSample()
        self._observed_kind = RangeKind.ZEROS
        self._is_input = is_input

    def abort(self) -> None:
        """Leave observation without touching the range."""
        self._observed = self._is_input = None

    @torch.no_grad()
    def finish(self) -> bool:
        """Set the range from what was observed; a site that saw nothing keeps its state.

        Returns:
            Whether the range was set.
        """
        observed = self._observed
        self.abort()
        if observed is None or not len(observed) or self.bits == OFF:
            return False
        self._fit(self._observed_kind, observed.rows())
        return True

    @torch.no_grad()
    def _remember(self, x: Tensor, pattern: GraphPlan | None) -> None:
        assert self._observed is not None
        if x.numel():
            kind, rows = self._kind_and_rows(x, pattern, self._is_input or (lambda *_: True))
        elif pattern is not None and pattern.num_dst:  # a sparse matrix without entries
            ranges = self.log_scale.numel() if self.unit is None else 2
            kind, rows = self._kind_of_zeros(pattern), x.new_zeros(ranges, 1)
        else:
            return
        self._observed_kind = min(kind, self._observed_kind)  # the smallest is the most general
        self._observed.add(rows)
