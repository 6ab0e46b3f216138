"""Packed layers without a kernel of their own: any ``MessagePassing``, the user's own included.

The layer's ``forward`` runs as it is.  What it sends is packed once per node, and each ``propagate`` takes the first of
these ways that can compute it:

1. a message kernel, where one is found for the form of the call (:func:`.call.register_message_kernel`);
2. row blocks (:mod:`.row_blocks`), where there are more edges than one block holds;
3. PyG's own ``propagate`` on dequantized features: small graphs, hooks and explanations, compiled code, and layers
   whose functions look across rows, which a warning and the summary name.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from ...kernels.checksum import checksum
from ...layers.behaviour import is_generated
from ...layers.message_passing import PropagationChange, QuantizedMessagePassing, SentFeatures
from ...layers.watched import is_watched, own_propagate
from ..layers.base import LayerSpec, register_packed
from ..layers.conv import PackedConv
from ..layers.guard import unseen
from ..layers.ranges import PackedRange
from ..lazy.deferred import DeferredTensor
from ..lazy.producers import Producer
from .call import MessageKernel, NotByRows, Propagation, find_message_kernel
from .nodes import packed_nodes, values_of
from .relations import own_form
from .row_blocks import RowBlocks, is_one_block, run_by_rows, run_edges_by_rows, widest
from .row_checks import check_rows

__all__ = ["PackedMessagePassing"]

ROW_BLOCKS = "row blocks"


@dataclass
class _Paths:
    """How a layer's calls are computed, by their form."""

    kernels: dict[Any, MessageKernel | None] = field(default_factory=dict)
    blocks: dict[Any, RowBlocks] = field(default_factory=dict)
    unblocked: dict[Any, str] = field(default_factory=dict)
    has_form: bool = False  # whether a form of its whole forward has computed a call


_paths: WeakKeyDictionary[Any, _Paths] = WeakKeyDictionary()


