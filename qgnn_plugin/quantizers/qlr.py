"""QLR: the quantizer with learnable ranges (arXiv 2308.14949, section 4.1), in scale-relative form."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BITS, GRANULARITIES, OFF, Granularity, Levels, Truncation, _one_of
from ..kernels.plan import GraphPlan, plan_cache
from ..kernels.spmm import segment_max
from ..saved import REMEDY, encode, refusal, refuse
from . import compressed
from .functional import FINE_BITS, quantize_codes, shown_range
from .functional import levels as max_code
from .range_search import SMALLEST, Sample, search_range
from .rows import SMALLEST_STEP, RowRange, RowSample, multipliers, search_rows
from .tensor import QuantizedTensor

__all__ = ["QLRQuantizer", "RangeKind"]


class RangeKind(enum.IntEnum):
    """What the range of a quantizer is, the more general the smaller; saved in its ``kind`` buffer."""

    UNSET = 0
    FREE = 1
    NONNEGATIVE = 2  # the data are non-negative: the lower end is fixed at zero
    ONE_BIT_ROWS = 3  # each row is 0 or one value of its own: one bit and a scale per row are exact
    ONE_BIT = 4  # the data are 0 or one common value: one bit is exact
    ZEROS = 5  # the data were all zero: a default range with zero as a level, until training meets other data


ONE_BIT_KINDS = (RangeKind.ONE_BIT_ROWS, RangeKind.ONE_BIT)
InputCheck = Callable[[Tensor, GraphPlan | None], bool]


class QLRQuantizer(nn.Module):
    r"""Quantizer with a learnable range ``[l, u]``, ``s = exp(log_scale)`` and ``l = offset * s``.

    Args:
        bits: 2, 4, 8, or 32 for off.
        levels: ``"affine"`` (learned offset; the lower end is fixed at zero when the data that set the range are
            non-negative), ``"unsigned"``, ``"symmetric"`` (zero is a level) or ``"half"`` (half-integer levels).
        granularity: One range per ``"tensor"``, per ``"channel"``, per ``"node"`` or per ``"row"``.  Per node, a row's
            step is the learned factor times the row's largest magnitude; per row, the learned range times an integer
            that follows from it (see :mod:`.rows`).  So unseen nodes have a range too.
        channels: Number of channels, for ``"channel"``.
        channel_dim: The dimension that holds channels: 0 for weights, -1 for activations.
        truncation: ``"bt"`` or ``"sbt"``: truncate 8-bit codes instead of rounding directly; nothing at 8 bits.
        learn: Whether the range receives gradients.
        row_dims: How many of the last dimensions are a row with one multiplier: 2 for messages of several heads.
        site: Name used in errors, such as ``"conv1.lin.input"``.

    The range is set by :func:`qgnn_plugin.calibrate`, or else from the first batch seen in training mode.  Inputs of
    the model that were 0/1 then must stay so: otherwise training widens the range, and eval raises.  Activations are
    never taken for 0/1 data, and zeros alone say nothing: they leave a default range.

    Shapes:
        - **input:** ``[N, F]`` (any shape per tensor), or a ``torch.sparse_csr`` matrix of non-negative values
        - **output:** :class:`QuantizedTensor` of the same shape
    """

    kind: Tensor
    skew: Tensor | None
    log_scale: Tensor
    offset: Tensor | None
    unit: Tensor | None  # p, fixed once the range is set
    shift: Tensor | None  # of a weight: how far each code is from the nearest
    row_dims: int = 1

    def __init__(
        self,
        bits: int,
        *,
        levels: Levels = "affine",
        granularity: Granularity = "tensor",
        channels: int | None = None,
        channel_dim: int = -1,
        truncation: Truncation | None = None,
        learn: bool = True,
        row_dims: int = 1,
        site: str = "tensor",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if type(bits) is not int or bits not in BITS:
            raise ValueError(f"Expected 'bits' to be 2, 4, 8 or 32 = off (got {bits!r})")
        _one_of("levels", levels, ("affine", "unsigned", "symmetric", "half"))
        _one_of("granularity", granularity, GRANULARITIES)
        _one_of("truncation", truncation, (None, "bt", "sbt"))
        if granularity == "channel" and (channels is None or channels < 1):
            raise ValueError(f"Expected 'channels' >= 1 for a range per channel (got {channels!r})")
        self.bits, self.levels, self.granularity = bits, levels, granularity
        self.channel_dim, self.row_dims, self.site = channel_dim, row_dims, site
        self.truncation = truncation if bits < FINE_BITS else None
        self._range_kind = RangeKind.UNSET
        self._kind_seen: tuple[int, int] | None = None
        self._observed: Sample | None = None
        self._observed_kind = RangeKind.ZEROS
        self._is_input: InputCheck | None = None
        shape = (channels,) if granularity == "channel" and channels is not None else ()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        learn = learn and bits != OFF
        # What does not learn is no parameter: nothing that asks for gradients of every parameter meets it.
        for name in ("log_scale", "offset"):
            value = torch.zeros(shape, **options) if name == "log_scale" or levels == "affine" else None
            if learn:
                self.register_parameter(name, None if value is None else nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer("kind", torch.zeros((), dtype=torch.uint8, device=device))
        self.register_buffer("skew", torch.zeros((), **options) if self.truncation else None)
        self.register_buffer("unit", torch.ones((), **options) if granularity == "row" else None)
        self.register_buffer("shift", None)

    def extra_repr(self) -> str:
        text = f"bits={self.bits}, levels={self.levels}, granularity={self.granularity}, {self.range_kind.name}"
        return ", ".join(filter(None, (text, self.shown_range())))

    @torch.no_grad()
    def shown_range(self) -> str:
        """The lowest and the highest value of the codes; empty where no range is set."""
        if self.bits == OFF or self.kind.is_meta or self.range_kind == RangeKind.UNSET:
            return ""
        return "one bit" if self.is_one_bit else shown_range(*self.range(), self.bits, self.granularity)

    # State ############################################################################################################

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
        if not torch.compiler.is_compiling() and not self.kind.is_meta:
            seen = (id(self.kind), 0 if self.kind.is_inference() else self.kind._version)
            if seen != self._kind_seen:
                self._range_kind, self._kind_seen = RangeKind(int(self.kind)), seen
        return self._range_kind

    @property
    def is_set(self) -> bool:
        return self.bits == OFF or self.range_kind != RangeKind.UNSET

    @property
    def is_one_bit(self) -> bool:
        """Whether the data are 0 or one value (per row): stored in one bit, exactly."""
        return self.range_kind in ONE_BIT_KINDS

    @property
    def qmax(self) -> int:
        """The largest code: 1 for one-bit data, else ``2^bits - 1``."""
        return 1 if self.is_one_bit else max_code(self.bits)

    @property
    def stored_bits(self) -> int:
        """Bits per stored code."""
        return 1 if self.is_one_bit else self.bits

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

    # Ranges ###########################################################################################################

    @property
    def zero_code(self) -> float | None:
        """The code that stands for zero, :obj:`None` where the lower end is free."""
        return self._zero_code(self.range_kind)

    def _zero_code(self, kind: RangeKind) -> float | None:
        qmax = max_code(self.bits)
        if kind in ONE_BIT_KINDS:
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

    def _shaped(self, per_channel: Tensor, x: Tensor) -> Tensor:
        if self.granularity != "channel" or self.channel_dim == -1:
            return per_channel
        return per_channel.view(-1, *([1] * (x.dim() - 1)))

    def _range_of(self, x: Tensor, pattern: GraphPlan | None) -> tuple[Tensor, Tensor, RowRange | None]:
        """Scale and lower end that broadcast to ``x``, and what they are multiples of."""
        kind = self.range_kind
        if self.is_one_bit:
            rows = _row_peaks(x, pattern) if kind == RangeKind.ONE_BIT_ROWS else _peak(x)
            # A factor exp(0) = 1 keeps the parameters in the graph: DDP expects a gradient for each.
            unused = self.log_scale if self.offset is None else self.log_scale + self.offset
            scale = rows * (unused.reshape(-1)[0] * 0).exp()
            return scale, torch.zeros_like(scale), None
        scale, lower = self.range()
        if self.granularity == "node":
            rows = _row_peaks(x, pattern)
            return scale * rows, lower * rows, None
        if self.unit is not None:
            multiplier = multipliers(largest(x, pattern, self.row_dims), self.unit)
            # Products no narrower than the values, and of float32 values no wider, as with one range per tensor.
            as_values = x.dtype in (torch.float32, torch.float64)
            multiplier = multiplier.to(x.dtype if as_values else torch.promote_types(x.dtype, scale.dtype))
            multiples = RowRange(multiplier, scale, lower)
            return *(compressed.multiples(multiples) if compressed.compressing() else multiples.ends()), multiples
        return self._shaped(scale, x), self._shaped(lower, x), None

    @torch.no_grad()
    def set_range(self, x: Tensor, pattern: GraphPlan | None = None, *, may_be_one_bit: bool = True) -> None:
        """Set the range by least mean-squared error on ``x`` (see :mod:`.range_search`).

        Args:
            x: The values, of a sparse matrix the stored ones.
            pattern: Their positions in a sparse matrix.
            may_be_one_bit: Whether 0/1 data may be taken to stay so.

        Raises:
            ValueError: If ``x`` is empty or holds a NaN or an infinity.
        """
        if self.bits != OFF:
            self._fit(*self._kind_and_rows(x, pattern, lambda *_: may_be_one_bit))

    def _kind_and_rows(
        self, x: Tensor, pattern: GraphPlan | None, may_be_one_bit: InputCheck
    ) -> tuple[RangeKind, Tensor]:
        kind = self._kind_of(x, pattern)
        if kind in ONE_BIT_KINDS and self.is_activation and not may_be_one_bit(x, pattern):
            kind = RangeKind.NONNEGATIVE
        if pattern is not None and (self.granularity == "channel" or not self._stays_sparse(kind)):
            x, pattern = QuantizedTensor.identity(x, pattern).dequantize(), None
        return kind, self._rows(x, pattern)

    def _stays_sparse(self, kind: RangeKind) -> bool:
        """Whether code 0 stands for zero in every column, so that only stored values need codes."""
        per_column = self.granularity == "channel" and kind not in ONE_BIT_KINDS
        return self._zero_code(kind) == 0 and not per_column

    def _fit(self, kind: RangeKind, rows: Tensor) -> None:
        """Set the range to ``kind`` and to the best fit of ``rows`` [ranges, samples] (see :meth:`_rows`)."""
        self._set_kind(kind)
        self.shift = None
        if self.skew is not None:
            values = rows if self.unit is None else rows[:1]
            self.skew.copy_(_skewness(values).round() if self.truncation == "sbt" else torch.zeros(()))
        if kind in ONE_BIT_KINDS:
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
            peaks = _row_peaks(x, pattern)
            return (x / (peaks if pattern is None else peaks[pattern.dst, 0])).reshape(1, -1)
        if self.granularity == "channel" and pattern is None:
            return x.movedim(self.channel_dim, 0).reshape(self.log_scale.numel(), -1)
        return x.reshape(1, -1)

    def _nonnegative_kind(self, x: Tensor, pattern: GraphPlan | None) -> RangeKind:
        if x.dim() < 2 and pattern is None:
            return RangeKind.NONNEGATIVE
        if bool(((x == 0) | (x == _peak(x))).all()):
            return RangeKind.ONE_BIT
        peaks = _row_peaks(x, pattern)
        if pattern is not None:
            peaks, width = peaks[pattern.dst, 0], pattern.num_src
        else:
            width = x.size(-1)
        # A float scale per row must not cost more than the bits it saves.
        if width + 32 <= width * self.bits and bool(((x == 0) | (x == peaks)).all()):
            return RangeKind.ONE_BIT_ROWS
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

    # Forward ##########################################################################################################

    def forward(self, x: Tensor, codes_kept: bool = False) -> QuantizedTensor:
        """Quantize ``x`` to codes; see :class:`QuantizedTensor`.

        Args:
            x: The values.
            codes_kept: In :func:`qgnn_plugin.compressed_activations`: whether what reads the codes keeps them for its
                backward pass, as a product with a trained weight does; then this site keeps less.
        """
        if x.device != self.log_scale.device:
            raise ValueError(
                f"Expected values on {self.log_scale.device}, where '{self.site}' has its range (got "
                f"{x.device}); move the model and its inputs to one device with .to(device)"
            )
        x, pattern = _split(x)
        if self.bits == OFF:
            return QuantizedTensor.identity(x, pattern)
        if self.training and torch.compiler.is_exporting():
            raise ValueError(
                f"Expected a model in eval mode for torch.export (got training mode at '{self.site}'): a program keeps "
                f"no straight-through gradients; call model.eval(), or train with torch.compile inside 'fixed_graph'"
            )
        if self._observed is not None:
            self._remember(x, pattern)
            return QuantizedTensor.identity(x, pattern)
        self._check_finite(x.detach())
        if self.range_kind == RangeKind.UNSET:
            if x.numel() == 0:
                return QuantizedTensor.identity(x, pattern)
            if not self.training:
                raise RuntimeError(
                    f"The range of '{self.site}' is unset: call qgnn_plugin.calibrate(model, data) first, "
                    f"or train for at least one step"
                )
            self.set_range(x.detach(), pattern, may_be_one_bit=_looks_like_input(x))
        elif self._has_outgrown_zeros(x):
            self.set_range(x.detach(), pattern, may_be_one_bit=_looks_like_input(x))
        return self._quantize(x, pattern, codes_kept)

    def _has_outgrown_zeros(self, x: Tensor) -> bool:
        """Whether training brings the first data that say something about the range."""
        waits = self.training and self.range_kind == RangeKind.ZEROS and not torch.compiler.is_compiling()
        return waits and bool(x.detach().any())

    def _quantize(self, x: Tensor, pattern: GraphPlan | None, codes_kept: bool) -> QuantizedTensor:
        if pattern is not None and not self._stays_sparse(self.range_kind):
            x, pattern = QuantizedTensor.identity(x, pattern).dequantize(), None
        scale, lower, rows = self._range_of(x, pattern)
        if pattern is None and self._compresses(x, scale):
            return replace(self._compressed(x, scale, lower, codes_kept), rows=rows)
        # The scale of one-bit data is the data's own: no gradient flows through the codes.
        step = scale.detach() if self.is_one_bit else scale
        full = step[pattern.dst, 0] if pattern is not None and step.dim() == 2 else step
        low = torch.zeros_like(full) if pattern is not None else lower
        codes = self._codes(x, full, low)
        if self.is_one_bit and not self._still_one_bit(x.detach(), codes.detach() * full):
            self.set_range(x.detach(), pattern)
            return self._quantize(x, pattern, codes_kept)
        if self.shift is not None:
            codes = self._shifted(codes)
        return QuantizedTensor(codes, scale, lower, self.qmax, self.zero_code == 0, pattern, rows=rows)

    def _shifted(self, codes: Tensor) -> Tensor:
        """Codes that were rounded for what the layer computes, not to the nearest; the gradient is that of rounding."""
        assert self.shift is not None
        if self.shift.shape != codes.shape:
            raise ValueError(
                f"Expected values of shape {list(self.shift.shape)}, for which the codes of '{self.site}' were chosen "
                f"(got {list(codes.shape)}); calibrate again"
            )
        return codes + ((codes + self.shift).clamp(0, self.qmax) - codes).detach()

    def _codes(self, x: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
        skew = None if self.is_one_bit else self.skew
        if scale.dim() == x.dim() == 3 and scale.size(1) == 1 < x.size(1):  # heads of a row, side by side
            wide = quantize_codes(x.flatten(1), scale.flatten(1), lower.flatten(1), self.qmax, skew)
            return wide.view(x.shape)
        return quantize_codes(x, scale, lower, self.qmax, skew)

    def _compresses(self, x: Tensor, scale: Tensor) -> bool:
        """Whether the backward pass keeps packed codes of ``x``: activations, not weights."""
        rounds = not self.is_one_bit and self.skew is None and self.channel_dim == -1
        return rounds and compressed.compressing() and compressed.can_compress(x, scale)

    def _compressed(self, x: Tensor, scale: Tensor, lower: Tensor, codes_kept: bool) -> QuantizedTensor:
        with torch.no_grad():
            codes = quantize_codes(x, scale, lower, self.qmax)
        unsigned = self.zero_code == 0
        packed = compressed.Packed.of(codes, scale, lower, self.bits, unsigned)
        codes = compressed.quantize(x, scale, lower, codes, packed, self.qmax, codes_kept)
        return QuantizedTensor(codes, packed.scale, packed.lower, self.qmax, unsigned, packed=packed)

    def _still_one_bit(self, x: Tensor, dequantized: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.equal(dequantized, x):
            return True
        if not self.training:
            raise ValueError(
                f"Expected '{self.site}' to be zero or one value, as when its range was set (got other "
                f"values); set the range on data like these: qgnn_plugin.calibrate(model, data)"
            )
        return False


def _looks_like_input(x: Tensor) -> bool:
    """Whether 0/1 values may be an input of the model: more than a single value, which no parameter led to."""
    return x.grad_fn is None and int(x.count_nonzero()) > 1


def _split(x: Tensor) -> tuple[Tensor, GraphPlan | None]:
    """Values and positions of a sparse matrix; a dense one has no positions."""
    if x.layout == torch.strided:
        return x, None
    x = _as_csr(x)
    crow, col = x.crow_indices(), x.col_indices()
    return x.values(), plan_cache.get((crow, col), ("features", x.size(1)), lambda: _pattern(crow, col, x.size(1)))


def _as_csr(x: Tensor) -> Tensor:
    """A sparse matrix of another layout as CSR, converted once; of a COO matrix, repeated entries are summed."""
    if x.layout not in (torch.sparse_csr, torch.sparse_coo, torch.sparse_csc) or x.dim() != 2:
        raise TypeError(
            f"Expected dense features, or a sparse matrix in CSR, COO or CSC (got {x.layout}, {list(x.shape)})"
        )
    if x.layout == torch.sparse_csr:
        return x
    if x.requires_grad:
        return x.to_sparse_csr()
    return plan_cache.get((x,), ("features as CSR",), x.to_sparse_csr)


def _pattern(crow: Tensor, col: Tensor, width: int) -> GraphPlan:
    """The positions of a CSR matrix with ``width`` columns.

    Raises:
        TypeError, ValueError: If they are out of bounds, or a row has a column twice.
    """
    pattern = GraphPlan.from_csr(crow, col, width)
    rises = (pattern.col[1:] > pattern.col[:-1]) | (pattern.dst[1:] > pattern.dst[:-1])
    if not bool(rises.all()) and (pattern.dst * width + pattern.col).unique().numel() < pattern.num_edges:
        raise ValueError("Expected each column once in a row of sparse features (got some twice); use .coalesce()")
    return pattern


def _peak(x: Tensor) -> Tensor:
    """Largest magnitude, 1 where there is none: a scale must not be zero."""
    if x.numel() == 0:
        return x.new_ones(())
    peak = x.detach().abs().amax()
    return torch.where(peak > 0, peak, torch.ones_like(peak))


def _row_peaks(x: Tensor, pattern: GraphPlan | None) -> Tensor:
    """Largest magnitude per row, ``[N, 1]``, 1 for a row of zeros."""
    peaks = largest(x, pattern)
    return torch.where(peaks > 0, peaks, torch.ones_like(peaks))


def largest(x: Tensor, pattern: GraphPlan | None = None, row_dims: int = 1) -> Tensor:
    """Largest magnitude per row of the last ``row_dims`` dimensions, kept as 1; ``[N, 1]`` of a sparse matrix."""
    if pattern is not None:
        return segment_max(pattern, x.detach().abs()).unsqueeze(1)
    dims = list(range(-row_dims, 0))
    if any(x.size(dim) == 0 for dim in dims):
        return x.new_zeros((*x.shape[:-row_dims], *([1] * row_dims)))
    return x.detach().abs().amax(dims, keepdim=True)


def _skewness(x: Tensor) -> Tensor:
    """Sample skewness, the third standardized moment; 0 for constant data."""
    centred = x.double().flatten()
    centred = centred - centred.mean()
    variance = centred.square().mean()
    return torch.where(variance > 0, centred.pow(3).mean() / variance.clamp_min(1e-300).pow(1.5), 0.0)
