"""The inner loops over a row's edges; every kernel that walks a graph is built from these.

A program holds ``ROWS`` rows of up to 256 edges each (:mod:`.schedule`), and every thread keeps its
own words of its own row: no loop crosses threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import by_feature, field_floats, isolate, isolated_by_feature, load_words, spread

__all__ = ["gather_words", "head_tile", "max_codes", "select_head", "sum_codes", "sum_weighted"]


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
    """Sums of codes over at most 256 edges, exact: a feature tile of int32.

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
        for k in range(first, tl.minimum(first + RUN, longest), UNROLL):
            early = spread(zero, BITS, EARLY)
            for u in tl.static_range(UNROLL):
                ok = k + u < length
                source = tl.load(edge + (k + u), mask=ok, other=0)
                early += spread(gather_words(words, source, ok, word, W), BITS, EARLY)
            lanes += spread(early, EARLY, LANE)
        total += spread(lanes, LANE, 16)
    return by_feature(spread(total, 16, 32), BITS, ROWS, WORDS).to(tl.int32)


@triton.jit
def max_codes(  # type: ignore[no-untyped-def]
    words, edge, length, longest, word,
    W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Largest codes, still shifted by ``field_shift``: a feature tile of int32, 0 without edges."""
    best = isolate(tl.zeros([ROWS, WORDS], tl.uint32), BITS, ROWS, WORDS)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(edge + (k + u), mask=ok, other=0)
            tile = gather_words(words, source, ok, word, W)
            best = tl.maximum(best, isolate(tile, BITS, ROWS, WORDS))
    return isolated_by_feature(best, BITS, ROWS, WORDS).to(tl.int32)


@triton.jit
def head_tile(  # type: ignore[no-untyped-def]
    word, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    HEADS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """``[1, WORDS or 1, SPAN]``: the head of each code of a word, in the order of ``isolate``.

    ``SPAN`` is 1 for one head, the parts of a byte where heads are whole words wide or whole
    parts, else every code of the word.
    """
    entry = tl.arange(0, SPAN)[None, :]
    column = word[:, None]
    width: tl.constexpr = F // HEADS
    if HEADS == 1:
        head = entry
    elif SPAN == 8 // BITS:
        if width % (4 * W) == 0:
            head = entry // (width // (4 * W))
        else:
            head = (entry * (4 * W) + 4 * column) // width
    else:
        head = (entry // 4 * (4 * W) + 4 * column + entry % 4) // width
    return head[None, :, :]


@triton.jit
def select_head(tile, head_of, head: tl.constexpr, value, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``tile`` with ``value`` (one per row) where ``head_of`` is ``head``."""
    if HEADS == 1:
        tile = tl.broadcast_to(value[:, None, None], tile.shape)
    else:
        tile = tl.where(head_of == head, value[:, None, None], tile)
    return tile


@triton.jit
def per_code(tile, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Repeat ``[ROWS, WORDS or 1, SPAN]`` over the codes of a word: ``[.., .., 32 / BITS]``."""
    codes: tl.constexpr = 32 // BITS
    if SPAN > 1 and codes > SPAN:
        wide = tl.broadcast_to(tile[:, :, :, None], [ROWS, tile.shape[1], SPAN, codes // SPAN])
        tile = tl.reshape(wide, [ROWS, tile.shape[1], codes])
    return tl.broadcast_to(tile, [ROWS, WORDS, codes])


@triton.jit
def sum_weighted(  # type: ignore[no-untyped-def]
    words, edge, begin, length, longest, word, weight, scale, offset,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr, HEADS: tl.constexpr, SPAN: tl.constexpr,
    ROW_SCALE: tl.constexpr, ROW_OFFSET: tl.constexpr,
):  # fmt: skip
    """``sum w s_j c_j`` (still shifted) and ``sum w l_j`` in float32: two feature tiles.

    ``s_j`` and ``l_j`` are the range of the source row, or 1 where the range is not per row.
    """
    codes: tl.constexpr = 32 // BITS
    head_of = head_tile(word, F, W, BITS, WORDS, HEADS, SPAN)
    total = tl.zeros([ROWS, WORDS, codes], tl.float32)
    offsets = tl.zeros([ROWS, head_of.shape[1], SPAN], tl.float32)
    for k in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            ok = k + u < length
            source = tl.load(edge + (k + u), mask=ok, other=0)
            fields = isolate(gather_words(words, source, ok, word, W), BITS, ROWS, WORDS)
            factor = tl.zeros([ROWS, head_of.shape[1], SPAN], tl.float32)
            if weight is None:
                factor = factor + tl.where(ok, 1.0, 0.0)[:, None, None]
            else:
                for h in tl.static_range(HEADS):
                    value = tl.load(weight + (begin + (k + u)) * HEADS + h, mask=ok, other=0.0)
                    factor = select_head(factor, head_of, h, value, HEADS)
            if ROW_OFFSET:
                offsets += factor * tl.load(offset + source, mask=ok, other=0.0)[:, None, None]
            else:
                offsets += factor
            if ROW_SCALE:
                factor = factor * tl.load(scale + source, mask=ok, other=0.0)[:, None, None]
            total = tl.fma(per_code(factor, BITS, ROWS, WORDS, SPAN), field_floats(fields), total)
    spread_offsets = per_code(offsets, BITS, ROWS, WORDS, SPAN)
    return (
        isolated_by_feature(total, BITS, ROWS, WORDS),
        isolated_by_feature(spread_offsets, BITS, ROWS, WORDS),
    )
