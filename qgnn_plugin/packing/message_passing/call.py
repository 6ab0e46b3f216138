"""One call of ``propagate`` in a packed layer, as whatever computes it sees it: kernels, row blocks, PyG's own.

Layers without a kernel of their own go through here.  A *message kernel* takes a call whole: what finds one is
registered by :func:`register_message_kernel`, and asked once per layer and form of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from ...graph.edges import edges_of, is_sparse
from ...kernels.plan import GraphPlan
from ...layers.watched import source_side
from ..lazy.producers import Producer
from .nodes import PackedNodes, is_features
from .plans import plan_of

__all__ = ["MessageKernel", "NotByRows", "Propagation", "find_message_kernel", "register_message_kernel"]

STAGES = ("message", "aggregate")
# What PyG fills in by itself.
SPECIAL = frozenset(
    {"edge_index", "adj_t", "edge_index_i", "edge_index_j", "size", "size_i", "size_j", "ptr", "index", "dim_size"}
)
_MATRIX_VALUES = ("edge_weight", "edge_attr", "edge_type")  # PyG takes the first that a layer collects from a matrix


class NotByRows(Exception):
    """A call that cannot be computed by rows; says why."""


@dataclass(eq=False)
class Propagation:
    """A call of ``propagate`` (or ``edge_updater``).

    Args:
        layer: The packed layer.
        edge_index: Its graph, as PyG takes it.
        size: ``(rows, columns)`` of the graph as far as the caller or the features tell, both known here.
        arguments: What the layer passes; sent features are :class:`PackedNodes`, in pairs too.
        stages: The methods that it runs on edges.
    """

    layer: Any
    edge_index: Any
    size: tuple[int, int]
    arguments: Mapping[str, Any]
    stages: tuple[str, ...] = STAGES
    _sorted: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, layer: Any, edge_index: Any, size: Any, arguments: Mapping[str, Any], stages: tuple[str, ...] = STAGES
    ) -> Propagation:
        """The call with the sizes that PyG finds.

        Raises:
            NotByRows: If they are not all known, the graph is of a format that is not read here, or the layer's
                methods do not agree.
            ValueError: Of PyG, where sizes do not agree.
        """
        if not isinstance(edge_index, Tensor):
            raise NotByRows(f"a graph given as a {type(edge_index).__name__}")
        found = layer._check_input(edge_index, size)
        call = cls(layer, edge_index, (0, 0), arguments, stages)
        for name in call.parameters:
            if name[-2:] in ("_i", "_j") and name not in SPECIAL:
                call._set_sizes(found, name)
        first, second = (n if n is not None else found[1 - k] for k, n in enumerate(found))
        if first is None:
            raise NotByRows("nothing tells how many nodes there are")
        call.size = (first, second)
        return call

    def _set_sizes(self, found: list[int | None], name: str) -> None:
        value = self.arguments.get(name[:-2])
        sides = enumerate(value) if isinstance(value, (tuple, list)) else [(self._dim(name), value)]
        for dim, side in sides:
            if is_features(side):
                self.layer._set_size(found, dim, side)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the stages, by name, with their defaults.

        Raises:
            NotByRows: If two stages have one of a name with different defaults.
        """
        found: dict[str, Any] = {}
        for stage in self.stages:
            # Not PyG's union of them, which refuses methods that annotate a name differently, or one that does not.
            for name, param in self.layer.inspector.get_param_dict(stage).items():
                known = found.get(name, Parameter.empty)
                if Parameter.empty not in (known, param.default) and known != param.default:
                    raise NotByRows(f"its methods have different defaults of '{name}'")
                found[name] = param.default if known is Parameter.empty else known
        return found

    @property
    def ends(self) -> tuple[int, int]:
        """Rows of an edge index: of targets and of sources, PyG's ``i`` and ``j``."""
        return (1, 0) if self.layer.flow == "source_to_target" else (0, 1)

    def _dim(self, name: str) -> int:
        return self.ends[0 if name.endswith("_i") else 1]

    @property
    def num_dst(self) -> int:
        return self.size[self.ends[0]]

    @property
    def num_src(self) -> int:
        return self.size[self.ends[1]]

    @property
    def num_edges(self) -> int:
        if self.edge_index.layout == torch.strided:
            return self.edge_index.size(1)
        return self.edge_index._nnz()

    @cached_property
    def plan(self) -> GraphPlan:
        """The graph by targets; ``plan.sort(value)`` brings what is given per edge into its order."""
        graph = self.edge_index.as_tensor() if isinstance(self.edge_index, EdgeIndex) else self.edge_index
        return plan_of(graph, (self.num_src, self.num_dst), self.layer.flow)

    def end(self, name: str) -> Any:
        """The whole node features that a parameter ``name_i`` or ``name_j`` gathers: packed, a tensor, or nothing."""
        value = self.arguments.get(name[:-2])
        if isinstance(value, (tuple, list)):
            side = source_side(self.layer)
            return value[side if name.endswith("_j") else 1 - side]
        return value

    def per_edge(self, name: str) -> Tensor | None:
        """An argument that has one entry per edge in its first dimension, in the order of :attr:`plan`; else nothing.

        Raises:
            NotByRows: If its entries may be edges or nodes.
        """
        if name not in self._sorted:
            value = self.argument(name)
            self._sorted[name] = self.plan.sort(value) if self.is_per_edge(value) else None
        return self._sorted[name]

    def argument(self, name: str) -> Any:
        """An argument as it was given, or as PyG fills it in from a matrix."""
        value = self.arguments.get(name, self.parameters.get(name))
        if value is None and is_sparse(self.edge_index) and name == self._of_matrix:
            if name != "edge_weight":
                raise NotByRows(f"'{name}' given as the values of a sparse matrix")
            value = edges_of(self.edge_index).weight
            return torch.ones(self.num_edges, device=self.edge_index.device) if value is None else value
        return value

    @property
    def _of_matrix(self) -> str | None:
        return next((name for name in _MATRIX_VALUES if name in self.parameters), None)

    def is_per_edge(self, value: Any) -> bool:
        """Whether ``value`` has one entry per edge.

        Raises:
            NotByRows: If it may as well have one per node.
        """
        if not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != self.num_edges:
            return False
        if self.num_edges in self.size:
            raise NotByRows("as many edges as nodes, which leaves open what has one entry per edge")
        return True

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """What tells calls apart that need another kernel: kinds and dimensions of the arguments."""
        kinds = tuple((name, _kind(value)) for name, value in sorted(self.arguments.items()))
        return (self.stages, is_sparse(self.edge_index), kinds)


