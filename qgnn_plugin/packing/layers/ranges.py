"""Quantization sites of a packed model: ranges that are fixed, and what passes there as packed words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...config import OFF
from ...graph.fixed import is_exporting
from ...kernels.checksum import checksum
from ...kernels.finite import is_finite
from ...kernels.layout import pack_codes, top_code
from ...kernels.quantize_pack import quantize_pack
from ...quantizers import QLRQuantizer, QuantizedTensor, quantize_codes
from ...quantizers.functional import shown_range
from ...quantizers.packed import PackedTensor, joined
from ...quantizers.rows import RowRange, multipliers
from ...quantizers.values import largest, peak, row_peaks, split
from ..lazy.deferred import DeferredTensor, Pending, materialized
from ..lazy.producers import Producer, row_blocks
from .site_spec import UNSET, SiteSpec

__all__ = ["LastProduct", "PackedRange", "PackedTensor", "SiteSpec", "check_finite", "joined"]

NOT_FINITE = "Expected finite values at '{where}' (got {found}); check the features"


def check_finite(x: Tensor, where: str) -> None:
    """Raise if ``x`` holds a NaN or an infinity."""
    if is_finite(x):
        return
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(NOT_FINITE.format(where=where, found=f"{bad} NaN or infinite of {x.numel()}"))


class LastProduct:
    """A tensor times a number, kept for as long as the tensor holds the same, whatever writes to it."""

    def __init__(self) -> None:
        self.known: tuple[float, float, Tensor] | None = None

    def of(self, tensor: Tensor, factor: float) -> Tensor:
        """``tensor * factor``, which nobody may write to."""
        if torch.compiler.is_compiling() or not tensor.is_cpu or torch._C._len_torch_dispatch_stack():
            return tensor * factor
        known = self.known
        value = tensor.item() if tensor.numel() == 1 else checksum(tensor)
        if known is None or known[0] != value or known[1] != factor or known[2].shape != tensor.shape:
            known = self.known = (value, factor, tensor * factor)
        return known[2]

    def __reduce__(self) -> Any:
        return LastProduct, ()


class PackedRange(nn.Module):
    """A quantizer with its range frozen to buffers; codes come out packed.

    Args:
        spec: What the site does.
        site: Its name, for errors.
    """

    scale: Tensor | None
    lower_end: Tensor | None
    skew: Tensor | None
    unit: Tensor | None

    def __init__(self, spec: SiteSpec, site: str, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec, self.site = spec, site
        shape = (spec.channels,) if spec.granularity == "channel" else ()
        ranged = spec.has_range
        free = ranged and spec.zero_code is None
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_buffer("scale", torch.ones(shape, **options) if ranged else None)
        self.register_buffer("lower_end", torch.zeros(shape, **options) if free else None)
        self.register_buffer("skew", torch.zeros((), **options) if spec.truncated else None)
        self.register_buffer("unit", torch.ones((), **options) if ranged and spec.granularity == "row" else None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers.setdefault("unit", None)  # which pickles of version 1 do not have

    @torch.no_grad()
    def fill(self, quantizer: QLRQuantizer) -> None:
        """Take the numbers of a quantizer with this description."""
        if self.scale is None:
            return
        scale, lower = quantizer.range()
        self.scale.copy_(scale)
        if self.lower_end is not None:
            self.lower_end.copy_(lower)
        if self.skew is not None and quantizer.skew is not None:
            self.skew.copy_(quantizer.skew)
        if self.spec.granularity == "row":
            self.unit.copy_(quantizer.unit)  # type: ignore[union-attr, arg-type]

    def extra_repr(self) -> str:
        text = f"bits={self.spec.bits}, granularity={self.spec.granularity}"
        return ", ".join(filter(None, (text, self.shown_range())))

    def shown_range(self) -> str:
        """The lowest and the highest value of the codes; empty where there is no one range."""
        if self.scale is None:
            return "0/1" if self.spec.is_zero_one else ""
        return shown_range(self.scale, self.lower, self.spec.bits, self.spec.granularity)

    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def lower(self) -> Tensor:
        """Lower end of a fixed range, shaped as ``scale``."""
        buffers = self._buffers
        lower_end, scale = buffers["lower_end"], buffers["scale"]
        if lower_end is not None:
            return lower_end
        assert scale is not None
        assert self.spec.zero_code is not None
        return self._lower.of(scale, -self.spec.zero_code)

    @property
    def _lower(self) -> LastProduct:
        return self.__dict__.get("_last_lower") or self.__dict__.setdefault("_last_lower", LastProduct())

    def output_range(self) -> dict[str, Any]:
        """The arguments that make a kernel quantize its result to this (fixed) range, or to multiples of it."""
        spec = self.spec
        assert spec.is_fixed
        out: dict[str, Any] = {"out_scale": self._buffers["scale"], "out_offset": self.lower, "out_bits": spec.bits}
        if spec.has_multipliers:
            out["out_unit"] = self._buffers["unit"]
        return out

    @property
    def has_multipliers(self) -> bool:
        return self.spec.has_multipliers

    def wrap(self, packed: Tensor | tuple[Tensor, Tensor], num_features: int) -> PackedTensor:
        """Words, with the multipliers of their rows, that a kernel has quantized to this (fixed) range."""
        scale = self._buffers["scale"]
        assert scale is not None
        return self._wrapped(packed, num_features, scale, self.lower)

    def _wrapped(self, packed: Any, num_features: int, scale: Tensor, lower: Tensor) -> PackedTensor:
        words, multiplier = packed if isinstance(packed, tuple) else (packed, None)
        spec = self.spec
        return PackedTensor(words, scale, lower, num_features, spec.bits, spec.zero_code == 0, multiplier)

    def _range_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scale and lower end that broadcast to ``x``, and the multiples ``[N, 1]`` that they are."""
        if self.spec.is_zero_one:
            scale = row_peaks(x, None) if self.spec.granularity == "node" else peak(x)
            return scale, torch.zeros_like(scale), None
        assert self.scale is not None
        if self.spec.granularity == "node":
            rows = row_peaks(x, None)
            return self.scale * rows, self.lower * rows, None
        if self.spec.granularity == "row":
            assert self.unit is not None
            rows = multipliers(largest(x), self.unit)
            return self.scale * rows, self.lower * rows, rows
        return self.scale, self.lower, None

    is_observing = False  # unlike a site that is calibrated

    def forward(self, x: Tensor, is_finite: bool = False, codes_kept: bool = False) -> PackedTensor | QuantizedTensor:
        """Quantize ``x`` ``[N, F]``, dense or ``torch.sparse_csr``.

        Args:
            x: The values.
            is_finite: Whether they are known to be, because they follow from what was checked before.
            codes_kept: Of no meaning here; what trainable sites are told about the backward pass.

        Returns:
            Packed codes; for sparse features whose zeros have code 0 the codes at their stored
            positions, and where the site is off the values themselves, both unpacked.

        Raises:
            TypeError: If ``x`` is no float32 tensor.
            ValueError: If it is on another device, 0/1 data are no longer 0 or one value, or not finite where
                they do not come from a packed layer.
        """
        if type(x) is DeferredTensor and self.spec.is_fixed:
            scale = self._buffers["scale"]
            if scale is not None and scale.device == x.pending.producer.device:  # nothing else can be wrong with it
                return self._of_pending(x.pending)
        self.expect(x)
        if self.bits == UNSET:
            raise RuntimeError(
                f"The range of '{self.site}' was unset when the model was packed: calibrate on data "
                f"that reach it (qgnn_plugin.calibrate) and pack again"
            )
        if isinstance(x, DeferredTensor):  # from a packed layer, which has checked what it was given
            if self.spec.is_row_local:
                return self._of_pending(x.pending)
            x, is_finite = materialized(x), True
        if x.layout != torch.strided:
            return self._quantize_sparse(x)
        if not is_finite:
            self.expect_finite(x)
        if self.bits == OFF:
            return QuantizedTensor.identity(x)
        if self.spec.is_fixed or not self.spec.is_row_local:
            return self._quantize_rows(x)
        return joined([self._quantize_rows(x[rows]) for rows in row_blocks(x.size(0), x.size(1), x.device)])

    def expect(self, x: Tensor) -> None:
        """Refuse what is no float32 tensor on the device of the range.

        Raises:
            TypeError, ValueError: If it is not.
        """
        if not isinstance(x, Tensor) or x.dtype is not torch.float32:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"Expected a float32 tensor at '{self.site}' (got {found}); convert it with .float()")
        if self.scale is not None and x.device != self.scale.device:
            raise ValueError(
                f"Expected values on {self.scale.device}, where '{self.site}' has its range (got {x.device}); move the "
                f"model and its inputs to one device with .to(device)"
            )

    def expect_finite(self, x: Tensor) -> None:
        """Refuse NaN and infinity, on the CPU: an accelerator would have to be waited for.

        Raises:
            ValueError: If there are any.
        """
        if x.device.type != "cpu":
            return
        if is_exporting():  # the program checks what it is given in turn
            torch._assert_async(x.isfinite().all(), NOT_FINITE.format(where=self.site, found="NaN or infinity"))
        elif not torch.compiler.is_compiling():
            check_finite(x, self.site)

    def of(self, producer: Producer) -> PackedTensor | QuantizedTensor:
        """The codes of what ``producer`` computes, without its floats where a row's codes depend on that row alone."""
        if not self.spec.is_row_local:
            return self(producer(), is_finite=True)
        return self._of_pending(Pending(producer))

    def _of_pending(self, x: Pending) -> PackedTensor:
        if self.spec.is_fixed:
            out = self.output_range()
            return self._wrapped(x.packed(**out), x.producer.num_features, out["out_scale"], out["out_offset"])
        return joined([self._quantize_rows(block) for _, block in x.blocks()])

    def quantize_heads(self, x: Tensor) -> PackedTensor:
        """Quantize ``[N, H, C]`` to codes ``[N, H C]``; a range per node is then one per node and head.

        Multiples of one range are one for all that a node sends.
        """
        if self.spec.granularity != "node" or x.size(1) == 1:
            return self._quantize_rows(x.flatten(1))
        scale, lower, _ = self._range_of(x)
        if self.skew is not None:
            codes = quantize_codes(x, scale, lower, top_code(self.bits), self.skew)
            words = pack_codes(codes.flatten(1), self.bits)
        else:
            # The kernel's range is per row: bring values into steps first, the same operations in the same order.
            steps, one = (x - lower) * (1 / scale), torch.ones((), dtype=x.dtype, device=x.device)
            words = quantize_pack(steps.flatten(1), one, torch.zeros_like(one), self.bits)
        if self.spec.is_zero_one:
            self._check_zero_one(((x == 0) | (x == scale)).all())
        unsigned = self.spec.zero_code == 0
        return PackedTensor(words, scale.squeeze(-1), lower.squeeze(-1), x.size(1) * x.size(2), self.bits, unsigned)

    def _quantize_rows(self, x: Tensor) -> PackedTensor:
        unsigned = self.spec.zero_code == 0
        if self.has_multipliers and self.skew is None:
            assert self.scale is not None
            packed = quantize_pack(x, self.scale, self.lower, self.bits, self.unit, is_checked=True)
            return self.wrap(packed, x.size(1))
        scale, lower, rows = self._range_of(x)
        if self.skew is not None:
            codes = quantize_codes(x, scale, lower, top_code(self.bits), self.skew)
            words = pack_codes(codes, self.bits)
        else:
            words = quantize_pack(x, scale, lower, self.bits, is_checked=True)
        if self.spec.is_zero_one:
            self._check_zero_one(((x == 0) | (x == scale)).all())
        if rows is None:
            return PackedTensor(words, scale, lower, x.size(1), self.bits, unsigned)
        assert self.scale is not None
        multiplier = rows.view(-1).to(torch.uint8)
        return PackedTensor(words, self.scale, self.lower, x.size(1), self.bits, unsigned, multiplier)

    def _quantize_sparse(self, x: Tensor) -> PackedTensor | QuantizedTensor:
        values, pattern = split(x)
        assert pattern is not None
        self.expect_finite(values)
        if self.bits == OFF:
            return QuantizedTensor.identity(values, pattern)
        if not self.spec.stays_sparse:
            return self.forward(QuantizedTensor.identity(values, pattern).dequantize())
        per_row = self.spec.granularity == "node"
        rows = None
        if self.spec.granularity == "row":
            assert self.scale is not None
            assert self.unit is not None
            rows = RowRange(multipliers(largest(values, pattern), self.unit), self.scale, self.lower)
            scale = self.scale * rows.multiplier
        else:
            peaks = row_peaks(values, pattern) if per_row else peak(values)
            scale = peaks if self.scale is None else (self.scale * peaks if per_row else self.scale)
        full = scale[pattern.dst, 0] if scale.dim() == 2 else scale
        top = top_code(self.bits)
        codes = quantize_codes(values, full, torch.zeros_like(full), top, self.skew)
        if self.spec.is_zero_one:
            self._check_zero_one((codes * full == values).all())
        return QuantizedTensor(codes, scale, torch.zeros_like(scale), top, True, pattern, rows=rows)

    def _check_zero_one(self, holds: Tensor) -> None:
        message = (
            f"Expected '{self.site}' to be zero or one value, as when its range was set (got other values); calibrate "
            f"on data like these and pack again"
        )
        if torch.compiler.is_compiling():
            torch._assert_async(holds, message)
        elif not bool(holds):
            raise ValueError(message)
