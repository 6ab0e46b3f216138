"""Node embeddings as packed codes, searched by integer dot products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...atomic import shown
from ...kernels.layout import PACKED_BITS, check_bits, pack_codes, row_words, top_code
from ...kernels.quantize_pack import quantize_pack
from ...layers.base import QuantizedLayer
from ...quantizers import QLRQuantizer, search_range
from ..files import container
from ..layers.base import PackedLayer
from ..layers.ranges import PackedRange, SiteSpec
from .table import CHUNK, PackedTable
from .topk import topk
from .transform import Transform, transform_codes

__all__ = ["PackedEmbeddings"]

KIND = "embeddings"
QUERY_BITS = 8  # of float queries with a range of their own
FURTHER_BITS = 32  # of a rotated row: it takes the bytes of one with a range of its own
MOST_BYTES = 1.25  # of a rotated table, over one with a range per row


class PackedEmbeddings(PackedTable):
    """Embeddings of nodes as codes, made of floats or of a model's output, searched by dot products, kept in files.

    Its rows are those of a :class:`~qgnn_plugin.packing.embeddings.table.PackedTable`.
    """

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, lower: Tensor, bits: int) -> PackedEmbeddings:
        """Pack integer codes ``[N, F]`` in ``[0, 2^bits - 1]``.

        Raises:
            ValueError: If a code is out of this range, or a range is not finite with a step above zero.
        """
        if codes.dim() != 2:
            raise ValueError(f"Expected codes [N, F] (got {list(codes.shape)})")
        check_bits(bits)
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) <= top_code(bits)):
            raise ValueError(f"Expected codes of 0 to {top_code(bits)} (got {int(codes.min())} to {int(codes.max())})")
        packed = cls(pack_codes(codes, bits), scale, lower, codes.size(1), bits)
        packed._check_values()
        return packed

    @classmethod
    def from_float(
        cls, x: Tensor, bits: int = 8, *, granularity: Literal["auto", "rotated", "node", "tensor"] = "auto"
    ) -> PackedEmbeddings:
        """Quantize ``x`` ``[N, F]``.

        Rotated to the directions in which they vary, embeddings get more bits where dot products need them, and find
        their neighbours at a fraction of the bits.  Without, ranges are those of least mean-squared error: lengths
        differ widely over the nodes of a graph, and dot products favour the long ones, so that one range for all of
        them either cuts these off or leaves the short ones a single code.  A range per node costs 8 bytes a node, as
        do the factor and the further digits of a rotated one, which small tables go without.

        Args:
            x: Float matrix; zero and one other value, per row or in all, are held in one bit without loss.
            bits: 2, 4 or 8, of every feature on average, beside what a node has.
            granularity: ``"rotated"``; ``"node"``, a range for every row; ``"tensor"``, one for all; ``"auto"``:
                rotated unless the table is so small that the directions weigh, a quarter more than ranges per row do.

        Raises:
            ValueError: If ``x`` is not a matrix, is empty, or holds a NaN or an infinity.
        """
        if x.dim() != 2 or not x.is_floating_point() or not x.numel():
            raise ValueError(f"Expected a float matrix [N, F] (got {x.dtype}, {list(x.shape)})")
        check_bits(bits, widths=PACKED_BITS[1:])
        if granularity not in ("auto", "rotated", "node", "tensor"):
            raise ValueError(
                f"Expected 'granularity' to be 'auto', 'rotated', 'node' or 'tensor' (got {granularity!r})"
            )
        x = x.detach().to(torch.float32)
        quantizer = QLRQuantizer(bits, site="embeddings", device=x.device)
        quantizer.set_range(x)
        if not quantizer.is_zero_one and granularity in ("auto", "rotated"):
            ranged = x.size(0) * (4 * row_words(x.size(1), bits) + 8)
            for further_bits in (FURTHER_BITS, 0):  # fewer where the directions weigh
                rotated = cls._rotated(x, bits, further_bits)
                if granularity == "rotated" or rotated.nbytes <= MOST_BYTES * ranged:
                    return rotated
        if not quantizer.is_zero_one and granularity != "tensor":
            return cls(*_quantized_rows(x, bits), x.size(1), bits)
        site = PackedRange(SiteSpec.of(quantizer), "embeddings", device=x.device)
        site.fill(quantizer)
        packed = site(x)
        scale, lower = packed.scale.detach(), packed.lower.detach()
        if scale.numel() == 1:
            scale, lower = scale.reshape(()), lower.reshape(())
        return cls(packed.words, scale, lower, x.size(1), packed.bits)

    @classmethod
    def _rotated(cls, x: Tensor, bits: int, further_bits: int) -> PackedEmbeddings:
        codes, factors, transform = transform_codes(x, bits, further_bits)
        return cls(pack_codes(codes, bits), factors, x.new_zeros(()), x.size(1), bits, transform)

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

    def __repr__(self) -> str:
        rotated = "" if self.transform is None else f", rotated to {self.transform.digits.numel()} directions"
        size = f"{len(self)} x {self.num_features}"
        return f"PackedEmbeddings({size}, bits={self.bits}{rotated}, {self.nbytes:,} bytes)"

    def topk(self, query: Tensor | PackedTable, k: int, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
        r"""The ``k`` largest dot products of each query with the embeddings.

        With query codes ``a`` of the range ``s_a, l_a`` and codes ``c``,

        .. math:: \langle \hat q, \hat x \rangle
            = s_a s_c \sum a c + s_a l_c \sum a + l_a s_c \sum c + F l_a l_c.

        Sums are exact integers; one affine step in float64 follows.  A float query is quantized to the range of the
        embeddings if they share one, and otherwise to 8 bits with a range of its own.  Queries of rotated embeddings
        are taken as they are, to the directions of these, in float64.  Among equal products the lower index comes
        first.

        Args:
            query: ``[M, F]`` or ``[F]`` float32, or packed embeddings of the same width.
            k: How many, at most ``N``.
            chunk: Codes unpacked at a time: memory grows with it and with ``M k``, not with ``N``.

        Returns:
            Products ``[M, k]`` float64, in descending order, and indices ``[M, k]`` int64 (``[k]`` for one query).
        """
        if type(k) is not int or not 1 <= k <= len(self):
            raise ValueError(f"Expected 'k' between 1 and {len(self)} (got {k!r})")
        if type(chunk) is not int or chunk < 1:
            raise ValueError(f"Expected 'chunk' >= 1 (got {chunk!r})")
        single = isinstance(query, Tensor) and query.dim() == 1
        scores, index = topk(self, self._packed_query(query), k, chunk)
        return (scores[0], index[0]) if single else (scores, index)

    def _packed_query(self, query: Tensor | PackedTable) -> PackedTable | Tensor:
        if not isinstance(query, (Tensor, PackedTable)):
            raise TypeError(f"Expected a tensor or PackedEmbeddings as query (got {type(query).__name__})")
        if isinstance(query, Tensor) and (query.dim() not in (1, 2) or not query.is_floating_point()):
            raise ValueError(f"Expected a float query [F] or [M, F] (got {query.dtype}, {list(query.shape)})")
        device = (query if isinstance(query, Tensor) else query.words).device
        if device != self.words.device:
            raise ValueError(f"Expected the query on {self.words.device}, as the embeddings (got {device})")
        features = query.num_features if isinstance(query, PackedTable) else query.size(-1)
        if features != self.num_features:
            raise ValueError(f"Expected a query of {self.num_features} features (got {features})")
        if isinstance(query, PackedTable) and self.transform is None and query.transform is None:
            return query
        if isinstance(query, PackedTable):
            query = query.dequantize()
        rows = query.detach().reshape(-1, features).to(torch.float32)
        if not bool(rows.isfinite().all()):
            raise ValueError("Expected finite queries (got NaN or infinity)")
        if self.transform is not None:
            return rows
        if self.scale.dim() == 2:
            return PackedEmbeddings(*_quantized_rows(rows, QUERY_BITS), features, QUERY_BITS)
        words = quantize_pack(rows, self.scale, self.lower, self.bits)
        return PackedEmbeddings(words, self.scale, self.lower, features, self.bits)

    def save(self, path: container.PathLike) -> None:
        """Write to a safetensors file, atomically, with checksums in its header."""
        shape = [len(self), self.num_features]
        description = {"num_features": self.num_features, "bits": self.bits, "shape": shape}
        container.write(path, KIND, self._tensors(), description)

    @classmethod
    def load(cls, path: container.PathLike, *, verify: bool = True, mmap: bool = False) -> PackedEmbeddings:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            verify: Compare every tensor with its checksum, and check that the values are those of embeddings.
            mmap: Map the file instead of reading it: a table is there at once and pages come when they are used, but
                whoever overwrites or cuts the file (replacing it is fine) changes results or ends the process.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, truncated or foreign.
        """
        tensors, description = container.read(path, KIND, verify=verify, mmap=mmap)
        fields = ("num_features", "bits")
        if not isinstance(description, dict) or description.keys() - {"shape"} != set(fields):
            container.refuse(path, "description", "num_features, bits and perhaps shape", description)
        shape = description.pop("shape", None)
        for field in fields:
            if type(description[field]) is not int:
                container.refuse(path, field, "an integer", description[field])
        rotated = {"words", "scale", "directions", "center", "digits"}
        if set(tensors) not in ({"words", "scale", "lower"}, rotated):
            raise ValueError(
                f"Expected the tensors words, scale and lower, or {', '.join(sorted(rotated))}, in '{shown(path)}' "
                f"(got {sorted(tensors)})"
            )
        try:
            transform = None
            if set(tensors) == rotated:
                directions, center, digits = (tensors[name] for name in ("directions", "center", "digits"))
                transform = Transform(directions, center, digits, description["bits"])
            lower = tensors.get("lower", torch.zeros(()))
            size = description["num_features"], description["bits"]
            table = cls(tensors["words"], tensors["scale"], lower, *size, transform)
            if verify:
                table._check_values()
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected packed embeddings in '{shown(path)}' (got others): {error}") from error
        if shape not in (None, [len(table), table.num_features]):
            container.refuse(path, "shape", f"[{len(table)}, {table.num_features}]", shape)
        return table


def _quantized_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scale and lower end (``[N, 1]``) of the least mean-squared error for every row of finite ``x``."""
    if not x.size(0):
        ends = x.new_zeros((0, 1))
        return quantize_pack(x, ends, ends, bits), ends, ends
    parts = [search_range(rows, top_code(bits), None) for rows in x.split(max(1, CHUNK // x.size(1)))]
    scale, lower = (torch.cat(ends).unsqueeze(1) for ends in zip(*parts, strict=True))
    return quantize_pack(x, scale, lower, bits), scale, lower


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
