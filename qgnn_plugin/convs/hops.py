r"""SGConv, SSGConv, TAGConv and LGConv: plain steps ``H <- A~ H``, and linear maps of what they start from or leave.

A class per layer says what it makes of its states; converted and packed layers share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import LGConv, SGConv, SSGConv, TAGConv

from ..graph.adjacency import NormalizedGraph, NormalizedOperator
from ..graph.samples import Samples
from ..layers.arithmetic import own_copy
from ..layers.base import SiteFactory
from ..layers.registry import register_layer
from ..layers.watched import is_watched, observed, values_entering
from ..packing.layers.base import register_packed
from ..packing.lazy.deferred import materialized
from ..smp.constraint import attach_constraint
from ..smp.descent import Step, StepFactors
from .base import scaled
from .steps import PackedSteps, Propagation, QuantizedPropagation

__all__ = [
    "Hops",
    "LGHops",
    "MappedHops",
    "PackedLGConv",
    "PackedSGConv",
    "PackedSSGConv",
    "PackedTAGConv",
    "QuantizedHops",
    "QuantizedLGConv",
    "QuantizedSGConv",
    "QuantizedSSGConv",
    "QuantizedTAGConv",
    "SGHops",
    "SSGHops",
    "TAGHops",
]


class Hops(Propagation):
    """A propagation whose steps only average.

    Where the features themselves are what the first step sends, its site is that of the model's input in the model's
    first layer.  Steps are always computed: ``cached=True`` keeps the result of float steps alone, since ranges and
    multiplier move the quantized ones.
    """

    K: int
    add_self_loops: bool = True
    normalize: bool = True
    dropout = 0.0

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.input_quantizer = None
        mapped, steps = cls.maps_first(layer), []
        width = layer.out_channels if mapped else getattr(layer, "in_channels", None)
        for k in range(getattr(layer, "K", 1)):
            entering = k == 0 and sites.entrance.is_open and not mapped
            steps.append((sites.features if entering else sites.message)(f"step{k}", width))
        cls.attach_steps(layer, sites, steps)
        attach_constraint(layer, sites.config.smp, sites.device)

    @property
    def step_factors(self) -> StepFactors:
        """``U = A~ H``."""
        return StepFactors(0.0, 1.0, 0.0)

    @staticmethod
    def maps_first(layer: Any) -> bool:
        """Whether the linear map of ``layer``, which commutes with its steps, comes before them."""
        del layer
        return False

    def initial_state(self, x: Tensor) -> Tensor:
        return materialized(x)

    def average(self: Any, k: int, h: Tensor, graph: NormalizedGraph) -> Tensor:
        if graph.propagate is None or not self.maps_first(self):
            return super().average(k, h, graph)
        # The site is for mapped features, which are not sent now.
        observed(self.step_quantizers[str(k)], lambda: scaled(self.lin.unbiased(h), graph.source))
        return graph.propagate(values_entering(self.lin, h) if k == 0 else h)


class MappedHops(Hops):
    """Layers with one linear map, which comes first where that does not widen the messages."""

    uncalled_maps = ("lin",)

    @staticmethod
    def maps_first(layer: Any) -> bool:
        return layer.out_channels <= layer.in_channels

    @property
    def is_mapped(self) -> bool:
        """Whether the map does come first: not where somebody looks at what PyG sends."""
        return self.maps_first(self) and not is_watched(self)

    def initial_state(self: Any, x: Tensor) -> Tensor:
        """``X0``, mapped where the map comes first; its bias comes last in any case."""
        x = materialized(x)
        if not self.is_mapped:
            return x
        x = own_copy(x)
        return self.lin.unbiased(x) if hasattr(self.lin, "unbiased") else F.linear(x, self.lin.weight)

    def result(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        out = self.combined(x0, graph)
        if not self.is_mapped:
            return self.lin(out)
        return out if self.lin.bias is None else out + self.lin.bias

    def combined(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        """What is mapped, or would be."""
        raise NotImplementedError


class SGHops(MappedHops):
    r"""``W H_K + b``."""

    def combined(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        return self.steps(x0, graph)


class SSGHops(MappedHops):
    r"""``W (alpha X0 + (1 - alpha) / K sum_k H_k) + b``."""

    def combined(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        out = x0 * self.alpha

        def add(step: Step) -> None:
            nonlocal out
            out = out + (1 - self.alpha) / self.K * step.state

        self.steps(x0, graph, add)
        return out


class TAGHops(Hops):
    r"""``sum_k W_k H_k + b``; no self-loops are added."""

    add_self_loops = False

    def result(self: Any, x0: Tensor, graph: NormalizedGraph) -> Tensor:
        maps = iter(self.lins)
        out = next(maps)(x0)

        def add(step: Step) -> None:
            nonlocal out
            out = out + next(maps).forward(step.state)  # past its hooks, as PyG has it

        self.steps(x0, graph, add)
        return out if self.bias is None else out + self.bias


class LGHops(Hops):
    r"""One step, ``H_1``; no self-loops are added."""

    K = 1
    add_self_loops = False


class QuantizedHops(NormalizedOperator, QuantizedPropagation):
    """Base of their quantized forms."""

    maps_first: Callable[[Any], bool]

    @property
    def is_plain(self: Any) -> bool:
        """Off, and so is the map that would come first: its range is for what enters it."""
        lin = getattr(self, "lin", None)
        mapped = self.maps_first(self) and hasattr(lin, "unbiased")
        return self.is_off and (not mapped or getattr(lin, "is_off", False))

    def unquantized(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        if self._measures and x.is_floating_point():
            with torch.no_grad():
                x0 = Samples.of(self, x).rows(self.initial_state(x))
                self.steps(x0, self.normalized(x, edge_index, edge_weight))
        return super().unquantized(x, edge_index, edge_weight)

    def quantized_propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Tensor:
        """One step of PyG's own loop."""
        return self.float_propagate(edge_index, size=size, **kwargs)


class QuantizedSGConv(SGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.SGConv`."""


class QuantizedSSGConv(SSGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.SSGConv`."""


class QuantizedTAGConv(TAGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.TAGConv`."""

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        entering = sites.entrance.is_open
        super().attach(layer, sites)
        sites.entrance.is_open = entering  # the first of its maps reads the same features


class QuantizedLGConv(LGHops, QuantizedHops):
    """Quantized :class:`torch_geometric.nn.LGConv`, the step of LightGCN."""


class PackedSGConv(SGHops, PackedSteps):
    """Packed SGConv."""


class PackedSSGConv(SSGHops, PackedSteps):
    """Packed SSGConv."""


class PackedTAGConv(TAGHops, PackedSteps):
    """Packed TAGConv."""


class PackedLGConv(LGHops, PackedSteps):
    """Packed LGConv."""


for _layer, _quantized, _packed in (
    (SGConv, QuantizedSGConv, PackedSGConv),
    (SSGConv, QuantizedSSGConv, PackedSSGConv),
    (TAGConv, QuantizedTAGConv, PackedTAGConv),
    (LGConv, QuantizedLGConv, PackedLGConv),
):
    register_layer(_layer, _quantized)
    register_packed(_quantized, _packed)
