"""Which mixin converts which layer type; convolutions are entered where they are told (:mod:`qgnn_plugin.convs`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch_geometric.nn import HeteroLinear, MessagePassing
from torch_geometric.nn import Linear as PyGLinear
from torch_geometric.nn.models.linkx import SparseLinear

from ..smp.constraint import SmoothLayer
from .base import (
    CONVERTS,
    Conversion,
    QuantizedLayer,
    SiteFactory,
    SwappedLayer,
    attribute_names,
    clashes,
    extended_class,
    names_kept,
    quantized_class,
    release_propagate,
)
from .behaviour import aggregates_as_named, bound_changes, changes, defined, strays
from .bilinear import QuantizedBilinear, QuantizedHeteroLinear
from .embedding import QuantizedEmbedding
from .grid import QuantizedGridConv
from .linear import QuantizedLinear
from .message_passing import QuantizedConv, QuantizedMessagePassing
from .multihead import QuantizedMultiheadAttention
from .naming import float_class_of
from .own_weights import QuantizedOwnConv, QuantizedOwnModule, own_tables, own_weights
from .reads import goes_around, reads_of
from .recurrent import QuantizedCell, QuantizedRecurrent
from .sparse_linear import QuantizedSparseLinear

__all__ = ["convert_layer", "deep_mixin", "mixin_for", "register_deep", "register_layer"]

_DEEP: dict[type[QuantizedLayer], type[QuantizedLayer]] = {}

_DEFINED: dict[type[nn.Module], dict[str, Any]] = {}  # what the classes in the registry define

# Children that conversions with kernels of their own take for linear maps.
_LINEAR = ("lin", "lin_l", "lin_r", "lin_src", "lin_dst", "lin_edge", "res")


def register_layer(layer_class: type[nn.Module], mixin: type[QuantizedLayer]) -> None:
    """Convert layers of ``layer_class`` by ``mixin``, and of subclasses that change nothing it computes with.

    What these do before and after ``super().forward`` is done as before.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise TypeError(f"Expected a torch.nn.Module class (got {layer_class!r})")
    if not (isinstance(mixin, type) and issubclass(mixin, QuantizedLayer)):
        raise TypeError(f"Expected a QuantizedLayer class (got {mixin!r})")
    CONVERTS[layer_class], _DEFINED[layer_class] = mixin, defined(layer_class)


def mixin_for(layer: nn.Module | type[nn.Module]) -> type[QuantizedLayer] | None:
    """The mixin that converts ``layer``, or layers of a class; :obj:`None` where nothing does.

    A layer that computes with anything else than the registered class does (a method that a subclass or a mixin
    overrides, one bound to the layer itself, another aggregation, an inner layer that is no linear map) is converted
    as any ``MessagePassing``, by what it sends.
    """
    cls: Any = layer if isinstance(layer, type) else type(layer)
    if issubclass(cls, SwappedLayer):  # converted, or packed
        return cls.mixin if issubclass(cls, QuantizedLayer) else mixin_for(cls.float_class)
    for base in cls.__mro__:
        if base in CONVERTS:
            if not _computes_as(cls, base) or (isinstance(layer, nn.Module) and not _is_as_made(layer, base)):
                break
            return CONVERTS[base]
    return _generic_mixin(layer, cls)


