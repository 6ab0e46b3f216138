"""Linear maps of what an edge sees, split: a product per source, per target and per edge, and their sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import linear as kernel
from ..kernels.layout import pack_codes, top_code, unpack_codes
from ..kernels.linear import linear_colterm
from ..kernels.plan import plan_cache
from ..layers.arithmetic import EXACT_FLOAT32
from ..packing.layers.ranges import PackedTensor
from ..quantizers import quantize_codes
from .evaluate import Values
from .marks import LINEAR
from .shadow import NotTraceable
from .spaces import CONST, EDGE, MIXED, SHAPED, SOURCE, TARGET, Spaces

__all__ = ["Affine", "Part", "affine_of", "is_product", "is_small", "parts_of"]

aten = torch.ops.aten
# The products of few features of edges with many outputs are not worth a matrix, unless they are needed repeatedly.
FEW, WIDE = 32, 32
SINGLE = (SOURCE, TARGET, EDGE)


@dataclass(frozen=True)
class Part:
    """What single sources, targets or edges contribute to a linear map of edges.

    Args:
        node: Of the record, computed for single sources, targets or edges.
        product: Its product, ``[rows, width]``; of packed maps the sum of products of codes, whole numbers.
        row_sum: The sum of its codes, ``[rows, 1]``; :obj:`None` of maps that are not packed.
        sign: 1, or -1 where it is taken off.
        first: First column of what it is multiplied by; tells parts of one node apart.
        codes, columns: Where few features of edges are mapped, what the kernel multiplies in the place of ``product``:
            codes ``[E, K]`` and those of the weight, ``[1, K width]``.
    """

    node: fx.Node
    product: Callable[[Values], Tensor]
    row_sum: Callable[[Values], Tensor] | None
    sign: int
    first: int
    codes: Callable[[Values], Tensor] | None = None
    columns: Callable[[Values], Tensor] | None = None


@dataclass(frozen=True)
class Affine:
    """The step from sums of codes to a packed linear map: ``((P sw) + (R lw)) sx + t lx + b``, in this order.

    Args:
        weight_scale, weight_lower: ``sw`` and ``lw``, one element or one per output.
        scale: ``sx``.
        term: ``t lx``, one per output; :obj:`None` for zero.
        bias: ``b``.
    """

    weight_scale: Callable[[], Tensor]
    weight_lower: Callable[[], Tensor]
    scale: Callable[[], Tensor]
    term: Callable[[], Tensor]
    bias: Callable[[], Tensor] | None


@dataclass(frozen=True)
class _Piece:
    node: fx.Node
    first: int
    width: int
    sign: int = 1


def is_product(node: fx.Node) -> bool:
    """Whether an operation is a linear map of rows."""
    return node.target in (LINEAR, aten.mm.default, aten.addmm.default)


def is_small(node: fx.Node, record: Any) -> bool:
    """Whether a packed linear map of edges is one of few features, by one range."""
    lin = record.linears[node.args[1]]
    site = lin.input_quantizer
    known = lin.words is not None and site is not None and site.spec.granularity == "tensor" and site.spec.is_fixed
    return known and lin._num_in <= FEW and lin._num_out >= WIDE


def parts_of(node: fx.Node, record: Any, spaces: Spaces) -> list[Part]:
    """The parts of a linear map of edges.

    Raises:
        NotTraceable: If what is mapped mixes sources, targets and edges number by number.
    """
    if node.target is LINEAR:
        return _packed_parts(node, record, spaces)
    source, weight = (node.args[-2], node.args[-1]) if node.target is aten.addmm.default else node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    matrix = weight
    found = []
    for piece in _pieces(source, record, spaces, linear=True):

        def value(values: Values, piece: _Piece = piece) -> Tensor:
            rows = values[piece.node].flatten(1) if values[piece.node].dim() > 1 else values[piece.node].view(-1, 1)
            return rows @ values[matrix][piece.first : piece.first + piece.width]

        found.append(Part(piece.node, value, None, piece.sign, piece.first))
    return found


def _packed_parts(node: fx.Node, record: Any, spaces: Spaces) -> list[Part]:
    source, number, _ = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(number, int)
    lin = record.linears[number]
    site = lin.input_quantizer
    if lin.words is None or site is None or site.spec.granularity != "tensor" or not site.spec.is_fixed:
        raise NotTraceable("no kernel for a linear map of each edge whose ranges depend on the whole of an edge")
    if lin._num_in * top_code(site.bits) * top_code(lin._site.bits) >= EXACT_FLOAT32:
        raise NotTraceable("no kernel for a linear map of each edge of so many features")
    found = []
    for piece in _pieces(source, record, spaces, linear=False):

        few = spaces.of[piece.node] == EDGE and piece.width <= FEW and lin._num_out >= WIDE
        found.append(_packed_part(lin, site, piece, few and len(node.users) == 1))
    return found


def _packed_part(lin: Any, site: Any, piece: _Piece, in_kernel: bool) -> Part:
    one_column = torch.ones((1, piece.width), dtype=torch.int32)

    def packed(values: Values) -> PackedTensor:
        return values.once(("codes", lin, piece), lambda: site(_rows(values, piece)))

    def product(values: Values) -> Tensor:
        return _columns_product(lin, packed(values), piece)

    def row_sum(values: Values) -> Tensor:
        x = packed(values)
        ones = pack_codes(one_column.to(x.words.device), 1)
        return _products(x, ones, 1)

    def codes(values: Values) -> Tensor:
        def quantized() -> Tensor:
            rows = _rows(values, piece)
            site.expect_finite(rows)
            return quantize_codes(rows, site.scale, site.lower, top_code(site.bits), None)

        return values.once(("float codes", lin, piece), quantized)

    def columns(values: Values) -> Tensor:
        weight = unpack_codes(lin.words, lin._num_in, lin._site.bits)[:, piece.first : piece.first + piece.width]
        return weight.t().reshape(1, -1).to(torch.float32)

    if not in_kernel:
        return Part(piece.node, product, row_sum, 1, piece.first)

    def code_sum(values: Values) -> Tensor:
        return codes(values).sum(1, keepdim=True)

    return Part(piece.node, product, code_sum, 1, piece.first, codes, columns)


def _rows(values: Values, piece: _Piece) -> Tensor:
    rows = values[piece.node]
    return rows.reshape(rows.size(0), math.prod(rows.shape[1:])).contiguous()


def affine_of(node: fx.Node, record: Any) -> Affine:
    """The affine step of a packed linear map."""
    number: Any = node.args[1]
    lin = record.linears[number]
    site = lin.input_quantizer

    def term() -> Tensor:
        columns = unpack_codes(lin.words, lin._num_in, lin._site.bits)
        return linear_colterm(columns, lin.weight_scale, lin.weight_lower.reshape(-1)) * site.lower

    bias = None if lin.bias is None else lambda: lin.bias
    return Affine(lambda: lin.weight_scale, lambda: lin.weight_lower, lambda: site.scale, term, bias)


def _columns_product(lin: Any, x: PackedTensor, piece: _Piece) -> Tensor:
    """Sums of products of codes with some columns of a packed weight."""
    bits, stop = lin._site.bits, piece.first + piece.width

    def columns() -> Tensor:
        return pack_codes(unpack_codes(lin.words, lin._num_in, bits)[:, piece.first : stop], bits)

    words = plan_cache.get((lin.words,), ("columns", lin._num_in, bits, piece.first, stop), columns)
    return _products(x, words, bits)


def _products(x: PackedTensor, words: Tensor, bits: int) -> Tensor:
    """Sums of products of codes, whole numbers in float32."""
    one = torch.ones(1, device=x.words.device)
    zero = torch.zeros_like(one)
    return kernel.linear(x.words, words, one, zero, one, zero, x.num_features, x.bits, bits)


def _pieces(node: fx.Node, record: Any, spaces: Spaces, linear: bool, sign: int = 1, first: int = 0) -> list[_Piece]:
    """What a matrix of edges is joined of; with ``linear`` also sums and differences are taken apart."""
    space, shape = spaces.of[node], record.shapes[node]
    width = 1
    for size in shape[1:]:
        width *= size
    if space in SINGLE:
        return [_Piece(node, first, width, sign)]
    if space != MIXED:
        raise NotTraceable("no kernel for a linear map of what is computed in the kernel")
    source: Any = node.args[0] if node.args else None
    same = isinstance(source, fx.Node) and spaces.of[source] != CONST
    if same and node.target in (*SHAPED, aten.select.int) and _numbers(record, source) == _numbers(record, node):
        return _pieces(source, record, spaces, linear, sign, first)
    if node.target is aten.cat.default and _is_last(node, shape):
        found: list[_Piece] = []
        at = first
        for part in source:
            found += _pieces(part, record, spaces, linear, sign, at)
            at += _numbers(record, part) // record.edges
        return found
    if linear and node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        other: Any = node.args[1]
        both = isinstance(other, fx.Node) and same and spaces.of[other] != CONST
        if both and record.shapes[other] == shape == record.shapes[source]:
            turned = sign if node.target is aten.add.Tensor else -sign
            left = _pieces(source, record, spaces, linear, sign, first)
            return left + _pieces(other, record, spaces, linear, turned, first)
    raise NotTraceable("no kernel for a linear map of each edge")


def _numbers(record: Any, node: fx.Node) -> int:
    count = 1
    for size in record.shapes[node]:
        count *= size
    return count


def _is_last(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether matrices are joined one behind the other in every row."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim % len(shape) == len(shape) - 1 and all(size == 1 for size in shape[1:-1])
