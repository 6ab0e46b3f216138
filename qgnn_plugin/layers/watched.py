"""Layers that somebody looks into: hooks of ``MessagePassing`` and masks of explanations act in PyG's ``propagate``.

So do hooks of linear maps that conversion computes without calling them.

Converted and packed layers then send the values that their codes stand for through the ``propagate`` of the layer's own
class, in the caller's order of edges, with the arguments that PyG gives it.  What comes out is the result of the
kernels up to float rounding; layers whose kernels map features before they send them (SAGEConv, SGConv, SSGConv) send
what PyG sends instead, unmapped, and do not round what the kernels would round after the map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import scatter
from torch_geometric.utils.sparse import is_torch_sparse_tensor, set_sparse_value

from ..config import OFF
from ..graph.adjacency import NormalizedGraph, edges_of
from ..graph.edges import entries_of
from ..graph.samples import Samples
from ..quantizers import QuantizedTensor
from .normalized import weight_hooks
from .numerators import attention_codes

__all__ = [
    "is_hooked",
    "is_watched",
    "mapped_by_call",
    "observed",
    "own_propagate",
    "pair_of",
    "quantized_attention",
    "source_side",
    "through_pyg",
    "values_entering",
    "values_mapped",
    "watched_graph",
    "with_propagate",
]

_STAGES = ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
_WATCHERS = ("_explain", *(f"_{stage}_forward_{when}" for stage in _STAGES for when in ("pre_hooks", "hooks")))


def is_watched(layer: Any) -> bool:
    """Whether ``layer`` is being explained, or has a hook in its message passing or in a map that it does not call.

    Its class names such maps in ``uncalled_maps``.

    Raises:
        NotImplementedError: If it is being explained and its own class does not call ``propagate``.
    """
    held = vars(layer).get
    for name in _WATCHERS:
        if held(name):
            break
    else:
        return any(is_hooked(layer._modules.get(name)) for name in getattr(type(layer), "uncalled_maps", ()))
    if getattr(type(layer), "calls_propagate", True):
        return True
    if layer.explain:
        raise NotImplementedError(f"Expected a {type(layer).__name__} not to be in explain mode; explain APPNP instead")
    return False


def is_hooked(lin: Any) -> bool:
    """Whether somebody looks at calls of the linear map ``lin``, apart from what computes its weight."""
    if lin is None:
        return False
    if lin._forward_hooks or lin._backward_hooks or lin._backward_pre_hooks:
        return True
    return bool(lin._forward_pre_hooks) and len(lin._forward_pre_hooks) > len(weight_hooks(lin))


def mapped_by_call(lin: Any, x: QuantizedTensor) -> Any:
    """``lin(x)``; of the values that the codes stand for where hooks are to see them."""
    return lin(x.dequantize() if is_hooked(lin) else x)


def own_propagate(layer: Any) -> Any:
    """``propagate`` of the layer's own class: the one that PyG generates, or its general one where masks act."""
    cls = type(layer).float_class
    generated = not layer.explain and layer.decomposed_layers == 1
    return cls.propagate if generated else getattr(cls, "_orig_propagate", cls.propagate)


def through_pyg(layer: Any, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
    """:func:`own_propagate` of ``layer``, with hooks and masks."""
    return own_propagate(layer)(layer, edge_index, size=size, **kwargs)


def source_side(layer: Any) -> int:
    """Which of a pair sends: the first; with the other flow, in PyG's general ``propagate``, the second."""
    general = own_propagate(layer).__module__ == MessagePassing.__module__
    return int(general and layer.flow != "source_to_target")


def pair_of(layer: Any, samples: Samples, sent: Tensor, own: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What a layer that takes pairs gives to ``propagate``, of rows that are sent and rows of the targets."""
    sides = samples.shaped(sent), None if own is None else samples.shaped(own)
    return (sides[1], sides[0]) if source_side(layer) else sides


def with_propagate(graph: NormalizedGraph, propagate: Callable[[Tensor], Tensor]) -> NormalizedGraph:
    """``graph`` whose sums ``propagate`` computes, of values ``[num_src, F]``."""
    return replace(graph, propagate=propagate)


def watched_graph(
    layer: Any, graph: NormalizedGraph, samples: Samples, edge_index: Any, edge_weight: Tensor | None
) -> NormalizedGraph:
    """The operator of a layer that propagates with the normalized adjacency of GCN, by its ``propagate``."""

    def propagate(values: Tensor) -> Tensor:
        edges, weight = edge_index, edge_weight
        if layer.normalize:
            improved = getattr(layer, "improved", False)
            normalized = gcn_norm(
                edges, weight, samples.num_nodes, improved, layer.add_self_loops, layer.flow, dtype=values.dtype
            )  # of a SparseTensor there is one that has its weights
            edges, weight = normalized if isinstance(normalized, tuple) else (normalized, weight)
        edges, weight = _dropped(edges, weight, getattr(layer, "dropout", 0.0), layer.training)
        return samples.rows(through_pyg(layer, edges, x=samples.shaped(values), edge_weight=weight))

    return with_propagate(graph, propagate)


def _dropped(edge_index: Any, edge_weight: Tensor | None, p: float, training: bool) -> tuple[Any, Tensor | None]:
    """APPNP's dropout of edges."""
    if not (p > 0 and training):
        return edge_index, edge_weight
    if not isinstance(edge_index, Tensor):
        return edge_index.set_value(F.dropout(edge_index.storage.value(), p=p), layout="coo"), edge_weight
    if is_torch_sparse_tensor(edge_index):
        return set_sparse_value(edge_index, F.dropout(entries_of(edge_index)[1], p=p)), edge_weight
    assert edge_weight is not None
    return edge_index, F.dropout(edge_weight, p=p)


def values_entering(lin: Any, x: Tensor) -> Tensor:
    """``x`` as the linear map ``lin``, packed or not, takes it."""
    site = getattr(lin, "input_quantizer", None)
    return x if site is None else site(x).dequantize()


def values_mapped(lin: Any, x: Tensor) -> Tensor:
    """The linear map ``lin``, packed or not, of values that it does not round, without its bias."""
    if is_hooked(lin):
        out = lin(x)
        return out if lin.bias is None else out - lin.bias
    if hasattr(lin, "weight_quantizer"):
        return lin.apply_to(QuantizedTensor.identity(x), None)
    return F.linear(x, lin.weight)


def observed(site: Any, values: Callable[[], Tensor]) -> None:
    """Show a site what passes it where nobody looks, so that its range is known by then."""
    if site.is_observing or (site.training and not site.is_set):
        with torch.no_grad():
            site(values())


def quantized_attention(alpha: Tensor, edge_index: Any, num_nodes: int, layer: Any) -> Tensor:
    """Attention weights ``[E, H]`` of ``layer`` from numerators in its ``attention_bits``; the gradient is their own.

    A numerator over the largest one of its row is a weight over the largest one: what rows sum up to (less where
    dropout took some away) stays.
    """
    if layer.attention_bits == OFF:
        return alpha
    with torch.no_grad():
        index = edges_of(edge_index, None, layer.flow).dst
        peak = scatter(alpha, index, 0, num_nodes, reduce="max")
        peak = peak.where(peak > 0, torch.ones_like(peak))
        codes = attention_codes((alpha / peak[index]).log(), layer.attention_bits)
        total = scatter(codes, index, 0, num_nodes, reduce="sum")
        share = scatter(alpha, index, 0, num_nodes, reduce="sum") / total.clamp_min(1)
        quantized = codes * share[index]
    return alpha + (quantized - alpha).detach() if alpha.requires_grad else quantized
