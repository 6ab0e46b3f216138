"""QLR: the quantizer with learnable ranges (arXiv 2308.14949, section 4.1), in scale-relative form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import (
    BITS,
    GRANULARITIES,
    LEVELS,
    OFF,
    Granularity,
    Levels,
    Truncation,
    check_levels,
    check_one_of,
    shown_widths,
)
from ..kernels.plan import GraphPlan
from . import compressed
from .fitting import FittedQuantizer, InputCheck
from .functional import FINE_BITS, quantize_codes, shown_range
from .packed import PackedTensor
from .range_search import Sample
from .rows import RowRange, multipliers
from .state import RangeKind
from .tensor import QuantizedTensor
from .transforms import FORWARD, VMAP, is_vmapping, transform_of
from .values import largest, peak, row_peaks, split

__all__ = ["QLRQuantizer", "RangeKind"]


class QLRQuantizer(FittedQuantizer):
    r"""Quantizer with a learnable range ``[l, u]``, ``s = exp(log_scale)`` and ``l = offset * s``.

    Args:
        bits: 1, 2, 4, 8, or 32 for off.
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

    passes_unset = False  # whether values pass in eval mode while there is no range

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
            raise ValueError(f"Expected 'bits' to be {shown_widths()} (got {bits!r})")
        check_one_of("levels", levels, LEVELS)
        check_levels("levels", levels, bits)
        check_one_of("granularity", granularity, GRANULARITIES)
        check_one_of("truncation", truncation, (None, "bt", "sbt"))
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
        return "0/1" if self.is_zero_one else shown_range(*self.range(), self.bits, self.granularity)

    def _shaped(self, per_channel: Tensor, x: Tensor) -> Tensor:
        if self.granularity != "channel" or self.channel_dim == -1:
            return per_channel
        return per_channel.view(-1, *([1] * (x.dim() - 1)))

    def _range_of(self, x: Tensor, pattern: GraphPlan | None) -> tuple[Tensor, Tensor, RowRange | None]:
        """Scale and lower end that broadcast to ``x``, and what they are multiples of."""
        kind = self.range_kind
        if self.is_zero_one:
            rows = row_peaks(x, pattern) if kind == RangeKind.ZERO_ONE_ROWS else peak(x)
            # A factor exp(0) = 1 keeps the parameters in the graph: DDP expects a gradient for each.
            unused = self.log_scale if self.offset is None else self.log_scale + self.offset
            scale = rows * (unused.reshape(-1)[0] * 0).exp()
            return scale, torch.zeros_like(scale), None
        scale, lower = self.range()
        if self.granularity == "node":
            rows = row_peaks(x, pattern)
            return scale * rows, lower * rows, None
        if self.unit is not None:
            multiplier = multipliers(largest(x, pattern, self.row_dims), self.unit)
            # Products no narrower than the values, and of float32 values no wider, as with one range per tensor.
            as_values = x.dtype in (torch.float32, torch.float64)
            multiplier = multiplier.to(x.dtype if as_values else torch.promote_types(x.dtype, scale.dtype))
            multiples = RowRange(multiplier, scale, lower)
            return *(compressed.multiples(multiples) if compressed.compressing() else multiples.ends()), multiples
        return self._shaped(scale, x), self._shaped(lower, x), None

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
        x, pattern = split(x)
        if self.bits == OFF:
            return QuantizedTensor.identity(x, pattern)
        if not x.is_floating_point():
            raise TypeError(
                f"Expected floating-point values at '{self.site}' (got {x.dtype}); convert them with .float()"
            )
        if not torch.compiler.is_compiling():
            x = self._outside_modes(x)
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
            if x.numel() == 0 or (self.passes_unset and not self.training):
                return QuantizedTensor.identity(x, pattern)
            if not self.training:
                raise RuntimeError(
                    f"The range of '{self.site}' is unset: call qgnn_plugin.calibrate(model, data) first, "
                    f"or train for at least one step (in Lightning add RangeCalibration()); where no such data come to "
                    f"this layer, exclude it from conversion (a packed model keeps it in floats)"
                )
            self._expect_one_process()
            self.set_range(x.detach(), pattern, may_be_zero_one=_looks_like_input(x))
        elif self._has_outgrown_zeros(x):
            self.set_range(x.detach(), pattern, may_be_zero_one=_looks_like_input(x))
        return self._quantize(x, pattern, codes_kept)

    def _expect_one_process(self) -> None:
        """Refuse to learn a range that starts from this process's own first batch.

        Raises:
            RuntimeError: If several processes train together: only gradients are averaged, so their ranges would differ
                for good.
        """
        if not (self.is_activation and isinstance(self.log_scale, nn.Parameter) and dist.is_available()):
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"Expected ranges to be set before {dist.get_world_size()} processes train together (got none at "
                f"'{self.site}', which each would take from its own first batch): call "
                f"qgnn_plugin.calibrate(model, data, method='ranges') before DistributedDataParallel copies the model "
                f"from rank 0; in Lightning add RangeCalibration()"
            )

    def _outside_modes(self, x: Tensor) -> Tensor:
        """``x``, or a copy of it where it was made in inference mode and is to be kept for a backward pass.

        Raises:
            ValueError: Where it is a batch of :func:`torch.func.vmap`: whether values are finite cannot
                be asked; or has a forward-mode derivative, which rounding has none of.
        """
        transform = VMAP if is_vmapping() else transform_of((x,))  # of an input, or of parameters
        if transform == VMAP:
            raise ValueError(
                f"Expected no torch.func.vmap over a quantized layer (got one at '{self.site}'): give samples as a "
                f"dimension before that of the nodes, or in a loop, or use restore_model(qmodel)"
            )
        if transform == FORWARD:
            raise ValueError(
                f"Expected no forward-mode derivative through a quantized layer (got one at '{self.site}'): "
                f"straight-through gradients run backwards; use torch.autograd.grad, torch.func.vjp or jacrev, or "
                f"restore_model(qmodel)"
            )
        if not torch._C._functorch.is_functorch_wrapped_tensor(x) and x.is_inference() and torch.is_grad_enabled():
            return x.clone() if not torch.is_inference_mode_enabled() else x
        return x

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
        # The scale of 0/1 data is the data's own: no gradient flows through the codes.
        step = scale.detach() if self.is_zero_one else scale
        full = step[pattern.dst, 0] if pattern is not None and step.dim() == 2 else step
        low = torch.zeros_like(full) if pattern is not None else lower
        codes = self._codes(x, full, low)
        if self.is_zero_one and not self._still_zero_one(x.detach(), codes.detach() * full):
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
        skew = None if self.is_zero_one else self.skew
        if scale.dim() == x.dim() == 3 and scale.size(1) == 1 < x.size(1):  # heads of a row, side by side
            wide = quantize_codes(x.flatten(1), scale.flatten(1), lower.flatten(1), self.qmax, skew)
            return wide.view(x.shape)
        return quantize_codes(x, scale, lower, self.qmax, skew)

    def _compresses(self, x: Tensor, scale: Tensor) -> bool:
        """Whether the backward pass keeps packed codes of ``x``: activations, not weights."""
        rounds = not self.is_zero_one and self.skew is None and self.channel_dim == -1
        return rounds and compressed.compressing() and compressed.can_compress(x, scale)

    def _compressed(self, x: Tensor, scale: Tensor, lower: Tensor, codes_kept: bool) -> QuantizedTensor:
        with torch.no_grad():
            codes = quantize_codes(x, scale, lower, self.qmax)
        unsigned = self.zero_code == 0
        packed = PackedTensor.of(codes, scale, lower, self.bits, unsigned)
        codes = compressed.quantize(x, scale, lower, codes, packed, self.qmax, codes_kept)
        return QuantizedTensor(codes, packed.scale, packed.lower, self.qmax, unsigned, packed=packed)

    def _still_zero_one(self, x: Tensor, dequantized: Tensor) -> bool:
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
