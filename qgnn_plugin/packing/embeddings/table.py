"""Rows as packed codes: what a table of embeddings holds and its search reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.layout import check_packed, pack_codes, top_code, unpack_codes
from ...kernels.unpack_dequantize import unpack_dequantize
from .transform import Transform

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CHUNK", "PackedTable"]

CHUNK = 1 << 22  # codes unpacked at a time


@dataclass(frozen=True, eq=False)
class PackedTable:
    r"""Rows ``[N, F]`` as codes: :math:`\hat x = c s + l` with one range or one per node, or rotated to the
    directions in which they vary (:class:`~qgnn_plugin.packing.embeddings.transform.Transform`).

    Args:
        words: ``[N, row_words(C, bits)]`` int32; ``C = F`` codes of a row, with a transform its digits.
        scale: Step ``s > 0``, one element or ``[N, 1]``, float32; with a transform the factors of its rows, at least 0.
        lower: Lower end ``l``, of the same shape, float32; zeros with a transform, which has its own.
        num_features: ``F``.
        bits: 1, 2, 4 or 8.
        transform: Of rotated embeddings.
    """

    words: Tensor
    scale: Tensor
    lower: Tensor
    num_features: int
    bits: int
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if type(self.num_features) is not int or self.num_features < 0:
            raise ValueError(f"Expected 'num_features' >= 0 (got {self.num_features!r})")
        for name in ("words", "scale", "lower"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"Expected a tensor for '{name}' (got {type(getattr(self, name)).__name__})")
        if self.transform is not None and self.transform.center.numel() != self.num_features:
            found = self.transform.center.numel()
            raise ValueError(f"Expected a transform of {self.num_features} features (got {found})")
        check_packed(self.words, self._num_codes, self.bits)
        for name in ("scale", "lower"):
            value = getattr(self, name)
            single = value.numel() == 1 and (name == "lower" or self.transform is None)
            shaped = single or value.shape == (len(self), 1)
            if self.transform is not None and name == "lower":
                continue
            if not shaped or value.dtype != torch.float32 or value.dim() != self.scale.dim():
                raise ValueError(
                    f"Expected '{name}' of one float32 element or [{len(self)}, 1], as the other end "
                    f"(got {value.dtype}, {list(value.shape)})"
                )
            if value.device != self.words.device:
                raise ValueError(f"Expected '{name}' on {self.words.device}, as 'words' (got {value.device})")

    def _check_values(self) -> None:
        """Raise unless ranges are finite and codes are of features only, as packing leaves them."""
        for name in ("scale", "lower"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"Expected finite values in '{name}' (got NaN or infinity)")
        if not bool((self.scale > 0).all() if self.transform is None else (self.scale >= 0).all()):
            raise ValueError(f"Expected steps > 0 in 'scale' (got {float(self.scale.min()):g})")
        used = pack_codes(torch.full((1, self._num_codes), top_code(self.bits), dtype=torch.int32), self.bits)
        unused = ~used.to(self.words.device)
        for rows in self.words.split(max(1, CHUNK // max(1, self.words.size(1)))):
            if bool((rows & unused).any()):
                raise ValueError(f"Expected the bits of no feature in 'words' to be zero, of {self.num_features}")

    @property
    def _num_codes(self) -> int:
        return self.num_features if self.transform is None else self.transform.num_codes

    def __len__(self) -> int:
        return self.words.size(0)

    def __getitem__(self, index: Tensor | slice) -> Self:
        """Some of the rows: ``index`` int64 ``[M]``, boolean ``[N]``, or a slice.

        Raises:
            TypeError: If it is something else.
        """
        if not isinstance(index, slice) and not (isinstance(index, Tensor) and index.dim() == 1):
            raise TypeError(
                f"Expected a slice or a tensor [M] of rows (got {type(index).__name__}); one row: [i : i + 1]"
            )
        scale, lower = (t[index] if t.dim() == 2 else t for t in (self.scale, self.lower))
        return replace(self, words=self.words[index], scale=scale, lower=lower)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and ranges, or of codes, factors and the transform."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        if self.transform is None:
            return {"words": self.words, "scale": self.scale, "lower": self.lower}
        return {"words": self.words, "scale": self.scale, **self.transform.tensors}

    def dequantize(self) -> Tensor:
        """``[N, F]`` float32."""
        if self.transform is not None:
            basis, center = self.transform.basis().float(), self.transform.center
            rows = max(1, CHUNK // max(1, self._num_codes))
            parts = [self._codes(begin, begin + rows).float() @ basis + center for begin in range(0, len(self), rows)]
            return (torch.cat(parts) if parts else center.new_zeros((0, self.num_features))) * self.scale
        return unpack_dequantize(self.words, self.scale, self.lower, self.num_features, self.bits)

    def _codes(self, start: int, stop: int) -> Tensor:
        return unpack_codes(self.words[start:stop], self._num_codes, self.bits)

    def to(self, device: torch.device | str) -> Self:
        """The same embeddings on another device."""
        words, scale, lower = (t.to(device) for t in (self.words, self.scale, self.lower))
        transform = None if self.transform is None else self.transform.to(device)
        return replace(self, words=words, scale=scale, lower=lower, transform=transform)
