r"""``linear`` on Triton: packed times prepared weights through integer tensor cores.

Weights are bytes (:mod:`.triton_prepared`), made once.  Where those of a column block fit, a program keeps them in
shared memory and walks over the rows; activations are unpacked on the way to the product, never in memory
(:mod:`.triton_unpack`).
8-bit codes do not fit a signed byte and are shifted by :math:`z = 128` on either side; with shifted codes :math:`c'`

.. math:: \sum_k c^x c^w = \sum c'^x c'^w + z_w \sum c^x + z_x \sum c'^w
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER
from ..layout import BITS_PER_BYTE, next_power_of_two, parts_per_byte, row_bytes, row_words
from ..quantize_pack.triton import quantize_pack
from ..triton.launch import (
    MOST_REGISTERS,
    UNSPECIALIZED,
    Config,
    check_devices,
    config_for,
    launch,
    launch_options,
    on_hip,
    processors,
)
from ..triton.ranges import range_kind
from . import Product
from .triton_finish import MOST_VECTORS, finish
from .triton_prepared import prepared_weights, zero_code
from .triton_unpack import operand, word_sums

__all__ = [
    "Tiles", "groups_of", "has_heads", "linear", "linear_kernel", "multiply", "pair_tiles", "tiles_of", "unpacks_words",
    "with_registers",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_kernel(  # type: ignore[no-untyped-def]
    x, x_words, w, column_sum, column_term, x_scale, x_offset, multiplier, w_scale, w_offset, bias, row_scale, addend,
    vectors, dots, out, out_scale, out_offset, out_unit, out_multiplier, num_rows, num_items, num_out,
    X_BITS: tl.constexpr, X_BYTES: tl.constexpr, W_ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr, STAGES: tl.constexpr,
    X_SCALE: tl.constexpr, X_OFFSET: tl.constexpr, W_SCALE: tl.constexpr, W_OFFSET: tl.constexpr,
    RELU: tl.constexpr, OUT_BITS: tl.constexpr, OUT_BYTES: tl.constexpr,
    OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr, HEADS: tl.constexpr,
    VECTORS: tl.constexpr, GROUPS: tl.constexpr = 1,
    x2=None, x2_words=None, w2=None, column_sum2=None, column_term2=None, x2_scale=None, x2_offset=None,
    multiplier2=None, w2_scale=None, w2_offset=None, bias2=None,
    X2_BITS: tl.constexpr = 8, X2_BYTES: tl.constexpr = 0, W2_ZERO: tl.constexpr = 0, BLOCK2_B: tl.constexpr = 32,
    X2_SCALE: tl.constexpr = False, X2_OFFSET: tl.constexpr = False, W2_SCALE: tl.constexpr = False,
    W2_OFFSET: tl.constexpr = False,
):  # fmt: skip
    """``y = (((acc sw) + (rowsum lw)) sx) + (colterm lx)``, then the canonical epilogue; with ``x2`` that of a second
    product, of kept weights, is added to it.

    A program has ``BLOCK_N`` output features, of packed output all parts of some bytes, and every so many blocks of
    ``BLOCK_M`` rows, ``num_items`` of them in all.  With ``out_unit`` it has whole rows, and their ranges are multiples
    of the output's.  Columns lie in ``GROUPS``, each with all parts of its bytes, so that warps with columns of their
    own pack without each other.
    """
    out_parts: tl.constexpr = 8 // OUT_BITS if OUT_BITS > 0 else 1
    width: tl.constexpr = BLOCK_N // out_parts
    lane = tl.arange(0, BLOCK_N)
    of_group: tl.constexpr = width // GROUPS
    place = tl.program_id(1) * width + lane // (of_group * out_parts) * of_group + lane % of_group
    column = place
    if OUT_BITS > 0:
        column = lane // of_group % out_parts * OUT_BYTES + place
    if WHOLE:
        column_ok = column >= 0
    elif OUT_BITS > 0:
        column_ok = (place < OUT_BYTES) & (column < num_out)
    else:
        column_ok = column < num_out
    positions: tl.constexpr = 8 // X_BITS * BLOCK_B
    weights = w + column[:, None] * (CHUNKS * positions) + tl.arange(0, positions)[None, :]
    if CHUNKS == 1:
        kept = tl.trans(tl.load(weights, mask=column_ok[:, None], other=0))
    if x2 is not None:
        positions2: tl.constexpr = 8 // X2_BITS * BLOCK2_B
        weights2 = w2 + column[:, None] * positions2 + tl.arange(0, positions2)[None, :]
        kept2 = tl.trans(tl.load(weights2, mask=column_ok[:, None], other=0))
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), num_stages=STAGES):
        row = item * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < num_rows
        other = None
        if x2 is not None:
            acc, row_sum = _kept_product(x2, x2_words, kept2, row, row_ok, X2_BITS, X2_BYTES, BLOCK_M, BLOCK2_B, PTX)
            other = _affine(
                acc, row_sum, row, row_ok, column, column_ok, column_sum2, column_term2, x2_scale, x2_offset,
                multiplier2, w2_scale, w2_offset, X2_BITS, W2_ZERO, X2_SCALE, X2_OFFSET, W2_SCALE, W2_OFFSET,
            )  # fmt: skip
            if bias2 is not None:
                other += tl.load(bias2 + column, mask=column_ok, other=0.0)[None, :]
        if CHUNKS == 1:
            acc, row_sum = _kept_product(x, x_words, kept, row, row_ok, X_BITS, X_BYTES, BLOCK_M, BLOCK_B, PTX)
        else:
            start = row.to(tl.int64)[:, None] * X_BYTES
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            sums = tl.zeros([BLOCK_M, BLOCK_B // 4], tl.int32)
            for chunk in range(CHUNKS):
                tile, words = _input(x, x_words, start, chunk * BLOCK_B, row_ok, X_BYTES, BLOCK_B)
                passing = tl.trans(tl.load(weights + chunk * positions, mask=column_ok[:, None], other=0))
                acc = tl.dot(operand(tile, X_BITS, PTX, BLOCK_M, BLOCK_B), passing, acc, out_dtype=tl.int32)
                sums += word_sums(words, X_BITS)
            row_sum = tl.sum(sums, 1)
        y = _affine(
            acc, row_sum, row, row_ok, column, column_ok, column_sum, column_term, x_scale, x_offset, multiplier,
            w_scale, w_offset, X_BITS, W_ZERO, X_SCALE, X_OFFSET, W_SCALE, W_OFFSET,
        )  # fmt: skip
        finish(
            y, other, row, row_ok, column, column_ok, bias, row_scale, addend, vectors, dots, out, out_scale,
            out_offset, out_unit, out_multiplier, num_rows, num_out, BLOCK_M, width, WHOLE, RELU, OUT_BITS, OUT_BYTES,
            OUT_SCALE, OUT_OFFSET, LARGEST, HEADS, VECTORS, GROUPS,
        )  # fmt: skip


@triton.jit
def _kept_product(  # type: ignore[no-untyped-def]
    x, x_words, kept, row, row_ok, X_BITS: tl.constexpr, X_BYTES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Whole rows times weights that are there, and the sums of the rows' codes."""
    start = row.to(tl.int64)[:, None] * X_BYTES
    tile, words = _input(x, x_words, start, 0, row_ok, X_BYTES, BLOCK_B)
    acc = tl.dot(operand(tile, X_BITS, PTX, BLOCK_M, BLOCK_B), kept, out_dtype=tl.int32)
    return acc, tl.sum(word_sums(words, X_BITS), 1)


