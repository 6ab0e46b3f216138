"""The inner loops over a row's edges; every kernel that walks a graph is built from these.

A program holds ``ROWS`` rows of up to 256 edges each (:mod:`.schedule`), and every thread keeps its
own words of its own row: no loop crosses threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import (
    field_floats,
    field_max,
    isolate,
    isolated_part,
    load_words,
    nibbles,
    row_magic,
    select_part,
    spread,
    sums_by_part,
)

__all__ = [
    "entry_features", "gather_words", "heads_part", "max_codes", "per_code", "spread_heads",
    "sum_codes", "sum_heads", "sum_multiplied", "sum_slots", "sum_weighted",
]  # fmt: skip


@triton.jit
def entry_features(word, W: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Feature of each entry of ``isolate``, ``[WORDS, 32 / BITS]``."""
    entry = tl.arange(0, 32 // BITS)[None, :]
    return entry // 4 * (4 * W) + 4 * word[:, None] + entry % 4


@triton.jit
def gather_words(words, source, ok, word, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """The word tile of one edge per row; zeros where the row has no such edge."""
    pointers = words + (source.to(tl.int64) * W)[:, None] + word[None, :]
    return load_words(pointers, ok[:, None] & (word < W)[None, :])


@triton.jit
def sum_codes(  # type: ignore[no-untyped-def]
    words, edge, length, longest, word,
    W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums of codes over at most 256 edges, exact, in the form of ``sums_by_part``.

    Codes are added where they lie.  ``UNROLL`` words meet in fields of ``EARLY`` bits, up to
    ``RUN`` edges in lanes of ``LANE`` bits, all of them in 16 bits; each bound keeps its fields
    from overflowing: ``4 Q < 2^EARLY``, ``RUN Q < 2^LANE``, ``256 * 255 < 2^16``.
    """
    EARLY: tl.constexpr = 4 if BITS == 1 else 2 * BITS
    LANE: tl.constexpr = 16 if BITS == 8 else 8
    RUN: tl.constexpr = 256 if BITS == 8 else 255 // ((1 << BITS) - 1) // 4 * 4
    tl.static_assert(UNROLL <= 4)
    zero = tl.zeros([ROWS, WORDS], tl.uint32)
    total = spread(zero, BITS, 16)
    for first in range(0, longest, RUN):
        lanes = spread(zero, BITS, LANE)
        next_edge = edge + first  # a pointer of its own leaves the counter, and comparisons with it, at 32 bits
        for k in range(first, tl.minimum(first + RUN, longest), UNROLL):
            early = spread(zero, BITS, EARLY)
            for u in tl.static_range(UNROLL):
                ok = k + u < length
                source = tl.load(next_edge + u, mask=ok, other=0)
                early += spread(gather_words(words, source, ok, word, W), BITS, EARLY)
            next_edge += UNROLL
            lanes += spread(early, EARLY, LANE)
        total += spread(lanes, LANE, 16)
    return sums_by_part(total, BITS, ROWS, WORDS)


@triton.jit
def max_codes(  # type: ignore[no-untyped-def]
    words, edge, length, longest, word,
    W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Largest codes in the form of ``isolate``, 0 without edges; they are compared where they lie."""
    best = tl.zeros([ROWS, WORDS], tl.uint32)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(edge + (k + u), mask=ok, other=0)
            best = field_max(best, gather_words(words, source, ok, word, W), BITS)
    return isolate(best, BITS, ROWS, WORDS)


@triton.jit
def spread_heads(  # type: ignore[no-untyped-def]
    value, word, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, HEADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Values per head, ``[ROWS, HEAD_TILE]``, for the codes of each word: ``[ROWS, WORDS or 1, N]``.

    ``N`` is 1 for one head; the parts of a byte where heads are ``ALIGNED`` (whole parts, or equal
    runs of words in every part: a matter of reshaping); else every code, in the order of
    ``isolate``, chosen head by head.
    """
    parts: tl.constexpr = 8 // BITS
    if HEADS == 1:
        value = value[:, :, None]
    elif ALIGNED:
        if parts >= HEADS:
            value = tl.broadcast_to(value[:, :, None], [ROWS, HEADS, parts // HEADS])
            value = tl.reshape(value, [ROWS, 1, parts])
        else:
            share: tl.constexpr = HEADS // parts  # heads that share a part
            value = tl.permute(tl.reshape(value, [ROWS, parts, share]), (0, 2, 1))[:, :, None, :]
            value = tl.broadcast_to(value, [ROWS, share, WORDS // share, parts])
            value = tl.reshape(value, [ROWS, WORDS, parts])
    else:
        head_of = (entry_features(word, W, BITS) // (F // HEADS))[None, :, :]
        head = tl.arange(0, value.shape[1])[None, :]
        tile = tl.zeros([ROWS, WORDS, 4 * parts], value.dtype)
        for h in tl.static_range(HEADS):
            one = tl.sum(tl.where(head == h, value, 0), 1).to(value.dtype)
            tile = tl.where(head_of == h, one[:, None, None], tile)
        value = tile
    return value


@triton.jit
def sum_heads(  # type: ignore[no-untyped-def]
    terms, word, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums of ``[ROWS, WORDS, 32 / BITS]`` over the features of each head: ``[ROWS, HEAD_TILE]``."""
    parts: tl.constexpr = 8 // BITS
    if HEADS == 1:
        value = tl.sum(tl.sum(terms, 2), 1)[:, None]
    elif ALIGNED:
        if parts >= HEADS:
            terms = tl.reshape(terms, [ROWS, WORDS, HEADS, 4 * parts // HEADS])
            value = tl.sum(tl.sum(terms, 3), 1)
        else:
            share: tl.constexpr = HEADS // parts
            terms = tl.sum(tl.reshape(terms, [ROWS, share, WORDS // share, parts, 4]), 4)
            value = tl.reshape(tl.permute(tl.sum(terms, 2), (0, 2, 1)), [ROWS, HEADS])
    else:
        head_of = (entry_features(word, W, BITS) // (F // HEADS))[None, :, :]
        head = tl.arange(0, HEAD_TILE)[None, :]
        value = tl.zeros([ROWS, HEAD_TILE], tl.float32)
        for h in tl.static_range(HEADS):
            one = tl.sum(tl.sum(tl.where(head_of == h, terms, 0.0), 2), 1)
            value = tl.where(head == h, one[:, None], value)
    return value


@triton.jit
def per_code(tile, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What :func:`spread_heads` returns, for every code in the order of ``isolate``."""
    codes: tl.constexpr = 32 // BITS
    if tile.shape[2] > 1 and tile.shape[2] < codes:
        tile = tl.broadcast_to(tile[:, :, :, None], [ROWS, tile.shape[1], codes // 4, 4])
        tile = tl.reshape(tile, [ROWS, tile.shape[1], codes])
    return tl.broadcast_to(tile, [ROWS, WORDS, codes])


@triton.jit
def heads_part(tile, part: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One part of what :func:`spread_heads` returns: ``[ROWS, 4 * WORDS or 1]``."""
    parts: tl.constexpr = 8 // BITS
    if tile.shape[1] * tile.shape[2] == 1:
        tile, _ = isolated_part(per_code(tile, BITS, ROWS, WORDS), part, BITS, ROWS, WORDS)
    elif tile.shape[2] == parts:
        tile = select_part(tile, part, parts)
        if tile.shape[1] > 1:
            tile = tl.broadcast_to(tile[:, :, None], [ROWS, WORDS, 4])
            tile = tl.reshape(tile, [ROWS, 4 * WORDS])
    else:
        tile, _ = isolated_part(tile, part, BITS, ROWS, WORDS)
    return tile


@triton.jit
def sum_weighted(  # type: ignore[no-untyped-def]
    words, edge, begin, length, longest, word, weight, scale, offset, magic,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr,
    ROW_SCALE: tl.constexpr, ROW_OFFSET: tl.constexpr,
):  # fmt: skip
    """``sum w s_j c_j`` in the form of ``isolate`` and ``sum w l_j`` per head, in float32.

    ``s_j`` and ``l_j`` are the range of the source row, or 1 where the range is not per row.
    """
    head = tl.arange(0, HEAD_TILE)[None, :]
    two_23 = row_magic(magic, length)
    total = tl.zeros([ROWS, WORDS, 32 // BITS], tl.float32)
    mass = tl.zeros([ROWS, HEAD_TILE], tl.float32)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(edge + (k + u), mask=ok, other=0)
            fields = isolate(gather_words(words, source, ok, word, W), BITS, ROWS, WORDS)
            if weight is None:
                factor = tl.where(ok, 1.0, 0.0)[:, None]
            else:
                at = weight + (begin + (k + u))[:, None] * HEADS + head
                factor = tl.load(at, mask=ok[:, None] & (head < HEADS), other=0.0)
            if ROW_OFFSET:
                mass += factor * tl.load(offset + source, mask=ok, other=0.0)[:, None]
            else:
                mass += factor
            if ROW_SCALE:
                factor = factor * tl.load(scale + source, mask=ok, other=0.0)[:, None]
            factor = spread_heads(factor, word, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
            values = field_floats(fields, two_23)
            total = tl.fma(per_code(factor, BITS, ROWS, WORDS), values, total)
    return total, mass


@triton.jit
def sum_multiplied(  # type: ignore[no-untyped-def]
    words, edge, length, longest, word, multiplier,
    W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """``sum m c`` in the form of ``multiplied_part`` and ``sum m``, ``[ROWS]``, over at most 256 edges, exact.

    Two codes share a product where they are narrower than a byte, each in 16 bits: what :func:`nibbles` leaves of a
    code in place is at most 15, and ``256 * 15 * 15 < 2^16``.  Bytes have a product each.
    """
    if BITS == 8:
        total = tl.zeros([ROWS, WORDS, 4], tl.uint32)  # codes in place are below 2^16, and 256 * 15 * 2^16 < 2^32
    else:
        total = tl.zeros([ROWS, 2 * WORDS, 8 // BITS], tl.uint32)
    mass = tl.zeros([ROWS], tl.int32)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(edge + (k + u), mask=ok, other=0)
            factor = tl.load(multiplier + source, mask=ok, other=0).to(tl.int32)
            mass += factor
            tile = gather_words(words, source, ok, word, W)
            fields = isolate(tile, BITS, ROWS, WORDS) if BITS == 8 else nibbles(tile, BITS, ROWS, WORDS)
            total += fields * factor.to(tl.uint32)[:, None, None]
    return total, mass


@triton.jit
def sum_slots(  # type: ignore[no-untyped-def]
    source, count, stride: tl.constexpr, kind: tl.constexpr, SLOTS: tl.constexpr,
    N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum ``count`` partial results of ``N`` values, in the order of their slots: ``[1, TILE]``."""
    column = tl.arange(0, TILE)
    total = tl.zeros([SLOTS, TILE], kind)
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        ok = (slot < count)[:, None] & (column < N)[None, :]
        total += tl.load(source + (slot.to(tl.int64) * stride)[:, None] + column[None, :], mask=ok, other=0)
    return tl.sum(total, 0)[None, :]
