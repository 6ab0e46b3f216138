r"""Smoothness-aware propagation: K steps of constrained gradient descent (docs/smoothness.md).

With ``A~`` the normalized adjacency and ``X0`` the input, every step descends in
``1/2 ||H - X0||^2 + mu/2 tr(H' L H)``, corrects its change ``D = U - H`` by the multiplier, and bounds what is realised
of it:

.. math::
    U = (1 - (1 + \mu) \eta) H + \mu \eta \tilde A H + \eta X_0 \qquad
    H \leftarrow H + (I + 2 \lambda L)^{-1} (U - H)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import MessagePassing

from ..aliases import LayersOwn
from ..config import SMPConfig
from ..graph.adjacency import NormalizedGraph, NormalizedOperator
from ..graph.samples import Samples
from .constraint import attach_constraint
from .descent import Meter, PropagationLayer, Step, StepFactors, Visit

__all__ = ["Meter", "PropagationLayer", "SMPropagation", "Step", "StepFactors", "Visit", "dropped_edges"]


def dropped_edges(graph: NormalizedGraph, p: float, training: bool) -> NormalizedGraph:
    """Drop edges in training, as APPNP's ``dropout`` does."""
    if not (p > 0 and training):
        return graph
    weight = graph.weight if graph.weight is not None else graph.plan.degree.new_ones(graph.plan.num_edges)
    return NormalizedGraph(graph.plan, F.dropout(weight, p=p), graph.source, graph.target)


class SMPropagation(NormalizedOperator, PropagationLayer, MessagePassing):
    r"""K steps of smoothness-aware propagation (arXiv 2308.14949, section 4.3); takes the place of
    :class:`torch_geometric.nn.APPNP`, with its arguments, its call and no weights.

    .. math::
        U = (1 - (1 + \mu) \eta) H + \mu \eta \tilde A H + \eta X_0 \qquad D = U - H \qquad
        H \leftarrow H + (I + 2 \lambda (I - \tilde A))^{-1} D

    With the multiplier :math:`\lambda = 0` this is APPNP with teleport :math:`\eta` where :math:`(1 + \mu) \eta = 1`.
    In training mode every step's realised change is measured against ``smp``'s bound;
    :func:`qgnn_plugin.differential_multiplier_step` or the Lightning callback raises the multiplier until it is met.

    Args:
        K: Number of steps.
        alpha: Teleport probability in (0, 1], as APPNP's: sets ``eta = alpha`` and ``mu = 1 / alpha - 1``; default
            those of ``smp``.
        dropout: Dropout probability of edges during training.
        cached: Whether to keep the normalized graph of the first call for all later ones.
        add_self_loops: Whether to add self-loops before normalizing.
        normalize: Whether to add self-loops and normalize symmetrically.
        smp: The constraint; default :class:`SMPConfig`.  A converted layer keeps it, whatever the model's
            configuration says.
        **kwargs: Of :class:`torch_geometric.nn.conv.MessagePassing`, such as ``flow``.

    Shapes:
        - **input:** node features ``[N, F]``, or ``[*, N, F]`` of several samples; edge indices ``[2, E]``, or a sparse
          adjacency; edge weights ``[E]`` (optional)
        - **output:** ``[N, F]``

    Memory is ``O(N F + E)`` in inference; training keeps the ``K`` states for the backward pass.
    """

    smp: Any = LayersOwn("smp")
    multiplier: Tensor
    _cached_graph: NormalizedGraph | None

    calls_propagate = False  # hooks and masks of MessagePassing have nothing to act on

    def __init__(
        self,
        K: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        cached: bool = False,
        add_self_loops: bool = True,
        normalize: bool = True,
        *,
        smp: SMPConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(K, bool) or not isinstance(K, int) or K < 0:
            raise ValueError(f"Expected the number of steps 'K' as an integer of 0 or more (got {K!r})")
        if kwargs.setdefault("aggr", "add") not in ("add", "sum"):
            raise ValueError(f"Expected the aggregation 'add' (got {kwargs['aggr']!r}): A~ H is a sum")
        super().__init__(**kwargs)
        smp = SMPConfig() if smp is None else smp
        if alpha is not None:
            if not 0 < alpha <= 1:
                raise ValueError(f"Expected a teleport probability 'alpha' in (0, 1] (got {alpha})")
            smp = replace(smp, eta=alpha, mu=1 / alpha - 1)
        self.K, self.dropout, self.cached = K, dropout, cached
        self.add_self_loops, self.normalize = add_self_loops, normalize
        self._cached_graph = None
        self.smp = smp
        attach_constraint(self, smp, None)

    @property
    def _smp(self) -> SMPConfig:  # type: ignore[override]
        return self.smp

    def __setstate__(self, data: dict[str, Any]) -> None:
        if "constraint_state" in data:  # of a pickle written when that was its name
            data = {"_constraint_state": data["constraint_state"], **data}
            del data["constraint_state"]
        super().__setstate__(data)

    def reset_parameters(self) -> None:
        """Back to the initial multiplier and slack; forgets a cached graph."""
        super().reset_parameters()
        self._cached_graph = None
        attach_constraint(self, self.smp, self.multiplier.device)

    def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """All ``K`` steps from ``x``.

        Raises:
            NotImplementedError: In explain mode.
        """
        if self.explain:
            raise NotImplementedError("Expected SMPropagation not to be in explain mode; explain APPNP instead")
        graph = self.normalized(x, edge_index, edge_weight)

        def average(k: int, h: Tensor) -> Tensor:
            return dropped_edges(graph, self.dropout, self.training).apply(h)

        exact = not (self.training and self.dropout > 0)
        samples = Samples.of(self, x)
        out = self.propagate_steps(samples.rows(x), graph, average, lambda k, d: graph.apply(d), exact=exact)
        return samples.shaped(out)

    def normalized(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> NormalizedGraph:
        r"""``A~``, cached by the identity of its arguments; with ``cached``, that of the first call."""
        if not self.cached:
            return super().normalized(x, edge_index, edge_weight)
        samples = Samples.of(self, x)
        if self._cached_graph is None:
            self._cached_graph = self.operator(edge_index, edge_weight, samples.num_nodes, x.dtype)
        return self._cached_graph.repeated(samples.copies)

    def message(self, x_j: Tensor, edge_weight: Tensor | None) -> Tensor:
        return x_j if edge_weight is None else edge_weight.view(-1, 1) * x_j

    def __repr__(self) -> str:
        return f"{type(self).__name__}(K={self.K}, eta={self.smp.eta:.4g}, mu={self.smp.mu:.4g})"