@triton.jit
def _affine(  # type: ignore[no-untyped-def]
    acc, row_sum, row, row_ok, column, column_ok, column_sum, column_term, x_scale, x_offset, multiplier, w_scale,
    w_offset, X_BITS: tl.constexpr, W_ZERO: tl.constexpr, X_SCALE: tl.constexpr, X_OFFSET: tl.constexpr,
    W_SCALE: tl.constexpr, W_OFFSET: tl.constexpr,
):  # fmt: skip
    """The values of sums over codes."""
    if W_ZERO != 0:
        acc += (W_ZERO * row_sum)[:, None]
    if X_BITS == 8:
        acc += (128 * tl.load(column_sum + column, mask=column_ok, other=0))[None, :]
    sw, lw = tl.load(w_scale), tl.load(w_offset)
    if W_SCALE:
        sw = tl.load(w_scale + column, mask=column_ok, other=1.0)[None, :]
    if W_OFFSET:
        lw = tl.load(w_offset + column, mask=column_ok, other=0.0)[None, :]
    sx = tl.load(x_scale + row, mask=row_ok, other=1.0)[:, None] if X_SCALE else tl.load(x_scale)
    lx = tl.load(x_offset + row, mask=row_ok, other=0.0)[:, None] if X_OFFSET else tl.load(x_offset)
    if multiplier is not None:
        times = tl.load(multiplier + row, mask=row_ok, other=0).to(tl.float32)[:, None]
        sx, lx = sx * times, lx * times
    y = acc.to(tl.float32) * sw + row_sum.to(tl.float32)[:, None] * lw
    return y * sx + tl.load(column_term + column, mask=column_ok, other=0.0)[None, :] * lx


