"""Runs row programs by the kernels that are written for them, or by their reference in torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backend import backend_for
from ..layout import row_words
from ..plan import GraphPlan
from .program import Operand, Product, Program, Unsupported, reference

__all__ = ["NotFinite", "can_run", "row_program"]

Arrays = Sequence[Tensor]


class NotFinite(ValueError):
    """What a linear map was to be applied to has NaN or infinity; ``product`` is its number."""

    def __init__(self, product: int) -> None:
        super().__init__("Expected finite values in a linear map of edges (got NaN or infinity); check the features")
        self.product = product


@lru_cache(maxsize=256)
def _cpu_kernel(program: Program) -> Any:
    from .cpu import write_source
    from .store import load_kernel

    return load_kernel(write_source(program))


@lru_cache(maxsize=256)
def _triton_kernel(program: Program) -> Any:
    from .store import load_kernel
    from .triton import write_triton

    return load_kernel(write_triton(program))


KERNELS = {"cpu": _cpu_kernel, "triton": _triton_kernel, "interpret": _triton_kernel}


def can_run(program: Program, device: torch.device) -> str | None:
    """Why there is no kernel of ``program`` for ``device``; :obj:`None` where there is one."""
    backend = backend_for(device)
    if backend not in KERNELS:
        return f"no generated kernels on the backend '{backend}'"
    try:
        KERNELS[backend](program)
    except Unsupported as reason:
        return str(reason)
    return None


def row_program(program: Program, plan: GraphPlan, arrays: Sequence[Arrays]) -> list[Tensor]:
    """The results of ``program`` over the rows of ``plan``.

    Args:
        program: The expression.
        plan: The graph.
        arrays: Of each operand its matrix ``[rows, width]`` float32, or its words ``[rows, row_words(width, bits)]``
            int32, scale and lower end (one element, ``[width]`` or one per row, float32).  Rows of edges are in the
            caller's order.  Then those of each product.

    Returns:
        ``[num_dst, width]`` float32 for every output, then ``[E, width]`` for every output of edges.

    Raises:
        ValueError: If an operand is not of the shape that the program names.
        NotFinite: If edges have NaN or infinity in what is mapped, on the CPU.
    """
    first = len(program.operands)
    for number, (operand, given) in enumerate(zip(program.operands, arrays[:first], strict=True)):
        _check(number, operand, given, plan)
    for number, (product, given) in enumerate(zip(program.products, arrays[first:], strict=True)):
        _check_product(number, product, given)
    if plan.num_dst == 0:
        every = (*program.outputs, *program.edge_outputs)
        return [torch.empty((0, program.nodes[k].width), device=plan.device) for k in every]
    backend = backend_for(plan.device)
    if backend not in KERNELS:
        return reference(program, arrays, plan.rowptr, plan.col, plan.edge_ids)
    return _run_cpu(program, plan, arrays) if backend == "cpu" else _run_triton(program, plan, arrays)


def _check(number: int, operand: Operand, given: Arrays, plan: GraphPlan) -> None:
    rows = {"source": plan.num_src, "target": plan.num_dst, "edge": plan.num_edges, "constant": 1}[operand.side]
    width = row_words(operand.width, operand.bits) if operand.bits else operand.width
    dtype = torch.int32 if operand.bits else torch.float32
    if tuple(given[0].shape) != (rows, width) or given[0].dtype is not dtype:
        found = f"{list(given[0].shape)}, {given[0].dtype}"
        raise ValueError(f"Expected operand {number} of shape {[rows, width]}, {dtype} (got {found})")
    if not operand.bits:
        return
    count = {"tensor": 1, "column": operand.width, "row": rows}[operand.ranges]
    for what, values in zip(("scale", "lower"), given[1:], strict=True):
        if values.numel() != count or values.dtype is not torch.float32:
            raise ValueError(f"Expected {count} float32 values as '{what}' of operand {number} (got {values.numel()})")


def _check_product(number: int, product: Product, given: Arrays) -> None:
    words, w_scale, w_lower, *rest = given
    shape = (product.num_out, row_words(product.num_in, product.w_bits))
    if tuple(words.shape) != shape or words.dtype is not torch.int32:
        found = f"{list(words.shape)}, {words.dtype}"
        raise ValueError(f"Expected words of product {number} of shape {list(shape)}, torch.int32 (got {found})")
    counts = (product.num_out * product.has_bias, 1, 1, int(product.has_unit))
    fits = w_scale.numel() == w_lower.numel() and w_scale.numel() in (1, product.num_out)
    fits = fits and all(t.numel() == count for t, count in zip(rest, counts, strict=True))
    if not fits or any(t.dtype is not torch.float32 for t in given[1:]):
        raise ValueError(f"Expected the float32 ranges of product {number} (got {[list(t.shape) for t in given]})")


def _run_cpu(program: Program, plan: GraphPlan, arrays: Sequence[Arrays]) -> list[Tensor]:
    from ..cpu.memory import array_of, empty
    from ..cpu.parallel import row_chunks, run_chunks

    outs = [empty((plan.num_dst, program.nodes[k].width), torch.float32) for k in program.outputs]
    outs += [empty((plan.num_edges, program.nodes[k].width), torch.float32) for k in program.edge_outputs]
    first = len(program.operands)
    flat = [array_of(t.detach().contiguous()).reshape(-1) for given in arrays[:first] for t in given]
    rowptr, col = array_of(plan.rowptr), array_of(plan.col)
    fixed, held, bad = _products(program, arrays[first:])
    run_chunks(
        _cpu_kernel(program), row_chunks(rowptr), rowptr, col, array_of(plan.edge_ids), plan.max_degree, *flat, *fixed,
        *(array_of(out).reshape(-1) for out in outs),
    )  # fmt: skip
    del held
    if bad is not None and bad.any():
        raise NotFinite(int(bad.argmax()))
    return outs


def _products(program: Program, arrays: Sequence[Arrays]) -> tuple[list[Any], Any, Any]:
    """What kernels take of linear maps, what has to be kept until they have run, and where they say what they met."""
    if not program.products:
        return [], None, None
    import numpy as np

    from .cpu_products import constants_of

    found = [constants_of(product, tuple(given)) for product, given in zip(program.products, arrays, strict=True)]
    bad = np.zeros(len(found), np.int64)
    return [*(fixed for fixed, _ in found), bad], found, bad


FEW_FEATURES = 128  # of a row that one warp takes


def _run_triton(program: Program, plan: GraphPlan, arrays: Sequence[Arrays]) -> list[Tensor]:
    options: dict[str, Any] = {"dtype": torch.float32, "device": plan.device}
    outs = [torch.empty((plan.num_dst, program.nodes[k].width), **options) for k in program.outputs]
    outs += [torch.empty((plan.num_edges, program.nodes[k].width), **options) for k in program.edge_outputs]
    first = len(program.operands)
    products = [_per_output(product, given) for product, given in zip(program.products, arrays[first:], strict=True)]
    flat = [t.detach().contiguous() for given in (*arrays[:first], *products) for t in given]
    warps = 8 if products else 1 if max(node.width for node in program.nodes) <= FEW_FEATURES else 4
    # Products of floats are not fused with sums: results are those of other backends.
    _triton_kernel(program)[(plan.num_dst,)](
        plan.rowptr, plan.col, plan.edge_ids, *flat, *outs, num_warps=warps, enable_fp_fusion=False
    )
    return outs


def _per_output(product: Product, given: Arrays) -> Arrays:
    """The arrays of a linear map with a range of the weight for each of its outputs."""
    words, w_scale, w_lower, *rest = given
    return (words, *(t.reshape(-1).expand(product.num_out) for t in (w_scale, w_lower)), *rest)
