"""Which mixin converts which layer type."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch_geometric.nn import (
    APPNP,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    LGConv,
    MessagePassing,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
)
from torch_geometric.nn import Linear as PyGLinear

from ..smp.constraint import BUFFERS, SmoothLayer
from ..smp.propagation import SMPropagation
from .appnp import QuantizedAPPNP, QuantizedSMPropagation
from .attention import QuantizedGATConv, QuantizedGATv2Conv
from .base import QuantizedLayer, SiteFactory, quantized_class, release_propagate
from .gcn import QuantizedGCNConv
from .gin import QuantizedGINConv
from .hops import QuantizedLGConv, QuantizedSGConv, QuantizedSSGConv, QuantizedTAGConv
from .linear import QuantizedLinear
from .message_passing import QuantizedConv, QuantizedMessagePassing
from .sage import QuantizedSAGEConv

__all__ = ["convert_layer", "mixin_for", "register_layer"]

_REGISTRY: dict[type[nn.Module], type[QuantizedLayer]] = {}

# A subclass that redefines one of these computes something else than its parent: it takes the generic path.
_BEHAVIOUR = ("forward", "message", "aggregate", "update", "message_and_aggregate", "edge_update")


def register_layer(layer_class: type[nn.Module], mixin: type[QuantizedLayer]) -> None:
    """Convert layers of ``layer_class`` (and subclasses that behave the same) with ``mixin``."""
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise TypeError(f"Expected a torch.nn.Module class (got {layer_class!r})")
    if not (isinstance(mixin, type) and issubclass(mixin, QuantizedLayer)):
        raise TypeError(f"Expected a QuantizedLayer class (got {mixin!r})")
    _REGISTRY[layer_class] = mixin


def mixin_for(layer_class: type[nn.Module]) -> type[QuantizedLayer] | None:
    """The mixin that converts ``layer_class``, or :obj:`None` where nothing does."""
    for base in layer_class.__mro__:
        if base in _REGISTRY:
            if base is layer_class or _behaves_like(layer_class, base):
                return _REGISTRY[base]
            break
    return QuantizedMessagePassing if issubclass(layer_class, MessagePassing) else None


def classes_of(mixin: type[QuantizedLayer]) -> list[type[nn.Module]]:
    """The layer types that ``mixin`` is registered for."""
    return [layer_class for layer_class, found in _REGISTRY.items() if found is mixin]


def _behaves_like(cls: type, base: type) -> bool:
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in _BEHAVIOUR)


def convert_layer(
    layer: nn.Module, mixin: type[QuantizedLayer], sites: SiteFactory, *, output: bool = False, **options: Any
) -> None:
    """Add quantizers to ``layer`` and swap its class, in place; with ``output`` its result is quantized as well.

    Raises:
        ValueError: If ``layer`` has attributes of its own under names that are needed, or a ``propagate`` of its own.
    """
    constrained = isinstance(layer, SmoothLayer)  # by itself: it keeps what it has
    taken = [name for name in _RESERVED if hasattr(layer, name) and not (constrained and name in _CONSTRAINT)]
    if taken:
        raise ValueError(
            f"Expected the names {', '.join(taken)} to be free on '{sites.name}', a {type(layer).__name__}; rename "
            f"these attributes or exclude the layer"
        )
    before = _snapshot(layer)
    try:
        if isinstance(layer, MessagePassing):
            release_propagate(layer)
        mixin.attach(layer, sites, **options)
        if output:
            layer.output_quantizer = sites.make("output", "output")
        state: Any = layer
        state.quant_config, state.layer_name = sites.config, sites.name
        if issubclass(mixin, QuantizedConv) and not constrained:
            state.smp = sites.config.smp
        layer.__class__ = quantized_class(mixin, type(layer), output)
    except Exception:
        _reset(layer, before)
        raise
    for _, quantizer in state.own_quantizers():
        quantizer.train(layer.training)


_CONSTRAINT = (*BUFFERS, "smp", "constraint_state")
_RESERVED = (
    "quant_config",
    "layer_name",
    *_CONSTRAINT,
    "deep_place",
    "deep_config",
    "deep_stack",
    "output_quantizer",
)
_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _snapshot(layer: nn.Module) -> dict[str, Any]:
    return {**layer.__dict__, **{name: copy.copy(layer.__dict__[name]) for name in _OWN}}


def _reset(layer: nn.Module, snapshot: dict[str, Any]) -> None:
    layer.__dict__.clear()
    layer.__dict__.update(snapshot)


for _layer, _mixin in {
    nn.Linear: QuantizedLinear,
    PyGLinear: QuantizedLinear,
    GCNConv: QuantizedGCNConv,
    GATConv: QuantizedGATConv,
    GATv2Conv: QuantizedGATv2Conv,
    SAGEConv: QuantizedSAGEConv,
    GINConv: QuantizedGINConv,
    APPNP: QuantizedAPPNP,
    SGConv: QuantizedSGConv,
    SSGConv: QuantizedSSGConv,
    TAGConv: QuantizedTAGConv,
    LGConv: QuantizedLGConv,
    SMPropagation: QuantizedSMPropagation,
}.items():
    register_layer(_layer, _mixin)
