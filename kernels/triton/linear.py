r"""``linear`` on Triton: packed times packed through integer tensor cores.

Codes are unpacked on the way to the product, never in memory.  8-bit codes do not fit a signed
byte, so they are shifted by :math:`z = 128`; with shifted codes :math:`c'` over ``K'`` positions
(padding included, whose code is 0)

.. math:: \sum_k c^x c^w = \sum c'^x c'^w + z_w \sum c'^x + z_x \sum c'^w + z_x z_w K'

and row and column sums come out of the same tensor cores, as products with ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import row_bytes, row_words
from .bits import load_range, quantize, relu
from .launch import UNSPECIALIZED, Config, check_devices, config_for, launch, launch_options
from .ranges import range_kind

__all__ = ["linear", "linear_kernel"]

ONES = tl.constexpr(16)  # the least extent of a tensor-core product


@triton.jit
def _codes(  # type: ignore[no-untyped-def]
    rows, row, row_ok, first,
    K: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Shifted codes of the features ``first`` to ``first + BLOCK_K``, ``[rows, BLOCK_K]`` int8."""
    if B % BLOCK_K == 0:  # the block lies in one part of the bytes: a plain, vectorized load
        byte = tl.multiple_of(first % B, BLOCK_K) + tl.arange(0, BLOCK_K)
        shift = first // B * BITS
    else:
        feature = first + tl.arange(0, BLOCK_K)
        byte = feature % B
        shift = feature // B * BITS
        shift = tl.where(shift < 8, shift, 7)[None, :]  # past the row's end; masked below
    feature = first + tl.arange(0, BLOCK_K)
    ok = row_ok[:, None]
    if K % BLOCK_K != 0:
        ok = ok & (feature < K)[None, :]
    value = tl.load(rows + row.to(tl.int64)[:, None] * B + byte[None, :], mask=ok, other=0)
    if BITS == 8:
        return (value.to(tl.int32) - 128).to(tl.int8)
    return ((value.to(tl.int32) >> shift) & ((1 << BITS) - 1)).to(tl.int8)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_kernel(  # type: ignore[no-untyped-def]
    x, w, x_scale, x_offset, w_scale, w_offset, bias, row_scale, addend, out, out_scale,
    out_offset, num_rows, num_out,
    K: tl.constexpr, X_BITS: tl.constexpr, W_BITS: tl.constexpr, X_BYTES: tl.constexpr,
    W_BYTES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_SCALE: tl.constexpr, X_OFFSET: tl.constexpr, W_SCALE: tl.constexpr, W_OFFSET: tl.constexpr,
    RELU: tl.constexpr, OUT_BITS: tl.constexpr, OUT_BYTES: tl.constexpr,
    OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr,
):  # fmt: skip
    """``y = (((acc sw) + (rowsum lw)) sx) + (colterm lx)``, then the canonical epilogue."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < num_rows
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < num_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    row_acc = tl.zeros([BLOCK_M, ONES], tl.int32)
    column_acc = tl.zeros([ONES, BLOCK_N], tl.int32)
    ones_k = tl.full([BLOCK_K, ONES], 1, tl.int8)
    k_ones = tl.full([ONES, BLOCK_K], 1, tl.int8)
    for first in range(0, K, BLOCK_K):
        a = _codes(x, row, row_ok, first, K, X_BITS, X_BYTES, BLOCK_K)
        b = tl.trans(_codes(w, column, column_ok, first, K, W_BITS, W_BYTES, BLOCK_K))
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        row_acc = tl.dot(a, ones_k, row_acc, out_dtype=tl.int32)
        column_acc = tl.dot(k_ones, b, column_acc, out_dtype=tl.int32)
    x_zero: tl.constexpr = 128 if X_BITS == 8 else 0
    w_zero: tl.constexpr = 128 if W_BITS == 8 else 0
    positions: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    row_sum = tl.max(row_acc, 1)  # all entries of a row are equal
    column_sum = tl.max(column_acc, 0)
    acc += (w_zero * row_sum)[:, None] + (x_zero * column_sum)[None, :]
    acc += x_zero * w_zero * positions
    row_sum = (row_sum + x_zero * positions).to(tl.float32)
    column_sum = (column_sum + w_zero * positions).to(tl.float32)
    sw = tl.load(w_scale + column, mask=column_ok, other=1.0) if W_SCALE else tl.load(w_scale)
    lw = tl.load(w_offset + column, mask=column_ok, other=0.0) if W_OFFSET else tl.load(w_offset)
    sx = tl.load(x_scale + row, mask=row_ok, other=1.0)[:, None] if X_SCALE else tl.load(x_scale)
    lx = tl.load(x_offset + row, mask=row_ok, other=0.0)[:, None] if X_OFFSET else tl.load(x_offset)
    column_term = column_sum * sw + lw * (K * 1.0)
    if W_SCALE:
        sw = sw[None, :]
    if W_OFFSET:
        lw = lw[None, :]
    y = acc.to(tl.float32) * sw + row_sum[:, None] * lw
    y = y * sx + column_term[None, :] * lx
    _finish(
        y, row, row_ok, column, column_ok, bias, row_scale, addend, out, out_scale, out_offset,
        num_rows, num_out, BLOCK_M, BLOCK_N, RELU, OUT_BITS, OUT_BYTES, OUT_SCALE, OUT_OFFSET,
    )  # fmt: skip


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    y, row, row_ok, column, column_ok, bias, row_scale, addend, out, out_scale, out_offset,
    num_rows, num_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RELU: tl.constexpr, OUT_BITS: tl.constexpr,
    OUT_BYTES: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Bias, ReLU, the row's factor and either floats or, where all parts of the bytes are in this tile, codes."""
    if bias is not None:
        y = y + tl.load(bias + column, mask=column_ok, other=0.0)[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    row64 = row.to(tl.int64)[:, None]
    if addend is not None:
        y = y + tl.load(addend + row64 * num_out + column[None, :], mask=ok, other=0.0)
    if RELU:
        y = relu(y)
    if row_scale is not None:
        y = y * tl.load(row_scale + row, mask=row_ok, other=0.0)[:, None]
    if OUT_BITS == 0:
        tl.store(out + row64 * num_out + column[None, :], y, mask=ok)
    else:
        parts: tl.constexpr = 8 // OUT_BITS
        scale = load_range(out_scale, OUT_SCALE, row, row_ok, column[None, :], column_ok[None, :])
        start = load_range(out_offset, OUT_OFFSET, row, row_ok, column[None, :], column_ok[None, :])
        tile = tl.reshape(y, [BLOCK_M, 1, BLOCK_N])
        codes = tl.where(ok[:, None, :], quantize(tile, scale, start, OUT_BITS), 0)
        codes = tl.reshape(codes, [BLOCK_M, parts, BLOCK_N // parts])
        lanes = tl.sum(codes << (OUT_BITS * tl.arange(0, parts))[None, :, None], 1)
        byte = tl.arange(0, BLOCK_N // parts)[None, :]
        tl.store(out + row64 * OUT_BYTES + byte, lanes.to(tl.int8), mask=row_ok[:, None])


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
) -> Tensor:
    device = check_devices(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, bias, out_scale, out_offset, row_scale,
        addend,
    )  # fmt: skip
    num_rows, num_out = x_words.size(0), w_words.size(0)
    config = fitted(config_for("linear", device, row_words(in_features, x_bits)), in_features, x_bits, w_bits)
    packs = out_bits != 0 and packs_in_tile(num_out, out_bits)
    if out_bits and not packs:
        from .quantize_pack import quantize_pack

        y = linear(
            x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits,
            bias, relu, row_scale=row_scale, addend=addend,
        )  # fmt: skip
        assert out_scale is not None
        assert out_offset is not None
        return quantize_pack(y, out_scale, out_offset, out_bits)
    block_n = num_out if packs else config.block_n
    block_m = max(SMALLEST_BLOCK_M, min(config.block_m, config.block_m * config.block_n // block_n))
    shape = (num_rows, row_words(num_out, out_bits) if packs else num_out)
    out = x_words.new_empty(shape, dtype=torch.int32 if packs else torch.float32)
    x, w = x_words.contiguous().view(torch.int8), w_words.contiguous().view(torch.int8)
    launch(
        linear_kernel,
        (triton.cdiv(num_rows, block_m), triton.cdiv(num_out, block_n)), device,
        x, w, x_scale.contiguous(), x_offset.contiguous(), w_scale.contiguous(),
        w_offset.contiguous(), None if bias is None else bias.contiguous(),
        None if row_scale is None else row_scale.contiguous(),
        None if addend is None else addend.contiguous(),
        out.view(torch.int8) if packs else out, out_scale, out_offset, num_rows, num_out,
        K=in_features, X_BITS=x_bits, W_BITS=w_bits, X_BYTES=row_bytes(in_features, x_bits),
        W_BYTES=row_bytes(in_features, w_bits), BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        X_SCALE=x_scale.numel() > 1, X_OFFSET=x_offset.numel() > 1,
        W_SCALE=w_scale.numel() > 1, W_OFFSET=w_offset.numel() > 1, RELU=relu,
        OUT_BITS=out_bits if packs else 0, OUT_BYTES=row_bytes(num_out, out_bits) if packs else 0,
        OUT_SCALE=range_kind(out_scale), OUT_OFFSET=range_kind(out_offset),
        **launch_options(config), num_stages=config.num_stages,
    )  # fmt: skip
    return out


MAX_PACKED_OUT = 256
SMALLEST_BLOCK_M, SMALLEST_BLOCK_K = 16, 32  # of an int8 product


def fitted(config: Config, in_features: int, x_bits: int, w_bits: int) -> Config:
    """``config`` for what threads must hold: bytes at 8 bits, and positions where blocks are no plain loads, take
    registers of their own.
    """
    if any(row_bytes(in_features, bits) % config.block_k for bits in (x_bits, w_bits)):
        return replace(config, block_k=SMALLEST_BLOCK_K, block_m=max(SMALLEST_BLOCK_M, config.block_m // 2))
    return replace(config, block_k=SMALLEST_BLOCK_K) if max(x_bits, w_bits) == 8 else config


def packs_in_tile(num_out: int, out_bits: int) -> bool:
    """Whether one tile spans all output features, so that it can pack them: the parts of a byte lie
    far apart.
    """
    return 16 <= num_out <= MAX_PACKED_OUT and num_out & (num_out - 1) == 0 and num_out * out_bits % 32 == 0
