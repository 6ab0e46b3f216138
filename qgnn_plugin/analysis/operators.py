"""Norms of propagation operators and of the smoothness correction: what an error can grow to (docs/error_bound.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SMPConfig
from ..graph.adjacency import NormalizedGraph
from ..kernels.plan import GraphPlan
from ..smp.descent import StepFactors

__all__ = ["Correction", "OperatorBound", "column_norm", "operator_bound", "operator_of"]

SWEEPS = 40  # of the power iteration behind Schur's test
FLOOR = 1e-6  # smallest weight in Schur's test, relative to the largest: weights must be positive
ROUNDING = 1e-9


@dataclass(frozen=True)
class OperatorBound:
    """A bound of ``||P||`` in the spectral norm, and whether ``P`` is symmetric."""

    norm: float
    symmetric: bool

    @property
    def is_walk(self) -> bool:
        """Whether the spectrum is real and within [-1, 1], as that of a normalized undirected graph."""
        return self.symmetric and self.norm <= 1 + ROUNDING


def operator_of(graph: NormalizedGraph) -> Tensor:
    """The entries ``[E]`` float64 of ``diag(t) W diag(s)``, in CSR order."""
    plan = graph.plan
    values = torch.ones(plan.num_edges, dtype=torch.float64, device=plan.device)
    if graph.weight is not None:
        values = values * graph.weight.detach().double()
    if graph.source is not None:
        values = values * graph.source.detach().double().view(-1)[plan.col.long()]
    if graph.target is not None:
        values = values * graph.target.detach().double().view(-1)[plan.dst]
    return values


def operator_bound(plan: GraphPlan, values: Tensor) -> OperatorBound:
    r"""Bound ``||P||_2`` by Schur's test.

    For positive vectors ``p`` and ``q``,
    :math:`\|P\|^2 \le \max_i \frac{(|P| q)_i}{p_i} \max_j \frac{(|P|' p)_j}{q_j}`; power iteration finds good ones.

    Args:
        plan: The graph.
        values: ``[E]`` float64, the entries of ``P`` in CSR order.
    """
    if plan.num_edges == 0:
        return OperatorBound(0.0, plan.num_src == plan.num_dst)
    values, col, dst = values.double(), plan.col.long(), plan.dst
    size = values.abs()
    best = torch.inf
    q = _positive(values.new_zeros(plan.num_src).index_add_(0, col, size).sqrt())
    p = _positive(values.new_zeros(plan.num_dst).index_add_(0, dst, size).sqrt())
    for start in (None, plan.degree.double().sqrt().clamp_min(1)):
        if start is not None and plan.num_src == plan.num_dst:
            p = q = start  # the Perron vector of a normalized undirected graph: its norm is 1 exactly
        for _ in range(SWEEPS):
            forward = values.new_zeros(plan.num_dst).index_add_(0, dst, size * q[col])
            backward = values.new_zeros(plan.num_src).index_add_(0, col, size * p[dst])
            best = min(best, float((forward / p).max() * (backward / q).max()))
            p, q = _positive(forward), _positive(backward)
    return OperatorBound(best**0.5, _is_symmetric(plan, values))


def column_norm(plan: GraphPlan, values: Tensor) -> float:
    r"""The largest Euclidean norm of a column of ``P``: what :math:`\max_j P_{ij} x_j` makes of a difference at most.

    Args:
        plan: The graph.
        values: ``[E]`` float64, the entries of ``P`` in CSR order.
    """
    columns = values.new_zeros(plan.num_src).index_add_(0, plan.col.long(), values.square())
    return float(columns.max()) ** 0.5 if plan.num_src else 0.0


def _positive(x: Tensor) -> Tensor:
    peak = float(x.max()) if x.numel() else 0.0
    return x.clamp_min(FLOOR * peak if peak > 0 else 1.0)


def _is_symmetric(plan: GraphPlan, values: Tensor) -> bool:
    if plan.num_src != plan.num_dst:
        return False
    size = (plan.num_dst, plan.num_src)
    matrix = torch.sparse_coo_tensor(torch.stack([plan.dst, plan.col.long()]), values, size, check_invariants=False)
    matrix = matrix.coalesce()
    mirrored = matrix.t().coalesce()
    return torch.equal(matrix.indices(), mirrored.indices()) and torch.allclose(
        matrix.values(), mirrored.values(), rtol=ROUNDING, atol=0
    )


@dataclass(frozen=True)
class Correction:
    r"""The linear map ``C`` that the correction applies to a change, as bounds on what it does to errors.

    Args:
        norm: ``||C||``.
        drift: ``||I - C||``.
        least: Smallest eigenvalue of ``C`` where its operator is a walk, else :obj:`None`.
        gap: Weights by which the error of each gap message enters the corrected change.
    """

    norm: float
    drift: float
    least: float | None
    gap: tuple[float, ...]

    @classmethod
    def of(cls, config: SMPConfig | None, multiplier: float, eta: float, operator: OperatorBound) -> Correction:
        """That of ``multiplier`` on an operator."""
        if config is None or multiplier == 0:
            return cls(1.0, 0.0, 1.0 if operator.is_walk else None, ())
        if config.algorithm == "reference":  # C = I + 2 eta lambda P
            reach = 2 * config.eta * abs(multiplier) * operator.norm
            return cls(1 + reach, reach, None, (reach,))
        if config.correction == "explicit":
            reach = 2 * eta * multiplier
            least = 1 - 2 * reach if operator.is_walk else None
            norm = 1 + reach * (1 + operator.norm) if least is None else max(1.0, abs(least))
            return cls(norm, reach * (1 + operator.norm), least, (reach * operator.norm,))
        weight = 4 * multiplier
        share = weight / (1 + weight)
        growth = share * (1 + operator.norm) / 2  # of one sweep
        powers = [growth**j for j in range(config.terms + 1)]
        norm = sum(powers[:-1]) / (1 + weight) + powers[-1]
        gap = tuple(share / 2 * operator.norm * powers[config.terms - 1 - t] for t in range(config.terms))
        least = 1 / (1 + weight) if operator.is_walk else None
        return cls(min(norm, 1.0) if operator.is_walk else norm, sum(powers[1:]), least, gap)

    def contraction(self, factors: StepFactors, operator: OperatorBound) -> float:
        r"""Bound of ``||I - C + C (c0 I + c1 P)||``, the factor on the error of the state in one step."""
        factor = abs(factors.keep) + abs(factors.average) * operator.norm
        if self.least is None:
            return factor if self.drift == 0 else self.drift + self.norm * factor
        corners = [abs(1 - c * d) for c in (self.least, 1.0) for d in (1 - factor, 1 + factor)]
        return max(corners)
