"""What a quantizer reads of its values: where they are in a sparse matrix, their largest magnitudes, their skewness."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.plan import GraphPlan, plan_cache
from ..kernels.spmm import segment_max

__all__ = ["largest", "peak", "row_peaks", "skewness", "split"]


def split(x: Tensor) -> tuple[Tensor, GraphPlan | None]:
    """Values and positions of a sparse matrix; a dense one has no positions."""
    if x.layout == torch.strided:
        return x, None
    x = _as_csr(x)
    crow, col = x.crow_indices(), x.col_indices()
    return x.values(), plan_cache.get((crow, col), ("features", x.size(1)), lambda: _pattern(crow, col, x.size(1)))


def _as_csr(x: Tensor) -> Tensor:
    """A sparse matrix of another layout as CSR, converted once; of a COO matrix, repeated entries are summed."""
    if x.layout not in (torch.sparse_csr, torch.sparse_coo, torch.sparse_csc) or x.dim() != 2:
        raise TypeError(
            f"Expected dense features, or a sparse matrix in CSR, COO or CSC (got {x.layout}, {list(x.shape)})"
        )
    if x.layout == torch.sparse_csr:
        return x
    if x.requires_grad:
        return x.to_sparse_csr()
    return plan_cache.get((x,), ("features as CSR",), lambda: _converted(x))


def _converted(x: Tensor) -> Tensor:
    """As CSR; torch could not read the values of one that is made, to last, of what was made in inference mode."""
    return (x.clone() if x.is_inference() else x).to_sparse_csr()


def _pattern(crow: Tensor, col: Tensor, width: int) -> GraphPlan:
    """The positions of a CSR matrix with ``width`` columns.

    Raises:
        TypeError, ValueError: If they are out of bounds, or a row has a column twice.
    """
    pattern = GraphPlan.from_csr(crow, col, width)
    rises = (pattern.col[1:] > pattern.col[:-1]) | (pattern.dst[1:] > pattern.dst[:-1])
    if not bool(rises.all()) and (pattern.dst * width + pattern.col).unique().numel() < pattern.num_edges:
        raise ValueError("Expected each column once in a row of sparse features (got some twice); use .coalesce()")
    return pattern


def peak(x: Tensor) -> Tensor:
    """Largest magnitude, 1 where there is none: a scale must not be zero."""
    if x.numel() == 0:
        return x.new_ones(())
    peak = x.detach().abs().amax()
    return torch.where(peak > 0, peak, torch.ones_like(peak))


def row_peaks(x: Tensor, pattern: GraphPlan | None) -> Tensor:
    """Largest magnitude per row, ``[N, 1]``, 1 for a row of zeros."""
    peaks = largest(x, pattern)
    return torch.where(peaks > 0, peaks, torch.ones_like(peaks))


def largest(x: Tensor, pattern: GraphPlan | None = None, row_dims: int = 1) -> Tensor:
    """Largest magnitude per row of the last ``row_dims`` dimensions, kept as 1; ``[N, 1]`` of a sparse matrix."""
    if pattern is not None:
        return segment_max(pattern, x.detach().abs()).unsqueeze(1)
    dims = list(range(-row_dims, 0))
    if any(x.size(dim) == 0 for dim in dims):
        return x.new_zeros((*x.shape[:-row_dims], *([1] * row_dims)))
    return x.detach().abs().amax(dims, keepdim=True)


def skewness(x: Tensor) -> Tensor:
    """Sample skewness, the third standardized moment; 0 for constant data."""
    centred = x.double().flatten()
    centred = centred - centred.mean()
    variance = centred.square().mean()
    return torch.where(variance > 0, centred.pow(3).mean() / variance.clamp_min(1e-300).pow(1.5), 0.0)
