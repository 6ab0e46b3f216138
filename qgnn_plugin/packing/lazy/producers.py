"""Matrices that are not computed yet: how to compute them by blocks of rows, as floats or as packed codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.backend import backend_for
from ...kernels.cpu.memory import empty
from ...kernels.cpu.parallel import on_every_thread
from ...kernels.linear import Product
from ...kernels.linear_pair import linear_pair
from . import sizes
from .steps import Rows, Step, finished, with_epilogue

__all__ = ["Producer", "gathered", "row_blocks", "with_epilogue"]

Block = tuple[slice, Rows]  # rows, and what they hold

BLOCK_ROWS = 64  # blocks are multiples of it, so that vectorized operations have their tails where whole matrices do


def row_blocks(num_rows: int, num_features: int, device: torch.device) -> Iterator[slice]:
    """Blocks of rows that stay in a cache; on an accelerator, where each would cost a launch, one of all.

    A program that is being traced has one block as well: its number of rows may be any.
    """
    if torch.compiler.is_compiling():
        return iter((slice(0, num_rows),))
    step = max(1, num_rows)
    if device.type == "cpu":
        # As many rows in each, and no rest of a few, which costs as many calls as a block does.
        count = max(1, round(num_rows * num_features / sizes.BLOCK_FLOATS))
        step = max(1, -(-num_rows // (count * BLOCK_ROWS))) * BLOCK_ROWS
    return (slice(start, min(start + step, num_rows)) for start in range(0, max(1, num_rows), step))


def gathered(num_rows: int, blocks: Iterator[Block]) -> Rows:
    """Blocks of rows as one matrix."""
    rows, first = next(blocks)
    if rows.stop == num_rows:
        return first
    out = _room(first, num_rows)
    _put(out, rows, first)
    for rows, part in blocks:
        _put(out, rows, part)
    return out


def _room(block: Rows, num_rows: int) -> Rows:
    """Room for all of ``num_rows`` rows of which ``block`` has some."""
    if isinstance(block, tuple):
        return tuple(_room(part, num_rows) for part in block)
    shape = (num_rows, *block.shape[1:])
    return empty(shape, block.dtype) if block.is_cpu else block.new_empty(shape)


def _put(out: Rows, rows: slice, part: Rows) -> None:
    """``out[rows] = part``, on the CPU by NumPy: torch would wake threads that then spin against the kernels' own."""
    if isinstance(out, tuple):
        for one, its_part in zip(out, part, strict=True):
            _put(one, rows, its_part)
    elif out.device.type == "cpu":
        out.numpy()[rows] = part.numpy()
    else:
        out[rows] = part


def _copied(rows: Tensor) -> Tensor:
    """A copy, in recycled memory."""
    return empty(tuple(rows.shape), rows.dtype).copy_(rows) if rows.is_cpu else rows.clone()


