"""``head_dots`` on the CPU: a row's dot products from where it lies, sixteen features at a time."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..cpu import jit
from ..cpu.dots import dot_row
from ..cpu.memory import empty
from ..cpu.parallel import even_chunks, run_chunks
from ..cpu.simd import atomic_add, raw_at

__all__ = ["dot_rows", "head_dots"]


@jit.kernel
def dot_rows(x_at, first, count, rows, width, heads, vectors_at, vectors, out_at):
    """Dot products of the rows ``[first, first + count)`` of ``[rows, heads * width]`` floats; all by addresses."""
    x, given, out = raw_at(x_at, np.float32), raw_at(vectors_at, np.float32), raw_at(out_at, np.float32)
    for i in range(first, first + count):
        dot_row(x, i * heads * width, width, heads, given, vectors, out, i * heads, rows * heads)


@jit.kernel
def _kernel(x_at, rows, width, heads, vectors_at, vectors, out_at, bounds, counter):
    while True:
        chunk = atomic_add(counter, 0, 1)
        if chunk >= bounds.size - 1:
            break
        first = bounds[chunk]
        dot_rows(x_at, first, bounds[chunk + 1] - first, rows, width, heads, vectors_at, vectors, out_at)


def head_dots(x: Tensor, vectors: Tensor, heads: int) -> Tensor:
    (rows, width), x, vectors = x.shape, x.contiguous(), vectors.contiguous()
    out = empty((vectors.size(0), rows, heads), torch.float32)
    if out.numel():
        run_chunks(
            _kernel, even_chunks(rows, 1 + vectors.size(0) * width // 32), x.data_ptr(), rows, width // heads,
            heads, vectors.data_ptr(), vectors.size(0), out.data_ptr(),
        )  # fmt: skip
    return out
