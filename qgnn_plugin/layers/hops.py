r"""SGConv, SSGConv, TAGConv and LGConv: plain steps ``H <- A~ H``, and linear maps of the states they leave.

A class per layer says what it makes of its states; converted and packed layers share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..smp.constraint import attach_constraint
from ..smp.propagation import Descent, Step
from .appnp import NormalizedOperator, QuantizedPropagation
from .base import SiteFactory
from .graph import NormalizedGraph

__all__ = [
    "Hops",
    "LGHops",
    "QuantizedHops",
    "QuantizedLGConv",
    "QuantizedSGConv",
    "QuantizedSSGConv",
    "QuantizedTAGConv",
    "SGHops",
    "SSGHops",
    "TAGHops",
]


class Hops:
    """Mixin of a propagation whose steps only average."""

    K: int
    add_self_loops: bool = True
    normalize: bool = True

    @property
    def descent(self) -> Descent:
        """``U = A~ H``."""
        return Descent(0.0, 1.0, 0.0)

    def result(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        """The layer's output from its input ``x0`` [N, F]."""
        raise NotImplementedError


class SGHops(Hops):
    r"""``W H_K + b``."""

    def result(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        return self.lin(self.steps(x0, graph))


class SSGHops(Hops):
    r"""``W (alpha X0 + (1 - alpha) / K sum_k H_k) + b``."""

    def result(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        out = x0 * self.alpha

        def add(step: Step) -> None:
            nonlocal out
            out = out + (1 - self.alpha) / self.K * step.state

        self.steps(x0, graph, add)
        return self.lin(out)


class TAGHops(Hops):
    r"""``sum_k W_k H_k + b``; no self-loops are added."""

    add_self_loops = False

    def result(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        maps = iter(self.lins)
        out = next(maps)(x0)

        def add(step: Step) -> None:
            nonlocal out
            out = out + next(maps)(step.state)

        self.steps(x0, graph, add)
        return out if self.bias is None else out + self.bias


class LGHops(Hops):
    r"""One step, ``H_1``; no self-loops are added."""

    K = 1
    add_self_loops = False

    def result(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        return self.steps(x0, graph)


class QuantizedHops(NormalizedOperator, QuantizedPropagation):
    """Base of their quantized forms.

    The features themselves are what the first step sends, and its site is that of the model's input where the layer is
    the model's first.  Steps are always computed: ``cached=True`` keeps the result of float steps alone, since
    ranges and multiplier move the quantized ones.
    """

    dropout = 0.0
    cached: bool = False

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.input_quantizer = None
        width, steps = getattr(layer, "in_channels", None), []
        for k in range(getattr(layer, "K", 1)):
            make = sites.features if k == 0 and sites.first[0] else sites.message
            steps.append(make(f"step{k}", width))
        cls.attach_steps(layer, sites, steps)
        attach_constraint(layer, sites.config.smp, sites.device)

    def unquantized(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        measured = self.cached and self.constraint_state is not None  # what is cached does not change
        if self.training and self.smp is not None and x.dim() == 2 and not measured:
            with torch.no_grad():
                self.steps(x, self.normalized(x, edge_index, edge_weight))
        return super().unquantized(x, edge_index, edge_weight)

    def quantized_propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Tensor:
        """One step of PyG's own loop."""
        return self.float_propagate(edge_index, size, **kwargs)


class QuantizedSGConv(SGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.SGConv`."""


class QuantizedSSGConv(SSGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.SSGConv`."""


class QuantizedTAGConv(TAGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.TAGConv`."""

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        entering = sites.first[0]
        super().attach(layer, sites)
        sites.first[0] = entering  # the first of its maps reads the same features


class QuantizedLGConv(LGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.LGConv`, the step of LightGCN."""
