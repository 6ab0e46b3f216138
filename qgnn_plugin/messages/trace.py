"""Records what a layer's ``message`` and ``aggregate`` do with a few edges of a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from .marks import marked
from .shadow import NotTraceable, expect_no_side_effects, named_tensors, shadow_of, written

__all__ = ["Input", "Trace", "trace"]

# Rows of edges, sources and targets while tracing: numbers that no other dimension has, so that they are recognized.
_PRIMES = (211, 223, 227, 229, 233, 239, 241, 251, 257, 263, 269, 271, 277, 281, 283, 293, 307, 311, 313, 317)


@dataclass(frozen=True)
class Input:
    """A tensor that the record takes.

    Args:
        kind: ``"source"``, ``"target"``, ``"edge"``, ``"index"`` (the row of each edge), ``"source index"``,
            ``"other"`` for arguments that belong to none of these, or ``"parameter"`` of the layer.
        name: Of the parameter of ``message`` or ``aggregate``; of the layer's own, behind the path of its module.
        rest: The dimensions after the first.
    """

    kind: str
    name: str
    rest: tuple[int, ...] = ()


@dataclass
class Trace:
    """A record.

    Args:
        graph: Of ATen operations; its placeholders are ``inputs`` in order, its outputs are what ``aggregate``
            returns and the values of what is ``written``.
        inputs: What it takes.
        edges: Number of edges that it was recorded with.
        sources, targets: Numbers of nodes.
        shapes: Of the value of each node that is a tensor.
        written: Names of the layer's attributes that its functions write.
        linears: Linear maps of packed layers, by the numbers that mark them.
    """

    graph: fx.Graph
    module: fx.GraphModule
    inputs: list[Input]
    edges: int
    sources: int
    targets: int
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[fx.Node, torch.dtype] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    linears: list[nn.Module] = field(default_factory=list)


def trace(call: Any) -> Trace:
    """Record a call of ``propagate``.

    Raises:
        NotTraceable: If it cannot be recorded faithfully.
    """
    layer = call.layer
    if tuple(call.stages) != ("message", "aggregate"):
        raise NotTraceable("no message")
    if layer.training:
        raise NotTraceable("training mode")
    expect_no_side_effects(layer)
    with torch.inference_mode(False), torch.no_grad():
        return _record(call)


def _record(call: Any) -> Trace:
    layer = call.layer
    linears: list[nn.Module] = []
    copy = shadow_of(layer, lambda child: marked(child, linears), {})
    held = named_tensors(copy)
    given = _Given(call, {size for holder, name in held for size in holder[name].shape})
    samples = [*given.samples, *(holder[name].detach().clone() for holder, name in held)]
    inputs = [*given.inputs, *(Input("parameter", name) for name in _names(copy))]
    names = {stage: list(layer.inspector.get_param_names(stage)) for stage in call.stages}
    before = [holder[name] for holder, name in held]
    written_names: list[str] = []

    def run(*tensors: Tensor) -> Any:
        arguments = given.arguments(tensors[: len(given.inputs)])
        for (holder, name), tensor in zip(held, tensors[len(given.inputs) :], strict=True):
            holder[name] = tensor
        try:
            out = copy.message(**{name: arguments[name] for name in names["message"]})
            if not isinstance(out, Tensor):
                raise NotTraceable(f"its message returns a {type(out).__name__}")
            out = copy.aggregate(out, **{name: arguments[name] for name in names["aggregate"]})
        finally:
            for (holder, name), tensor in zip(held, before, strict=True):
                holder[name] = tensor
        if not isinstance(out, Tensor):
            raise NotTraceable(f"its aggregate returns a {type(out).__name__}")
        found = written(layer, copy)
        written_names[:] = sorted(found)
        for name, value in found.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != given.sizes[0]:
                raise NotTraceable(f"its functions write '{name}', which is not one entry per edge")
            copy.__dict__[name] = layer.__dict__.get(name)
        return out, *(found[name] for name in written_names)

    state = torch.random.get_rng_state()
    try:
        module = make_fx(torch.func.functionalize(run, remove="mutations"))(*samples)
    except NotTraceable:
        raise
    except Exception as error:  # whatever a user's function raises on values that are only recorded
        raise NotTraceable(f"it cannot be recorded ({type(error).__name__})") from error
    if not torch.equal(state, torch.random.get_rng_state()):
        torch.random.set_rng_state(state)
        raise NotTraceable("it draws random numbers")
    module.graph.eliminate_dead_code()
    result = Trace(module.graph, module, inputs, *given.sizes, written=tuple(written_names), linears=linears)
    _run_shapes(result, samples)
    return result


def _names(copy: nn.Module) -> list[str]:
    """The names of :func:`named_tensors`, those of their modules before them."""
    found = []
    for path, module in copy.named_modules():
        for held in (module._parameters, module._buffers):
            found += [f"{path}.{name}" for name, value in held.items() if isinstance(value, Tensor)]
    return found


class _Given:
    """Samples of a call's arguments, a few edges of it."""

    def __init__(self, call: Any, taken: set[int]) -> None:
        self.call = call
        self.values: dict[str, Any] = {}
        self.inputs: list[Input] = []
        self.samples: list[Tensor] = []
        whole = [(name, *self._kind(name)) for name in call.parameters]
        for _, _, value in whole:
            taken |= set(_tensor(value).shape[1:]) if _is_features(value) else set()
        free = [p for p in _PRIMES if p not in taken]
        self.sizes = free[0], free[1], free[2]
        edges, sources, targets = self.sizes
        generator = torch.Generator().manual_seed(0)
        device = call.plan.device
        self.col = torch.randint(sources, (edges,), generator=generator).to(device)
        # The last row has no edge.
        self.index = torch.randint(targets - 1, (edges,), generator=generator).to(device)
        for name, kind, value in whole:
            self._add(name, kind, value)

    def _kind(self, name: str) -> tuple[str, Any]:
        call = self.call
        if name in ("index", "edge_index_i"):
            return "index", None
        if name == "edge_index_j":
            return "source index", None
        if name in ("dim_size", "size_i"):
            return "plain", "targets"
        if name == "size_j":
            return "plain", "sources"
        if name in ("ptr", "adj_t"):
            return "plain", None
        if name in ("edge_index", "size"):
            return "special", None
        if name[-2:] in ("_i", "_j"):
            return ("target" if name.endswith("_i") else "source"), call.end(name)
        value = call.argument(name)
        if isinstance(value, Tensor) and call.is_per_edge(value):
            return "edge", value
        return "plain", value

    def _add(self, name: str, kind: str, value: Any) -> None:
        _, sources, targets = self.sizes
        if kind == "index":
            self._input(name, Input(kind, name), self.index)
        elif kind == "source index":
            self._input(name, Input(kind, name), self.col)
        elif kind == "special":
            i, j = self.call.ends
            if name == "size":
                size = [0, 0]
                size[i], size[j] = targets, sources
                self.values[name] = size
            else:
                raise NotTraceable("it reads the edge index")
        elif kind == "plain":
            value = {"targets": targets, "sources": sources}.get(value, value) if isinstance(value, str) else value
            if isinstance(value, Tensor):
                self._input(name, Input("other", name), value.detach().clone())
            elif isinstance(value, type):
                raise NotTraceable(f"'{name}' is not given")
            elif isinstance(value, (int, float, str, bool, type(None))):
                self.values[name] = value
            else:
                raise NotTraceable(f"'{name}' is a {type(value).__name__}")
        elif not _is_features(value):
            if value is not None:
                raise NotTraceable(f"'{name}' is a {type(value).__name__}")
            self.values[name] = None
        else:
            self._add_rows(name, kind, value)

    def _add_rows(self, name: str, kind: str, value: Any) -> None:
        tensor = _tensor(value)
        node_dim = self.call.layer.node_dim
        if kind != "edge" and (node_dim + tensor.dim() if node_dim < 0 else node_dim) != 0:
            raise NotTraceable("nodes are not its first dimension")
        if tensor.layout != torch.strided or tensor.size(0) == 0:
            raise NotTraceable(f"'{name}' is sparse or empty")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise NotTraceable(f"'{name}' is of {tensor.dtype}")
        edges, sources, targets = self.sizes
        count = {"edge": edges, "source": sources, "target": targets}[kind]
        rows = tensor.detach()[torch.arange(count, device=tensor.device) % tensor.size(0)].clone()
        if kind != "edge":
            rows = rows[self.col if kind == "source" else self.index]
        self._input(name, Input(kind, name, tuple(tensor.shape[1:])), rows)

    def _input(self, name: str, described: Input, sample: Tensor) -> None:
        self.values[name] = len(self.inputs)
        self.inputs.append(described)
        self.samples.append(sample)

    def arguments(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        names = {described.name: tensor for described, tensor in zip(self.inputs, tensors, strict=True)}
        return {name: names.get(name, value) for name, value in self.values.items()}


def _is_features(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "packed")


def _tensor(value: Any) -> Tensor:
    """The values of packed features."""
    return value if isinstance(value, Tensor) else value.values()


class _Shapes(fx.Interpreter):
    def __init__(self, result: Trace) -> None:
        super().__init__(result.module)
        self.result = result

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.result.shapes[n] = tuple(out.shape)
            self.result.dtypes[n] = out.dtype
        return out


def _run_shapes(result: Trace, samples: list[Tensor]) -> None:
    _Shapes(result).run(*samples)