@triton.jit
def _input(x, x_words, start, first, row_ok, X_BYTES: tl.constexpr, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bytes ``first`` to ``first + BLOCK_B`` of the rows, as bytes and as words; 0 past a row's end."""
    byte = first + tl.arange(0, BLOCK_B)
    word = first // 4 + tl.arange(0, BLOCK_B // 4)
    byte_ok = row_ok[:, None]
    word_ok = byte_ok
    if X_BYTES % BLOCK_B != 0 or X_BYTES == 0:
        byte_ok = byte_ok & (byte < X_BYTES)[None, :]
        word_ok = word_ok & (word < X_BYTES // 4)[None, :]
    tile = tl.load(x + start + byte[None, :], mask=byte_ok, other=0)
    words = tl.load(x_words + start // 4 + word[None, :], mask=word_ok, other=0)
    return tile, words


SMALLEST_K, SMALLEST_N = 32, 16  # of an int8 product
STREAMED = 128  # positions of a chunk where a row's weights are not kept
NARROW = 64  # features of a program that holds more: what is added, or the next chunk
KEPT_ON_HIP = 32 << 10  # bytes of weights: half of the shared memory there is
MOST_AT_ONCE = 256  # input positions beside which the registers hold the values of 64 whole rows
MOST_WEIGHTS = 1 << 17  # of a program that adds up heads as well
ROWS_OF_WARP, ROWS_OF_WARPGROUP = 16, 64  # of a product on Hopper
WIDEST_ROW = 512  # features, with those that fill bytes up, of rows whose peak one program finds


class Tiles(NamedTuple):
    """How one product is cut.

    Attributes:
        block_m: Rows of a turn.
        block_n: Output features of a program.
        block_b: Input bytes of a chunk.
        chunks: Of a row; one where the weights are kept.
        whole: Whether no program has features past the last one.
        columns: Blocks of output features.
    """

    block_m: int
    block_n: int
    block_b: int
    chunks: int
    whole: bool
    columns: int


def row_width(num_out: int, out_bits: int) -> int:
    """Output features of a program that has whole packed rows, those that fill up bytes and powers of two included."""
    return max(SMALLEST_N, parts_per_byte(out_bits) * next_power_of_two(row_bytes(num_out, out_bits)))


def tiles_of(
    config: Config, in_features: int, num_out: int, x_bits: int, out_bits: int, added: bool = False, rows: bool = False
) -> Tiles:
    """The tiles of a product under ``config``: whole rows of weights where they fit, narrower where something is
    ``added``; with ``rows`` whole rows of output, of at most :data:`WIDEST_ROW` features, and fewer where these are
    wider than ``config`` has them.
    """
    parts, width = parts_per_byte(x_bits), row_bytes(in_features, x_bits)
    if rows:
        of_row = row_width(num_out, out_bits)
        fewer = max(1, of_row // config.block_n)
        few = x_bits < BITS_PER_BYTE and parts * width <= MOST_AT_ONCE and fewer == 1
        block_m = config.block_m if few else min(config.block_m, 32)
        if added and parts * width > config.block_k:  # chunks, and what is added, beside the values
            block_m //= 2
        config = replace(config, block_n=of_row, block_m=block_m // fewer, block_k=config.block_k // fewer)
    out_parts = parts_per_byte(out_bits) if out_bits else 1
    places = row_bytes(num_out, out_bits) if out_bits else num_out  # each of them ``out_parts`` features
    row = max(SMALLEST_K // parts, next_power_of_two(width))
    kept = min(config.block_k, KEPT_ON_HIP // config.block_n) if on_hip() else config.block_k
    streamed = parts * row > kept
    block_b = min(kept, STREAMED) // parts if streamed else row
    widest = min(config.block_n, NARROW) if (added or streamed) and not rows else config.block_n
    block_n = max(SMALLEST_N, min(widest, out_parts * next_power_of_two(places)))
    of_program = block_n // out_parts
    whole = places % of_program == 0 and out_parts * places == num_out
    return Tiles(config.block_m, block_n, block_b, max(1, -(-width // block_b)), whole, -(-places // of_program))


def pair_tiles(
    config: Config, inputs: Sequence[tuple[int, int]], num_out: int, out_bits: int, rows: bool
) -> list[Tiles]:
    """The tiles of two products whose sum one program has, of ``inputs`` of so many features of so many bits; none
    where their weights are too many to be kept, or a row of output is too wide.
    """
    if rows and row_width(num_out, out_bits) > config.block_n:
        return []
    found = [tiles_of(config, features, num_out, bits, out_bits) for features, bits in inputs]
    positions = sum(parts_per_byte(bits) * tiles.block_b for (_, bits), tiles in zip(inputs, found, strict=True))
    most = KEPT_ON_HIP // config.block_n if on_hip() else config.block_k
    if any(bits == BITS_PER_BYTE for _, bits in inputs):
        most //= 2
    return found if all(tiles.chunks == 1 for tiles in found) and positions <= most else []


def with_registers(config: Config, tiles: Tiles, x_bits: int) -> Config:
    """``config`` with all registers where shared memory has room for one program of a processor's, or chunks pass."""
    many = parts_per_byte(x_bits) * tiles.block_b > MOST_AT_ONCE
    return replace(config, max_registers=0 if tiles.chunks > 1 else MOST_REGISTERS if many else config.max_registers)


def groups_of(config: Config, tiles: Tiles) -> int:
    """Warpgroups beside each other, each with columns of its own."""
    return max(1, config.num_warps * ROWS_OF_WARP // tiles.block_m) if tiles.block_m >= ROWS_OF_WARPGROUP else 1


def has_heads(in_features: int, x_bits: int, num_out: int, out_bits: int, heads: int, vectors: int) -> bool:
    """Whether a program has whole rows of ``num_out`` features, in their order, and registers for what ``vectors``
    vectors make of their heads.
    """
    width = num_out // heads
    whole = row_width(num_out, out_bits) == num_out <= WIDEST_ROW
    fits = in_features * num_out <= (MOST_WEIGHTS // 2 if x_bits == BITS_PER_BYTE else MOST_WEIGHTS)
    return whole and fits and width & (width - 1) == 0 and 0 < vectors <= MOST_VECTORS


def unpacks_words() -> bool:
    """Whether inline PTX unpacks: not on AMD, and not under the interpreter."""
    return not on_hip() and os.environ.get("TRITON_INTERPRET", "0") != "1"


def linear(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    rows = out_unit is not None
    product = Product(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias, multiplier
    )
    more: dict[str, Any] = {"relu": relu, "row_scale": row_scale, "addend": addend}
    if rows and row_width(w_words.size(0), out_bits) > WIDEST_ROW:
        assert out_scale is not None
        assert out_offset is not None
        y = multiply(product, **more)[0]
        return quantize_pack(y, out_scale, out_offset, out_bits, out_unit)  # a row's peak crosses programs
    out, times, _ = multiply(
        product, **more, out_scale=out_scale, out_offset=out_offset, out_bits=out_bits, out_unit=out_unit
    )
    return out if times is None else (out, times)


def multiply(
    product: Product, *, relu: bool = False, out_scale: Tensor | None = None, out_offset: Tensor | None = None,
    out_bits: int = 0, row_scale: Tensor | None = None, addend: Tensor | None = None, out_unit: Tensor | None = None,
    vectors: Tensor | None = None, heads: int = 1, other: Product | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`linear` in one kernel: rows, their multipliers with ``out_unit``, and dot products of their ``heads`` with
    ``vectors`` where these are given.  Both take whole rows of at most :data:`WIDEST_ROW` features.  The product
    ``other`` is added where :func:`pair_tiles` has tiles for both.
    """
    products = [product] if other is None else [product, other]
    device = check_devices(
        *(t for p in products for t in p if isinstance(t, Tensor)), out_scale, out_offset, row_scale, addend, out_unit,
        vectors,
    )  # fmt: skip
    rows = out_unit is not None or vectors is not None
    num_rows, num_out = product.x_words.size(0), product.w_words.size(0)
    kernel = "linear_pair" if other is not None else "linear_rows" if rows else "linear"
    config = config_for(kernel, device, row_words(product.in_features, product.x_bits))
    if other is None:
        each = [tiles_of(config, product.in_features, num_out, product.x_bits, out_bits, addend is not None, rows)]
    else:
        inputs = [(p.in_features, p.x_bits) for p in products]
        each = pair_tiles(config, inputs, num_out, out_bits, rows)
    tiles = each[0]
    config = with_registers(config, tiles, product.x_bits)
    shape = (num_rows, row_words(num_out, out_bits) if out_bits else num_out)
    out = product.x_words.new_empty(shape, dtype=torch.int32 if out_bits else torch.float32)
    times = product.x_words.new_empty(num_rows, dtype=torch.uint8) if out_unit is not None else None
    number = 0 if vectors is None else vectors.size(0)
    dots = None if vectors is None else product.x_scale.new_empty((number, num_rows, heads))
    if out.numel() == 0:
        return out, None if times is None else times.fill_(1), dots
    rest = {
        "row_scale": row_scale, "addend": addend, "vectors": vectors, "out_scale": out_scale, "out_offset": out_offset,
    }  # fmt: skip
    num_items = triton.cdiv(num_rows, tiles.block_m)
    programs = max(1, processors(device) * config.programs // tiles.columns)
    operands = [_operands(p, t.block_b, place) for p, t, place in zip(products, each, ("", "2"), strict=False)]
    launch(
        linear_kernel, (min(num_items, programs) if tiles.chunks == 1 else num_items, tiles.columns), device,
        **{name: value for of_product in operands for name, value in of_product.items()},
        **{name: None if value is None else value.contiguous() for name, value in rest.items()}, dots=dots,
        out=out.view(torch.int8) if out_bits else out, out_unit=out_unit, out_multiplier=times, num_rows=num_rows,
        num_items=num_items, num_out=num_out,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, CHUNKS=tiles.chunks, WHOLE=tiles.whole,
        PTX=unpacks_words(), STAGES=config.num_stages, RELU=relu,
        OUT_BITS=out_bits, OUT_BYTES=row_bytes(num_out, out_bits) if out_bits else 0,
        OUT_SCALE=range_kind(out_scale), OUT_OFFSET=range_kind(out_offset), LARGEST=LARGEST_MULTIPLIER,
        HEADS=heads, VECTORS=number, GROUPS=1 if number else groups_of(config, tiles),
        **launch_options(config), num_stages=config.num_stages,
    )  # fmt: skip
    return out, times, dots


def _operands(product: Product, block_b: int, place: str) -> dict[str, Any]:
    """Arguments of the kernel for one product: of the first, or of the one in ``place`` 2."""
    x_words, multiplier, bias = product.x_words.contiguous(), product.multiplier, product.bias
    w_scale, w_offset, x_scale, x_offset = product.w_scale, product.w_offset, product.x_scale, product.x_offset
    sizes = (product.in_features, product.x_bits, product.w_bits)
    weights = prepared_weights(product.w_words, w_scale, w_offset, *sizes, block_b)
    tensors = {
        "x": x_words.view(torch.int8), "w": weights.codes, "column_sum": weights.column_sum,
        "column_term": weights.column_term, "multiplier": None if multiplier is None else multiplier.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
    }  # fmt: skip
    return {name + place: value for name, value in tensors.items()} | {
        f"x{place}_words": x_words, f"x{place}_scale": x_scale.contiguous(), f"x{place}_offset": x_offset.contiguous(),
        f"w{place}_scale": w_scale.contiguous(), f"w{place}_offset": w_offset.contiguous(),
        f"X{place}_BITS": product.x_bits, f"X{place}_BYTES": row_bytes(product.in_features, product.x_bits),
        f"W{place}_ZERO": zero_code(product.w_bits), f"BLOCK{place}_B": block_b,
        f"X{place}_SCALE": x_scale.numel() > 1, f"X{place}_OFFSET": x_offset.numel() > 1,
        f"W{place}_SCALE": w_scale.numel() > 1, f"W{place}_OFFSET": w_offset.numel() > 1,
    }  # fmt: skip