def _computes_as(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether ``cls`` computes what ``base`` does, maybe with something before and after it."""
    found = changes(cls, base, _DEFINED[base])
    if not found or issubclass(base, MessagePassing):  # others are converted by what they send
        return not found
    if {"weight"} < reads_of(cls).weights.keys() - {"bias"}:  # products with weights of its own are quantized as well
        return False
    return found == ["forward"] and base.forward is _DEFINED[base]["forward"] and goes_around(cls, base)


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear map and nothing else, which another layer may compute by itself."""
    return mixin_for(layer) is QuantizedLinear and extended_class(float_class_of(layer), {QuantizedLinear}) is None


def _generic_mixin(layer: nn.Module | type[nn.Module], cls: type[nn.Module]) -> type[QuantizedLayer] | None:
    """What converts a layer that is not registered: by what it sends, and by the weights that its code reads."""
    if isinstance(layer, nn.Module):
        reads = bool(own_weights(layer) or own_tables(layer))
    else:
        reads = bool(reads_of(cls).weights)
    if issubclass(cls, MessagePassing):
        return QuantizedOwnConv if reads else QuantizedMessagePassing
    # Containers run, or count, whatever they hold.
    return QuantizedOwnModule if reads and not issubclass(cls, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else None


def register_deep(mixin: type[QuantizedLayer], deep: type[QuantizedLayer]) -> None:
    """In a deep stack (see :mod:`qgnn_plugin.smp.deep`), convert by ``deep`` what ``mixin`` converts elsewhere."""
    _DEEP[mixin] = deep


def deep_mixin(mixin: type[QuantizedLayer] | None) -> type[QuantizedLayer] | None:
    """The mixin of a layer in a deep stack that ``mixin`` converts outside of one; :obj:`None` where there is none."""
    return None if mixin is None else _DEEP.get(mixin)


def classes_of(mixin: type[QuantizedLayer]) -> list[type[nn.Module]]:
    """The layer types that ``mixin`` is registered for."""
    return [layer_class for layer_class, found in CONVERTS.items() if found is mixin]


def _is_as_made(layer: nn.Module, base: type[nn.Module]) -> bool:
    """Whether ``layer`` itself holds nothing that its class would not have made."""
    if bound_changes(layer):
        return False
    aggregations = getattr(CONVERTS[base], "aggregations", None)
    if aggregations is not None and getattr(layer, "aggr", None) not in aggregations:
        return False
    if isinstance(layer, nn.Linear) and 0 in (layer.in_features, layer.out_features):
        return False
    if isinstance(layer, PyGLinear) and 0 in (layer.in_channels, layer.out_channels):
        return False
    if isinstance(layer, nn.Embedding):  # of one number a row, its range would be the row itself
        return layer.embedding_dim > 1
    if isinstance(layer, nn.MultiheadAttention):
        return _is_plain_linear(layer.out_proj)
    if not base.__module__.startswith("torch_geometric.") or not isinstance(layer, MessagePassing):
        return True
    inner = (layer._modules.get(name) for name in _LINEAR)
    return aggregates_as_named(layer) and all(m is None or _is_plain_linear(m) for m in inner)


def convert_layer(
    layer: nn.Module, mixin: type[QuantizedLayer], sites: SiteFactory, *, output: bool = False, **options: Any
) -> None:
    """Add quantizers to ``layer`` and swap its class, in place; with ``output`` its result is quantized as well.

    Raises:
        ValueError: If ``layer`` has attributes of its own under names that are needed, or a ``propagate`` of its own.
    """
    constrained = isinstance(layer, SmoothLayer)  # by itself: it keeps what it has
    _check_names(clashes(mixin, layer), layer, sites.name)
    _check_bound(layer, sites.name)
    own_names = names_kept(mixin, layer)
    before = _snapshot(layer)
    try:
        if isinstance(layer, MessagePassing):
            release_propagate(layer)
        mixin.attach(layer, sites, **options)
        if output:
            layer.output_quantizer = sites.make("output", "output")
        state: Any = layer
        if issubclass(mixin, QuantizedConv) and not constrained:
            state._smp = sites.config.smp
        added = attribute_names(layer.__dict__) - attribute_names(before)
        _check_names(_overwritten(layer, before) | {n for n in added if hasattr(type(layer), n)}, layer, sites.name)
        state._conversion = Conversion(sites.config, sites.name, frozenset(added))
        layer.__class__ = quantized_class(mixin, type(layer), output, own_names)
    except Exception:
        _reset(layer, before)
        raise
    for name in added.intersection(layer._modules):
        if (site := layer._modules[name]) is not None:  # or a dictionary of them
            site.train(layer.training)


def _check_names(taken: Iterable[str], layer: nn.Module, name: str) -> None:
    if taken := sorted(taken):
        raise ValueError(
            f"Expected the names {', '.join(taken)} to be free on '{name}', a {type(layer).__name__}; rename "
            f"these attributes or exclude the layer"
        )


def _overwritten(layer: nn.Module, before: dict[str, Any]) -> set[str]:
    """Attributes of ``layer`` that are no longer what they were."""
    held = [(before[name], layer.__dict__[name]) for name in _OWN[:3]]
    held.append(({k: v for k, v in before.items() if k not in _OWN}, layer.__dict__))
    changed = {name for was, now in held for name in was if name not in now or now[name] is not was[name]}
    return changed - {"propagate"}  # one that PyG had bound to the layer, which is that of the class again


def _check_bound(layer: nn.Module, name: str) -> None:
    """Refuse functions bound to ``layer`` itself that a copy of it, or its other class, would not reach."""
    bound = [*strays(layer), *({"propagate", "edge_updater"} & set(bound_changes(layer)))]
    if bound:
        raise ValueError(
            f"Expected the class of '{name}', a {type(layer).__name__}, to define {', '.join(sorted(set(bound)))} (got "
            f"functions bound to the instance, which conversion cannot reach); define them in a subclass, or exclude "
            f"the layer"
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
    nn.MultiheadAttention: QuantizedMultiheadAttention,
    nn.GRUCell: QuantizedCell,
    nn.LSTMCell: QuantizedCell,
    nn.RNNCell: QuantizedCell,
    nn.GRU: QuantizedRecurrent,
    nn.LSTM: QuantizedRecurrent,
    nn.RNN: QuantizedRecurrent,
    nn.Conv1d: QuantizedGridConv,
    nn.Conv2d: QuantizedGridConv,
    nn.Bilinear: QuantizedBilinear,
    nn.Embedding: QuantizedEmbedding,
    HeteroLinear: QuantizedHeteroLinear,
    SparseLinear: QuantizedSparseLinear,
}.items():
    register_layer(_layer, _mixin)