@dataclass(eq=False, slots=True)
class Producer:
    """How to compute a float32 matrix ``[N, F]``.

    Args:
        num_rows: ``N``.
        num_features: ``F``.
        device: Where it is computed.
        run: ``run(start, stop, relu=False, **out)`` gives the rows ``[start, stop)``, as floats or, with a range
            ``out_scale``, ``out_offset`` and ``out_bits``, as packed codes; with ``out_unit`` as a pair, the codes and
            the multipliers of the rows.
        is_fused: Whether packed codes come out of one kernel, without floats in between.
        adds: Whether ``run`` takes another matrix's rows as ``addend``, which it adds before ReLU.
        only_kernels: Whether ``run`` calls nothing but kernels, so that threads may share blocks among them.
        dims: Where the matrix stands for more dimensions, those of a row, ``F`` numbers together.
        taken: ``taken(index)``, the matrix of its rows numbered by ``index``, where these can be computed alone.
        alive: Floats per row that a block of it holds at once, ``F`` where it is 0.
        product: ``product(start, stop)``, the rows ``[start, stop)`` as one product of integers, where they are that.
    """

    num_rows: int
    num_features: int
    device: torch.device
    run: Callable[..., Rows]
    is_fused: bool = True
    adds: bool = False
    only_kernels: bool = False
    dims: tuple[int, ...] = ()
    taken: Callable[[Tensor], Producer] | None = None
    alive: int = 0
    product: Callable[[int, int], Product] | None = None

    @classmethod
    def of(cls, value: Tensor) -> Producer:
        """A matrix that is there already."""

        def run(start: int, stop: int, **out: Any) -> Rows:
            rows = value[start:stop]
            only_packs = out.get("out_bits") and not out.get("relu") and out.get("affine") is None
            return with_epilogue(rows if only_packs else _copied(rows), **out)

        num_rows, num_features = value.shape
        taken = partial(cls.gathering, value)
        return cls(num_rows, num_features, value.device, run, is_fused=False, taken=taken)

    @classmethod
    def gathering(cls, value: Tensor, index: Tensor) -> Producer:
        """The rows ``index`` ``[M]`` of a matrix that is there already."""

        def run(start: int, stop: int, **out: Any) -> Rows:
            # By the operation itself, which no mode takes for another gather of the model's.
            return with_epilogue(torch.ops.aten.index_select.default(value, 0, index[start:stop]), **out)

        def taken(rows: Tensor) -> Producer:
            return cls.gathering(value, index[rows])

        return cls(index.numel(), value.size(1), value.device, run, is_fused=False, taken=taken)

    def take(self, index: Tensor) -> Tensor:
        """Some rows, as floats, where ``taken`` is there: numbers of blocks have their tails as those of all rows."""
        assert self.taken is not None
        count = index.numel()
        padded = torch.cat([index, index[-1:].expand(-count % BLOCK_ROWS)])
        value: Tensor = self.taken(padded).run(0, padded.numel())
        return value[:count]

    def __call__(self, **epilogue: Any) -> Rows:
        """The whole matrix; ``epilogue`` as that of ``run``."""
        # What is being traced has one block, and a comparison with its size would bound the program's number of rows.
        if self.is_fused or torch.compiler.is_compiling() or self._is_one_block:
            return self.run(0, self.num_rows, **epilogue)
        if self.only_kernels and backend_for(self.device) == "cpu":
            return self._shared_out(**epilogue)
        return gathered(self.num_rows, self.blocks(**epilogue))

    def whole(self) -> Tensor:
        """The float matrix in its own dimensions."""
        value: Tensor = self()
        return value.view(-1, *self.dims) if self.dims else value

    @property
    def _is_one_block(self) -> bool:
        return self.num_rows * self.num_features <= sizes.BLOCK_FLOATS // 2 and self.num_rows > 0

    def blocks(self, **epilogue: Any) -> Iterator[Block]:
        """The matrix by blocks of rows (see :func:`row_blocks`)."""
        for rows in self.row_blocks():
            yield rows, self.run(rows.start, rows.stop, **epilogue)

    def row_blocks(self) -> Iterator[slice]:
        """The rows of its blocks."""
        return row_blocks(self.num_rows, self.alive or self.num_features, self.device)

    def _shared_out(self, **epilogue: Any) -> Rows:
        """The matrix, each block of it by one thread."""
        blocks = row_blocks(self.num_rows, self.num_features, self.device)
        rows = next(blocks)
        first = self.run(rows.start, rows.stop, **epilogue)
        if rows.stop == self.num_rows:
            return first
        out = _room(first, self.num_rows)
        _put(out, rows, first)
        rest = iter(list(blocks))  # unlike a generator, it may be advanced by several threads

        def work() -> None:
            for rows in rest:
                _put(out, rows, self.run(rows.start, rows.stop, **epilogue))

        on_every_thread(work)
        return out

    def then(self, *steps: Step) -> Producer:
        """With ``steps``, which treat every row for itself, applied to the floats; a ReLU first is the kernel's own."""
        relu = steps[:1] == (torch.relu,)
        left = steps[relu:]

        def run(start: int, stop: int, **out: Any) -> Rows:
            return finished(self.run(start, stop, relu=relu), left, **out)

        taken = None if self.taken is None else lambda index: self.taken(index).then(*steps)  # type: ignore[misc]
        return replace(self, run=run, is_fused=False, adds=False, only_kernels=False, taken=taken, product=None)

    def plus(self, other: Producer) -> Producer:
        """The sum of both matrices, neither of which is written as a whole where the sum is packed."""
        if not other.adds:
            return self.combined(other, Tensor.add_)
        mine, its = self.product, other.product

        def run(start: int, stop: int, **out: Any) -> Rows:
            # On the CPU floats of a block stay in the cache.  Compilers follow no context variables.
            on = self.device.type if torch.compiler.is_compiling() else backend_for(self.device)
            if mine is not None and its is not None and on != "cpu":
                return linear_pair(its(start, stop), mine(start, stop), **out)
            return other.run(start, stop, addend=self.run(start, stop), **out)

        whole = self.combined(other, Tensor.add_)
        return replace(whole, run=run, only_kernels=all(part.is_fused or part.only_kernels for part in (self, other)))

    def combined(self, other: Producer, onto: Callable[..., Tensor]) -> Producer:
        """``onto`` of the rows of both, in place of the first; one of them may have one column."""
        wide, narrow = (self, other) if self.num_features >= other.num_features else (other, self)

        def run(start: int, stop: int, **out: Any) -> Rows:
            return with_epilogue(onto(wide.run(start, stop), narrow.run(start, stop)), **out)

        def taken(index: Tensor) -> Producer:
            return wide.taken(index).combined(narrow.taken(index), onto)  # type: ignore[misc]

        both = None if wide.taken is None or narrow.taken is None else taken
        return Producer(self.num_rows, wide.num_features, self.device, run, is_fused=False, taken=both)