class _Sent:
    """What one call of a layer has packed: relations and hops that send the same features share it."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], tuple[Tensor, Any, Any]] = {}

    def get(self, name: str, x: Tensor, pack: Callable[[], Any]) -> Any:
        state = _state_of(x)
        found = self.held.get((name, id(x)))
        if found is not None and found[0] is x and found[1] == state:
            return found[2]
        packed = pack()
        self.held[name, id(x)] = (x, state, packed)
        return packed


def _state_of(x: Tensor) -> int:
    """What tells whether ``x`` was written to."""
    if isinstance(x, DeferredTensor):
        return len(x.pending.steps)
    return checksum(x) if x.is_inference() else x._version


_sent: ContextVar[_Sent | None] = ContextVar("qgnn_sent", default=None)


class PackedMessagePassing(SentFeatures, PropagationChange, PackedConv):
    """Packed form of any ``MessagePassing``: its own functions on packed rows."""

    _runs_own_forward = True
    compiles_unblocked = True
    argument_quantizers: Any
    float_arguments: dict[str, str]
    inspector: Any
    update: Any
    fuse: bool
    node_dim: int
    flow: str
    decomposed_layers: int

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        self.__dict__.pop("propagate", None)  # of layers in several parts: theirs is that of the class
        self.float_arguments = dict(getattr(layer, "float_arguments", {}))
        if "argument_quantizers" not in self._modules:
            self.argument_quantizers = torch.nn.ModuleDict()

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        if layer.explain:
            return "explain mode"
        quantizers = [quantizer for _, quantizer in layer.own_quantizers()]
        if quantizers and layer.is_off:
            return "32 bits"
        if any(quantizer.log_scale.dtype != torch.float32 for quantizer in quantizers):
            return "its ranges are not float32"
        floats = [p for p in layer.parameters() if p.is_floating_point()]
        return None if all(p.dtype == torch.float32 for p in floats) else "its parameters are not float32"

    def _own_call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward`` of the layer's own class, in which what is sent twice is packed once."""
        token = _sent.set(_Sent())
        form = None if self._looks_in() else own_form(forward)
        try:
            out = None if form is None else unseen(form)(self, *args, **kwargs)
            if out is None:
                return forward(self, *args, **kwargs)
            self._paths.has_form = True
            return out
        finally:
            _sent.reset(token)

    @unseen
    def quantized_propagate(self, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        """Pack the node features among the arguments and compute what the layer's own ``propagate`` would."""
        if args:  # of a signature that a user's class, or PyG's template, has given it
            bound = inspect.signature(own_propagate(self)).bind_partial(self, edge_index, *args).arguments
            kwargs |= dict(list(bound.items())[2:])
        size = kwargs.pop("size", None)
        x, sent = kwargs.get("x"), self.quantized_arguments(kwargs)
        out = self._propagated(edge_index, size, sent)
        if self._smp is None or not self._is_smoothing:
            return out
        return self._corrected_change(x, values_of(sent.get("x")), out, edge_index, size)

    @unseen
    def quantized_edge_updater(self, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own ``edge_updater`` would compute, by blocks of rows where there are several."""
        own: Any = type(self).float_class
        plain = not args and not self._looks_in() and _is_generated(own, "edge_updater")
        if plain:
            size = kwargs.get("size")
            given = {name: value for name, value in kwargs.items() if name != "size"}
            out = self._by_rows(edge_index, size, given, ("edge_update",))
            if out is not None:
                return out[0]
        return own.edge_updater(self, edge_index, *args, **kwargs)

    def _path_taken(self) -> str:
        """The ways that its calls have taken; row blocks where there was none yet."""
        found = self._paths
        names = {kernel.name for kernel in found.kernels.values() if kernel is not None}
        if found.has_form and not names:
            names.add("kernel")
        if found.blocks:
            names.add(ROW_BLOCKS)
        names |= {f"unblocked: {reason}" for reason in found.unblocked.values()}
        return ", ".join(sorted(names)) or ROW_BLOCKS

    # Sent features ####################################################################################################

    def _rounded(self, name: str, value: Tensor, site: PackedRange) -> Any:
        def pack() -> Any:
            return packed_nodes(site, value, self.node_dim)

        sent = _sent.get()
        return pack() if sent is None or torch.compiler.is_compiling() else sent.get(name, value, pack)

    # Ways to compute a call ###########################################################################################

    def _looks_in(self) -> bool:
        """Whether somebody looks into the layer's message passing, or a compiler records it."""
        return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched(self)

    def _propagated(self, edge_index: Any, size: Any, sent: dict[str, Any]) -> Any:
        cls: Any = type(self).float_class
        if not self._looks_in():
            if self.decomposed_layers > 1:
                self._say(("decomposed",), "its layers are decomposed")
            elif not _is_generated(cls, "propagate"):
                self._say(("propagate",), "a propagate of its own")
            elif self.fuse and not _is_edges(edge_index):
                self._say(("fused",), "its own product with a sparse matrix", warn=False)
            else:
                out = self._by_rows(edge_index, size, sent)
                if out is not None:
                    return self._updated(out[0], edge_index, size, sent)
        given = {name: values_of(value) for name, value in sent.items()}
        return own_propagate(self)(self, edge_index, size=size, **given)

    def _by_rows(
        self, edge_index: Any, size: Any, given: dict[str, Any], stages: tuple[str, ...] = ("message", "aggregate")
    ) -> tuple[Any] | None:
        """The result of ``stages``, by a kernel or by blocks of rows; :obj:`None` where PyG's own way is taken."""
        form: Any = stages
        try:
            call = Propagation.of(self, edge_index, size, given, stages)
            form = call.form
            if stages != ("edge_update",):
                self._expect_plain_update()
                found = self._by_kernel(call)
                if found is not None:
                    return found
            paths = self._paths
            if form in paths.unblocked or is_one_block(call, widest(call)):
                return None
            if form not in paths.blocks:
                paths.blocks[form] = check_rows(call)
            run = run_edges_by_rows if stages == ("edge_update",) else run_by_rows
            return (run(call, paths.blocks[form]),)
        except NotByRows as why:
            self._paths.blocks.pop(form, None)
            self._say(form, str(why))
            return None

    def _by_kernel(self, call: Propagation) -> tuple[Any] | None:
        kernels = self._paths.kernels
        if call.form not in kernels:
            kernels[call.form] = find_message_kernel(call)
        kernel = kernels[call.form]
        if kernel is None:
            return None
        try:
            return (kernel.run(call),)
        except NotByRows:
            kernels[call.form] = None
            return None

    def _expect_plain_update(self) -> None:
        """Refuse an ``update`` that reads what edges see.

        Raises:
            NotByRows: If it does.
        """
        for name in self.inspector.get_param_names("update"):
            if name in _OF_EDGES or name[-2:] in ("_i", "_j"):
                raise NotByRows(f"its update reads '{name}'")

    def _updated(self, out: Any, edge_index: Any, size: Any, sent: dict[str, Any]) -> Any:
        cls: Any = type(self).float_class
        if cls.update is MessagePassing.update:
            return self.deferred(out) if isinstance(out, Producer) else out
        out = out.whole() if isinstance(out, Producer) else out
        names = self.inspector.get_param_names("update")
        return self.update(out, **{name: values_of(sent[name]) for name in names if name in sent})

    @property
    def _paths(self) -> _Paths:
        return _paths.setdefault(self, _Paths())

    def _say(self, form: Any, reason: str, warn: bool = True) -> None:
        """Note that calls of this form run unblocked; warn the first time."""
        known = self._paths.unblocked
        if warn and reason not in known.values():
            warnings.warn(
                f"The packed '{self._qualified_name}', a {type(self).float_class.__name__}, computes its messages for "
                f"all edges at once, in floats: {reason}; results are right, memory grows with the edges",
                stacklevel=2,
            )
        known[form] = reason


_OF_EDGES = frozenset({"index", "ptr", "edge_index", "edge_index_i", "edge_index_j", "adj_t", "size", "dim_size"})
_OF_EDGES |= {"size_i", "size_j"}


def _is_generated(cls: type, name: str) -> bool:
    """Whether the ``propagate`` or ``edge_updater`` of ``cls`` is PyG's, general or generated."""
    if getattr(cls, name) is getattr(MessagePassing, name):
        return True
    for base in cls.__mro__:
        if name in vars(base):
            return is_generated(base, name)
    return False


def _is_edges(edge_index: Any) -> bool:
    return isinstance(edge_index, Tensor) and edge_index.layout == torch.strided


register_packed(QuantizedMessagePassing, PackedMessagePassing)
