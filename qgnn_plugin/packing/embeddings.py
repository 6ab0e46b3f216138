"""Node embeddings as packed codes, searched by integer dot products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.layout import check_packed, pack_codes, top_code, unpack_codes
from ..kernels.quantize_pack import quantize_pack
from ..kernels.unpack_dequantize import unpack_dequantize
from ..layers.base import QuantizedLayer
from ..quantizers import QLRQuantizer, search_range
from . import container
from .base import PackedLayer
from .ranges import PackedRange, SiteSpec

__all__ = ["PackedEmbeddings"]

KIND = "embeddings"
CHUNK = 1 << 22  # codes unpacked at a time


@dataclass(frozen=True, eq=False)
class PackedEmbeddings:
    r"""Embeddings ``[N, F]`` as codes of one range, :math:`\hat x = c s + l`.

    Args:
        words: ``[N, row_words(F, bits)]`` int32.
        scale: Step ``s > 0``, one element, float32.
        lower: Lower end ``l``, one element, float32.
        num_features: ``F``.
        bits: 1, 2, 4 or 8.
    """

    words: Tensor
    scale: Tensor
    lower: Tensor
    num_features: int
    bits: int

    def __post_init__(self) -> None:
        check_packed(self.words, self.num_features, self.bits)
        for name in ("scale", "lower"):
            value = getattr(self, name)
            if value.numel() != 1 or value.dtype != torch.float32:
                raise ValueError(f"Expected '{name}' of one float32 element (got {value.dtype}, {list(value.shape)})")

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, lower: Tensor, bits: int) -> PackedEmbeddings:
        """Pack integer codes ``[N, F]`` in ``[0, 2^bits - 1]``."""
        return cls(pack_codes(codes, bits), scale, lower, codes.size(1), bits)

    @classmethod
    def from_float(cls, x: Tensor, bits: int = 8) -> PackedEmbeddings:
        """Quantize ``x`` ``[N, F]`` to the range of least mean-squared error.

        Raises:
            ValueError: If ``x`` is not a matrix, is empty, or holds a NaN or an infinity.
        """
        if x.dim() != 2 or not x.is_floating_point() or not x.numel():
            raise ValueError(f"Expected a float matrix [N, F] (got {x.dtype}, {list(x.shape)})")
        x = x.detach().to(torch.float32)
        quantizer = QLRQuantizer(bits, site="embeddings", device=x.device)
        quantizer.set_range(x)
        site = PackedRange(SiteSpec.of(quantizer), "embeddings", device=x.device)
        site.fill(quantizer)
        packed = site(x)
        if packed.scale.numel() != 1:  # one-bit rows: a scale per row does not serve dot products
            scale, lower = search_range(x.reshape(1, -1), top_code(bits), 0.0)
            scale, lower = (t.reshape(()).to(torch.float32) for t in (scale, lower))
            return cls(quantize_pack(x, scale, lower, bits), scale, lower, x.size(1), bits)
        lower = packed.lower.detach().reshape(())
        return cls(packed.words, packed.scale.detach().reshape(()), lower, x.size(1), packed.bits)

    @classmethod
    def from_model(cls, model: nn.Module, *args: Any, **kwargs: Any) -> PackedEmbeddings:
        """The outputs of a packed or converted model with ``output_bits``, at their own range: nothing is lost.

        Args:
            model: The model, in eval mode.
            args, kwargs: What its forward takes.

        Raises:
            ValueError: If its output is not quantized, or not with one range.
        """
        site = _output_site(model)
        with torch.no_grad():
            x = model(*args, **kwargs)
        # Values on the levels of the range go back to the codes that they came from.
        packed = site(x)
        scale, lower = (t.detach().reshape(()).clone() for t in (packed.scale, packed.lower))
        return cls(packed.words, scale, lower, packed.num_features, packed.bits)

    def __len__(self) -> int:
        return self.words.size(0)

    def __repr__(self) -> str:
        return f"PackedEmbeddings({len(self)} x {self.num_features}, bits={self.bits}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of codes and range."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.scale, self.lower))

    def dequantize(self) -> Tensor:
        """``[N, F]`` float32."""
        return unpack_dequantize(self.words, self.scale, self.lower, self.num_features, self.bits)

    def to(self, device: torch.device | str) -> PackedEmbeddings:
        """The same embeddings on another device."""
        words, scale, lower = (t.to(device) for t in (self.words, self.scale, self.lower))
        return PackedEmbeddings(words, scale, lower, self.num_features, self.bits)

    def topk(self, query: Tensor | PackedEmbeddings, k: int, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
        r"""The ``k`` largest dot products of each query with the embeddings.

        With query codes ``a`` (a float query is quantized to the range of the embeddings) and codes ``c``,

        .. math:: \langle \hat q, \hat x \rangle
            = s^2 \sum a c + s l \big(\sum a + \sum c\big) + F l^2

        (for a packed query with its own range on the left).  Sums are exact integers; one affine step in float64
        follows.  Among equal products the lower index comes first.

        Args:
            query: ``[M, F]`` or ``[F]`` float32, or packed embeddings of the same width.
            k: How many, at most ``N``.
            chunk: Codes unpacked at a time: memory grows with it and with ``M k``, not with ``N``.

        Returns:
            Products ``[M, k]`` float64, in descending order, and indices ``[M, k]`` int64 (``[k]`` for one query).
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"Expected 'k' between 1 and {len(self)} (got {k})")
        if chunk < 1:
            raise ValueError(f"Expected 'chunk' >= 1 (got {chunk})")
        single = isinstance(query, Tensor) and query.dim() == 1
        packed = self._packed_query(query)
        width = max(1, self.num_features)
        rows = max(1, chunk // width)
        parts = [self._topk(packed, slice(begin, begin + rows), k, rows) for begin in range(0, len(packed), rows)]
        if not parts:
            parts = [self._empty(k)]
        scores, index = (torch.cat(part) for part in zip(*parts, strict=True))
        return (scores[0], index[0]) if single else (scores, index)

    def _empty(self, k: int) -> tuple[Tensor, Tensor]:
        device = self.words.device
        scores = torch.zeros((0, k), dtype=torch.float64, device=device)
        return scores, torch.zeros((0, k), dtype=torch.int64, device=device)

    def _packed_query(self, query: Tensor | PackedEmbeddings) -> PackedEmbeddings:
        features = query.num_features if isinstance(query, PackedEmbeddings) else query.size(-1)
        if features != self.num_features:
            raise ValueError(f"Expected a query of {self.num_features} features (got {features})")
        if isinstance(query, PackedEmbeddings):
            return query
        rows = query.detach().reshape(-1, features).to(torch.float32)
        if not bool(rows.isfinite().all()):
            raise ValueError("Expected finite queries (got NaN or infinity)")
        words = quantize_pack(rows, self.scale, self.lower, self.bits)
        return PackedEmbeddings(words, self.scale, self.lower, features, self.bits)

    def _topk(self, query: PackedEmbeddings, queries: slice, k: int, rows: int) -> tuple[Tensor, Tensor]:
        asked = unpack_codes(query.words[queries], self.num_features, query.bits)
        best: tuple[Tensor, Tensor] | None = None
        # A block of products is as large as a block of codes.
        rows = max(1, min(rows, rows * self.num_features // max(1, asked.size(0))))
        for begin in range(0, len(self), rows):
            codes = unpack_codes(self.words[begin : begin + rows], self.num_features, self.bits)
            scores = self._products(query, asked, codes)
            index = torch.arange(begin, begin + codes.size(0), device=codes.device).expand_as(scores)
            if best is not None:
                scores, index = torch.cat([best[0], scores], 1), torch.cat([best[1], index], 1)
            # Stable, over candidates in ascending order of index among equals: ties are deterministic.
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
            best = scores.gather(1, order), index.gather(1, order)
        assert best is not None
        return best

    def _products(self, query: PackedEmbeddings, asked: Tensor, codes: Tensor) -> Tensor:
        """Dot products ``[M, n]`` float64 of a block: the sums below are integers, exact up to ``2^53``."""
        a, c = asked.double(), codes.double()
        s_a, l_a = query.scale.double(), query.lower.double()
        s_c, l_c = self.scale.double(), self.lower.double()
        total = (a @ c.t()) * (s_a * s_c)
        total += a.sum(1, keepdim=True) * (s_a * l_c) + c.sum(1) * (s_c * l_a)
        return total + self.num_features * (l_a * l_c)

    def save(self, path: container.PathLike) -> None:
        """Write to a safetensors file, atomically, with checksums in its header."""
        tensors = {name: getattr(self, name) for name in ("words", "scale", "lower")}
        container.write(path, KIND, tensors, {"num_features": self.num_features, "bits": self.bits})

    @classmethod
    def load(cls, path: container.PathLike, *, verify: bool = True) -> PackedEmbeddings:
        """Read what :meth:`save` wrote, memory-mapped.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, truncated or foreign.
        """
        tensors, description = container.read(path, KIND, verify=verify)
        fields: Mapping[str, Any] = description
        return cls(**tensors, num_features=fields["num_features"], bits=fields["bits"])


def _output_site(model: nn.Module) -> PackedRange:
    """The range of a model's output."""
    for layer in model.modules():
        site = getattr(layer, "output_quantizer", None)
        if isinstance(layer, QuantizedLayer) and isinstance(site, QLRQuantizer):
            spec = SiteSpec.of(site)
            packed = PackedRange(spec, site.site, device=site.log_scale.device)
            packed.fill(site)
            site = packed
        if isinstance(layer, (PackedLayer, QuantizedLayer)) and isinstance(site, PackedRange):
            if site.spec.granularity != "tensor":
                raise ValueError(f"Expected one range for the output (got one per {site.spec.granularity})")
            return _without_truncation(site)
    raise ValueError("Expected a model with a quantized output (got none): set 'output_bits' in its QuantConfig")


def _without_truncation(site: PackedRange) -> PackedRange:
    """The same range with plain rounding: what truncation has left lies on its levels already."""
    if not site.spec.truncated:
        return site
    plain = PackedRange(replace(site.spec, truncated=False), site.site)
    plain.load_state_dict({k: v for k, v in site.state_dict().items() if k != "skew"}, assign=True)
    return plain
