r"""``linear`` on Triton: packed times prepared weights through integer tensor cores.

Weights are bytes (:mod:`.triton_prepared`), made once.  Where those of a column block fit, a program keeps them in
shared memory and walks over the rows; activations are unpacked on the way to the product, never in memory
(:mod:`.triton_unpack`).
8-bit codes do not fit a signed byte and are shifted by :math:`z = 128` on either side; with shifted codes :math:`c'`

.. math:: \sum_k c^x c^w = \sum c'^x c'^w + z_w \sum c^x + z_x \sum c'^w
"""

from __future__ import annotations

import os
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
from .triton_finish import MOST_VECTORS, finish
from .triton_prepared import prepared_weights, zero_code
from .triton_unpack import operand, word_sums

__all__ = ["Tiles", "has_heads", "linear", "linear_kernel", "multiply", "tiles_of", "unpacks_words"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_kernel(  # type: ignore[no-untyped-def]
    x, x_words, w, column_sum, column_term, x_scale, x_offset, multiplier, w_scale, w_offset, bias, row_scale, addend,
    vectors, dots, out, out_scale, out_offset, out_unit, out_multiplier, num_rows, num_items, num_out,
    X_BITS: tl.constexpr, X_BYTES: tl.constexpr, W_ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr, STAGES: tl.constexpr,
    X_SCALE: tl.constexpr, X_OFFSET: tl.constexpr, W_SCALE: tl.constexpr, W_OFFSET: tl.constexpr,
    RELU: tl.constexpr, OUT_BITS: tl.constexpr, OUT_BYTES: tl.constexpr,
    OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr, HEADS: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """``y = (((acc sw) + (rowsum lw)) sx) + (colterm lx)``, then the canonical epilogue.

    A program has ``BLOCK_N`` output features, of packed output all parts of some bytes, and every so many blocks of
    ``BLOCK_M`` rows, ``num_items`` of them in all.  With ``out_unit`` it has whole rows, and their ranges are multiples
    of the output's.
    """
    out_parts: tl.constexpr = 8 // OUT_BITS if OUT_BITS > 0 else 1
    width: tl.constexpr = BLOCK_N // out_parts
    lane = tl.arange(0, BLOCK_N)
    place = tl.program_id(1) * width + lane % width
    column = place
    if OUT_BITS > 0:
        column = lane // width * OUT_BYTES + place
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
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), num_stages=STAGES):
        row = item * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < num_rows
        start = row.to(tl.int64)[:, None] * X_BYTES
        if CHUNKS == 1:
            tile, words = _input(x, x_words, start, 0, row_ok, X_BYTES, BLOCK_B)
            acc = tl.dot(operand(tile, X_BITS, PTX, BLOCK_M, BLOCK_B), kept, out_dtype=tl.int32)
            row_sum = tl.sum(word_sums(words, X_BITS), 1)
        else:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            sums = tl.zeros([BLOCK_M, BLOCK_B // 4], tl.int32)
            for chunk in range(CHUNKS):
                tile, words = _input(x, x_words, start, chunk * BLOCK_B, row_ok, X_BYTES, BLOCK_B)
                passing = tl.trans(tl.load(weights + chunk * positions, mask=column_ok[:, None], other=0))
                acc = tl.dot(operand(tile, X_BITS, PTX, BLOCK_M, BLOCK_B), passing, acc, out_dtype=tl.int32)
                sums += word_sums(words, X_BITS)
            row_sum = tl.sum(sums, 1)
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
        y = y * sx + tl.load(column_term + column, mask=column_ok, other=0.0)[None, :] * lx
        finish(
            y, row, row_ok, column, column_ok, bias, row_scale, addend, vectors, dots, out, out_scale, out_offset,
            out_unit, out_multiplier, num_rows, num_out, BLOCK_M, width, WHOLE, RELU, OUT_BITS, OUT_BYTES, OUT_SCALE,
            OUT_OFFSET, LARGEST, HEADS, VECTORS,
        )  # fmt: skip


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
    product = (x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits)
    more: dict[str, Any] = {
        "bias": bias, "relu": relu, "row_scale": row_scale, "addend": addend, "multiplier": multiplier,
    }  # fmt: skip
    if rows and row_width(w_words.size(0), out_bits) > WIDEST_ROW:
        assert out_scale is not None
        assert out_offset is not None
        y = multiply(*product, **more)[0]
        return quantize_pack(y, out_scale, out_offset, out_bits, out_unit)  # a row's peak crosses programs
    out, times, _ = multiply(
        *product, **more, out_scale=out_scale, out_offset=out_offset, out_bits=out_bits, out_unit=out_unit
    )
    return out if times is None else (out, times)


def multiply(
    x_words: Tensor, w_words: Tensor, x_scale: Tensor, x_offset: Tensor, w_scale: Tensor, w_offset: Tensor,
    in_features: int, x_bits: int, w_bits: int, *, bias: Tensor | None = None, relu: bool = False,
    out_scale: Tensor | None = None, out_offset: Tensor | None = None, out_bits: int = 0,
    row_scale: Tensor | None = None, addend: Tensor | None = None, multiplier: Tensor | None = None,
    out_unit: Tensor | None = None, vectors: Tensor | None = None, heads: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`linear` in one kernel: rows, their multipliers with ``out_unit``, and dot products of their ``heads`` with
    ``vectors`` where these are given.  Both take whole rows of at most :data:`WIDEST_ROW` features.
    """
    device = check_devices(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, bias, out_scale, out_offset, row_scale,
        addend, multiplier, out_unit, vectors,
    )  # fmt: skip
    rows = out_unit is not None or vectors is not None
    num_rows, num_out = x_words.size(0), w_words.size(0)
    config = config_for("linear_rows" if rows else "linear", device, row_words(in_features, x_bits))
    tiles = tiles_of(config, in_features, num_out, x_bits, out_bits, addend is not None, rows)
    if tiles.chunks > 1:
        config = replace(config, max_registers=0)
    shape = (num_rows, row_words(num_out, out_bits) if out_bits else num_out)
    out = x_words.new_empty(shape, dtype=torch.int32 if out_bits else torch.float32)
    times = x_words.new_empty(num_rows, dtype=torch.uint8) if out_unit is not None else None
    number = 0 if vectors is None else vectors.size(0)
    dots = None if vectors is None else x_scale.new_empty((number, num_rows, heads))
    if out.numel() == 0:
        return out, None if times is None else times.fill_(1), dots
    weights = prepared_weights(w_words, w_scale, w_offset, in_features, x_bits, w_bits, tiles.block_b)
    x_words = x_words.contiguous()
    rest = [None if t is None else t.contiguous() for t in (bias, row_scale, addend, vectors)]
    ranges = [None if t is None else t.contiguous() for t in (out_scale, out_offset)]
    num_items = triton.cdiv(num_rows, tiles.block_m)
    programs = max(1, processors(device) * config.programs // tiles.columns)
    launch(
        linear_kernel, (min(num_items, programs) if tiles.chunks == 1 else num_items, tiles.columns), device,
        x_words.view(torch.int8), x_words, weights.codes, weights.column_sum, weights.column_term,
        x_scale.contiguous(), x_offset.contiguous(), None if multiplier is None else multiplier.contiguous(),
        w_scale.contiguous(), w_offset.contiguous(), *rest, dots,
        out.view(torch.int8) if out_bits else out, *ranges, out_unit, times, num_rows, num_items, num_out,
        X_BITS=x_bits, X_BYTES=row_bytes(in_features, x_bits), W_ZERO=zero_code(w_bits),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_B=tiles.block_b, CHUNKS=tiles.chunks, WHOLE=tiles.whole,
        PTX=unpacks_words(), STAGES=config.num_stages,
        X_SCALE=x_scale.numel() > 1, X_OFFSET=x_offset.numel() > 1,
        W_SCALE=w_scale.numel() > 1, W_OFFSET=w_offset.numel() > 1, RELU=relu,
        OUT_BITS=out_bits, OUT_BYTES=row_bytes(num_out, out_bits) if out_bits else 0,
        OUT_SCALE=range_kind(out_scale), OUT_OFFSET=range_kind(out_offset), LARGEST=LARGEST_MULTIPLIER,
        HEADS=heads, VECTORS=number, **launch_options(config), num_stages=config.num_stages,
    )  # fmt: skip
    return out, times, dots