def _kind(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        same = len(value) == 2 and value[0] is value[1]
        return (type(value).__name__, same, *map(_kind, value))
    if isinstance(value, PackedNodes):
        return ("packed", len(value.shape), value.packed.bits)
    if isinstance(value, Tensor):
        return ("tensor", value.dim(), value.dtype, value.layout)
    return type(value).__name__


class MessageKernel(NamedTuple):
    """What computes calls of one form whole.

    Args:
        run: Takes a :class:`Propagation` and gives what ``aggregate`` would return, as a tensor or, for float32
            numbers of nodes, as a :class:`~..lazy.producers.Producer`; raises :class:`NotByRows` where it cannot.
        name: For the summary: ``"kernel"`` or ``"generated kernel"``.
    """

    run: Callable[[Propagation], Tensor | Producer]
    name: str = "kernel"


Finder = Callable[[Propagation], MessageKernel | None]
_finders: list[Finder] = []


def register_message_kernel(find: Finder) -> Finder:
    """Ask ``find`` for a kernel of each new form of call; the first one registered that has one is taken."""
    _finders.append(find)
    return find


def find_message_kernel(call: Propagation) -> MessageKernel | None:
    """The kernel for calls of this form; :obj:`None` where there is none."""
    for find in _finders:
        kernel = find(call)
        if kernel is not None:
            return kernel
    return None
