"""Message passing: the base of every converted convolution, and the generic path for any other ``MessagePassing``."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import OFF
from ..graph.adjacency import gcn_graph, has_fixed_graph
from ..graph.samples import Samples
from ..quantizers import QLRQuantizer
from ..quantizers.autocast import is_autocasting
from ..smp.constraint import SmoothLayer, attach_constraint
from .arithmetic import own_copy
from .base import QuantizedLayer, QuantizerDict, SiteFactory
from .usage import is_position, is_relative
from .watched import own_propagate, source_side

__all__ = ["SUM", "PropagationChange", "QuantizedConv", "QuantizedMessagePassing", "SentFeatures"]

# Arguments called as the scalars of an attention mechanism or a normalization are.  Shapes decide whether they are.
SCALARS = frozenset({"alpha", "alpha_l", "alpha_r", "norm", "deg", "score", "index"})

SITES = "argument_quantizers."
SUM = ("add", "sum")  # the names of that aggregation
COMPARING = ("max", "min")  # aggregations that pick a value instead of adding


class PropagationChange(SmoothLayer):
    """Mixin of layers whose ``propagate`` has a smoothness constraint around it."""

    flow: str
    _qualified_name: Any

    def _corrected_change(self, x: Any, sent: Any, out: Any, edge_index: Any, size: Any) -> Any:
        """``out`` with its change from ``sent``, the values that ``x`` was rounded to, corrected or measured."""
        if isinstance(x, (tuple, list)):  # of two sides that may be one and the same
            sent = sent[0] if isinstance(sent, (tuple, list)) and len(x) == 2 and x[0] is x[1] else None
        # x may have been quantized; the constraint is on what the layer does to what it propagates.
        return self._smoothed_change(sent, out, edge_index, size)

    def _smoothed_change(self, x: Any, out: Any, edge_index: Any, size: Any) -> Any:
        """``out`` with its change corrected, or measured; as it is where a graph has no change from node to node."""
        if self._measures:
            self._constraint_state = None
        if size is not None or not self._is_square(x, out) or not _is_scalar(edge_index):
            return out
        assert isinstance(x, Tensor)
        samples = Samples.of(self, x)
        try:
            graph = gcn_graph(edge_index, None, samples.num_nodes, flow=self.flow, dtype=x.dtype, copies=samples.copies)
        except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            # Edges that are none between these nodes, which the layer's own functions know to read.
            if has_fixed_graph():
                raise
            if self._is_smoothing:
                warnings.warn(
                    f"The smoothness correction of '{self._qualified_name}' does not act: its edges are none between "
                    f"the nodes it changes; give it 'smp': None in QuantConfig.overrides",
                    stacklevel=2,
                )
            return out
        smoothed = self._smooth(samples.rows(x), samples.rows(out), graph.apply, graph.plan.num_edges)
        return samples.shaped(smoothed)

    def _is_square(self, x: Any, out: Any) -> bool:
        """Whether ``x`` and ``out`` are features ``[*, N, F]`` of the same nodes, in numbers that can be compared."""
        if not (isinstance(x, Tensor) and isinstance(out, Tensor)) or x.layout != torch.strided:
            return False
        node_dim: int = getattr(self, "node_dim", -2)
        # Nodes first, and more dimensions after them: these are heads or vectors.
        has_nodes = node_dim in (-2, 0) if x.dim() == 2 else -x.dim() <= node_dim < -1
        return has_nodes and x.shape == out.shape and x.is_floating_point() and out.is_floating_point()


class QuantizedConv(QuantizedLayer, PropagationChange):
    """Base of converted ``MessagePassing`` layers: a smoothness constraint around ``propagate``.

    ``aggregations`` are those that the quantized form computes, :obj:`None` for any; a layer that was made with another
    one is converted by what it sends.
    """

    aggregations: ClassVar[tuple[str, ...] | None] = None
    flow: str
    explain: bool | None
    decomposed_layers: int

    def __setstate__(self, data: dict[str, Any]) -> None:
        _write_templates(type(self).float_class, data)
        super().__setstate__(data)

    def quantized_propagate(self, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        """Quantize the node features among the arguments, run the layer's own ``propagate``, smooth its change.

        Becomes ``propagate`` of the concrete class (see :func:`~qgnn_plugin.layers.base.quantized_class`).
        """
        if args:  # of a signature that a user's class, or PyG's template, has given it
            bound = inspect.signature(own_propagate(self)).bind_partial(self, edge_index, *args).arguments
            kwargs |= dict(list(bound.items())[2:])
        x, size = kwargs.get("x"), kwargs.get("size")
        kwargs = self.quantized_arguments(kwargs)
        out = self.float_propagate(edge_index, **kwargs)
        if not self._minds_change:
            return out
        return self._corrected_change(x, kwargs.get("x"), out, edge_index, size)

    def quantized_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Replace the node features a layer sends by their quantized values; nothing to do by default."""
        return kwargs

    def float_propagate(self, edge_index: Any, **kwargs: Any) -> Any:
        """The original ``propagate`` of the layer's own class."""
        return own_propagate(self)(self, edge_index, **kwargs)

    def quantized_edge_updater(self, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        """The original ``edge_updater`` of the layer's own class; becomes that of the concrete class."""
        return type(self).float_class.edge_updater(self, edge_index, *args, **kwargs)  # type: ignore[attr-defined]


class SentFeatures:
    """Mixin of converted and packed layers: which arguments of ``propagate`` are quantized, and their rounding."""

    argument_quantizers: Any
    float_arguments: dict[str, str]
    _user_args: list[str]

    def _rounded(self, name: str, value: Tensor, site: Any) -> Any:
        """``value`` in the range of ``site``, that of the argument ``name``."""
        raise NotImplementedError

    def quantized_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        out = dict(kwargs)
        widths = {name: self._sent_width(kwargs.get(name)) for name in self.argument_quantizers}
        for name, quantizer in self.argument_quantizers.items():
            if self._sent(out.get(name)) is None or quantizer.bits == OFF:
                continue
            reason = self._reason_for_floats(name, kwargs, widths)
            if reason is None:
                self.float_arguments.pop(name, None)
                out[name] = self._quantized(name, out[name], quantizer)
            else:
                self.float_arguments[name] = reason
        return out

    def _sent(self, value: Any) -> Any:
        """What neighbours send of ``value``: of a pair, the side of the sources."""
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return value[source_side(self)]
        return value

    def _sent_width(self, value: Any) -> int:
        """How many numbers of ``value`` a node sends; 0 where they are no floats."""
        value = self._sent(value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            return 0
        return math.prod(value.shape[1:])

    def _reason_for_floats(self, name: str, kwargs: dict[str, Any], widths: dict[str, int]) -> str | None:
        """Why the argument ``name`` is not quantized; :obj:`None` where it is."""
        sent = self._sent(kwargs[name])
        if not isinstance(sent, Tensor):
            return f"a {type(sent).__name__}, no tensor"
        if sent.layout != torch.strided:
            return "a sparse matrix"
        if not sent.is_floating_point():
            return f"of the type {str(sent.dtype).removeprefix('torch.')}"
        if sent.dim() < 2:
            return "one number per node"
        widest = max(widths.values())
        if sent.dim() == 2 and sent.size(1) < widest:
            # Beside wider features: a normalization, or one logit per head of them.
            heads = sent.size(1)
            if heads == 1:
                return "one number per node"
            others = [self._sent(kwargs[other]) for other, width in widths.items() if width > heads]
            if heads == getattr(self, "heads", None) or any(o.dim() == 3 and o.size(1) == heads for o in others):
                return "one number per head"
        return None

    def _quantized(self, name: str, value: Any, quantizer: Any) -> Any:
        """Quantize a tensor; of a pair the sources, and the targets where they are read as sources are."""
        if isinstance(value, Tensor):
            return self._rounded(name, value, quantizer)
        sides, source = list(value), source_side(self)
        sent = sides[source]
        sides[source] = self._rounded(name, sent, quantizer)
        other = sides[1 - source]
        if not {name, f"{name}_i"} & set(self._user_args) or not isinstance(other, Tensor):
            return tuple(sides)
        if other is sent:
            sides[1 - source] = sides[source]
        elif other.is_floating_point() and other.layout == torch.strided and other.shape[1:] == sent.shape[1:]:
            sides[1 - source] = self._rounded(name, other, quantizer)
        return tuple(sides)


class QuantizedMessagePassing(SentFeatures, QuantizedConv):
    """Generic path: every node-feature argument that a layer sends (``*_j``) is quantized once per node.

    An argument that a message reads at both ends of an edge is quantized at both, in one range.  What matters by its
    differences alone, such as coordinates, stays in full precision, and so do numbers that are one per node or per
    attention head, whatever their names; ``float_arguments`` says which, and why.  Inner linear layers are converted on
    their own; edge features and the aggregation stay wider.
    """

    argument_quantizers: QuantizerDict
    is_adopted: bool = False  # whether its quantizers are those of a packed model, all of them of features

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.argument_quantizers, layer.float_arguments = QuantizerDict(), {}
        for name in sorted({name[:-2] for name in layer._user_args if name.endswith("_j")}):
            if is_position(name) or is_relative(layer, name):
                layer.float_arguments[name] = "only its differences matter"
                continue
            layer.argument_quantizers[name] = cls._message_site(layer, sites, name)
        attach_constraint(layer, sites.config.smp, sites.device)

    @staticmethod
    def _message_site(layer: Any, sites: SiteFactory, name: str) -> QLRQuantizer:
        if layer.aggr in COMPARING and sites.config.granularity == "row":
            # Codes of different multiples of a range do not compare as the values do.
            sites = replace(sites, config=replace(sites.config, granularity="tensor"))
        if name in SCALARS:
            # Probably no features: parameters would never get the gradient that optimizers and DDP expect.
            sites = replace(sites, config=replace(sites.config, learn_ranges=False))
        return sites.message(f"message.{name}")

    def __setstate__(self, data: dict[str, Any]) -> None:
        super().__setstate__({"float_arguments": {}, **data})  # pickles of version 1 have none

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the state of a version that decided by names: without sites for scalars, with some for positions."""
        sites = f"{prefix}argument_quantizers."
        for key in [key for key in state_dict if key.startswith(sites)]:
            if key.removeprefix(sites).split(".")[0] not in self.argument_quantizers:
                del state_dict[key]
        for name, quantizer in self.argument_quantizers.items():
            if name in SCALARS and not any(key.startswith(f"{sites}{name}.") for key in state_dict):
                state_dict |= quantizer.state_dict(prefix=f"{sites}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adopt(self, saved: Collection[str], sites: SiteFactory | None = None) -> None:
        """Have quantizers for exactly those arguments that a packed model has ranges of.

        Args:
            saved: Names of its sites.
            sites: Makes those that are missing.
        """
        self.is_adopted = True
        names = {name.removeprefix(SITES) for name in saved if name.startswith(SITES)}
        for name in set(self.argument_quantizers) - names:
            del self.argument_quantizers[name]
        for name in sorted(names - set(self.argument_quantizers)):
            if sites is not None:
                self.argument_quantizers[name] = self._message_site(self, sites, name).eval()
                self.float_arguments.pop(name, None)

    def own_quantizers(self) -> Iterator[tuple[str, QLRQuantizer]]:
        for name, quantizer in super().own_quantizers():
            if self.is_adopted or quantizer.is_set or name.removeprefix(SITES) not in SCALARS:
                yield name, quantizer

    def _rounded(self, name: str, value: Tensor, site: QLRQuantizer) -> Any:
        x = own_copy(value.float() if is_autocasting() else value)
        node_dim: int = getattr(self, "node_dim", -2)
        dim = node_dim + x.dim() if node_dim < 0 else node_dim
        if site.granularity != "row" or x.dim() < 3 or not 0 <= dim < x.dim() - 1:
            return site(x).dequantize()
        # All that a node sends has one multiplier, in each sample its own.
        return site(x.flatten(dim + 1).flatten(0, dim)).dequantize().view(x.shape)


def _is_scalar(edge_index: Any) -> bool:
    """Whether a sparse adjacency, if it is one, has one number per edge."""
    value = None
    if isinstance(edge_index, Tensor):
        if edge_index.layout == torch.sparse_coo:
            value = edge_index._values()
        elif edge_index.layout in (torch.sparse_csr, torch.sparse_csc):
            value = edge_index.values()
    elif hasattr(edge_index, "storage"):
        value = edge_index.storage.value()
    return value is None or (value.dim() == 1 and not value.is_complex())


def _write_templates(cls: Any, data: dict[str, Any]) -> None:
    """Have PyG write its ``propagate`` onto a class of which this process has made no instance yet.

    Otherwise the class would go by what its parent has, which takes the arguments of the parent's message.
    """
    if "propagate" not in vars(cls):
        probe = object.__new__(cls)
        probe.__dict__ |= {name: data[name] for name in ("inspector", "fuse")}
        probe._set_jittable_templates()
