"""Which fields of a batch go into a model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch_geometric.data import HeteroData
from torch_geometric.data.data import BaseData

__all__ = ["Forward", "is_data", "model_inputs", "parameters_of", "run_model", "tensors_in"]

Forward = Callable[[nn.Module, Any], Any]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Fields that a PyG model may take besides x and edge_index, as its forward names them.
OPTIONAL_FIELDS = ("edge_weight", "edge_attr", "edge_type", "batch", "pos")
ADJACENCY = ("adj_t", "edge_index")  # the first that a batch holds
ADJACENCY_NAMES = frozenset({*ADJACENCY, "adj", "adjacency"})
FEATURE_NAMES = frozenset({"x", "input", "feat", "feats", "features", "h", "node_feat", "node_features"})
FIELD_NAMES = frozenset({"y", "z", "node_type", *OPTIONAL_FIELDS})  # never stand for something else
COUNTS = ("num_nodes", "num_edges", "num_graphs")  # what data objects tell besides their fields


def model_inputs(model: nn.Module, batch: Any) -> Inputs:
    """Positional and keyword arguments of ``model`` for a batch.

    A tensor or a tuple is passed as it is, a mapping as keywords, and a list, as torch's loaders make of inputs and
    targets, without the tensors at its end that ``model.forward`` has no argument for.  A PyG ``Data``, ``Batch`` or
    ``HeteroData`` is passed whole where ``model.forward`` requires one argument and calls it ``data``, ``batch``,
    ``graph`` or the like.  Otherwise its fields are: ``x`` and the adjacency (``adj_t`` where present, else
    ``edge_index``) come first, whatever ``model.forward`` calls them; what else it requires is taken by name, and of
    ``edge_weight``, ``edge_attr``, ``edge_type``, ``batch`` and ``pos`` whichever it names and the batch holds.  Of a
    ``HeteroData`` these are the dictionaries by type.

    Raises:
        TypeError: If the batch is none of these, or ``model.forward`` takes other arguments, or several readings of it
            are possible, or there is none.
    """
    model = _unwrapped(model)
    forward = _forward_of(model)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, list):
        return _without_targets(model, tuple(batch)), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if is_data(batch):
        return _inputs_of(model, _parameters(model, forward), _Fields(batch))
    raise TypeError(
        f"Expected a PyG Data object, a tensor, a tuple of arguments or a dict of keywords (got {type(batch).__name__})"
    )


def _without_targets(model: nn.Module, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What comes before the tensors at the end of ``batch`` that ``model.forward`` has no argument for."""
    try:
        parameters = _signature(model).parameters.values()
    except (TypeError, ValueError):
        return batch
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    if not positional or any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return batch
    kept, targets = batch[: len(positional)], batch[len(positional) :]
    return kept if all(isinstance(target, Tensor) for target in targets) else batch


def run_model(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """The output of ``model`` on a batch, by ``forward(model, batch)`` where given, else by :func:`model_inputs`.

    Raises:
        TypeError: Before anything runs, if ``model.forward`` does not take what the batch gives.
    """
    if forward is not None:
        return forward(model, batch)
    args, kwargs = model_inputs(model, batch)
    _check_arguments(_unwrapped(model), args, kwargs)
    return model(*args, **kwargs)


def is_data(value: Any) -> bool:
    """Whether ``value`` is one graph (or batch of graphs), not a collection of them."""
    if isinstance(value, BaseData):
        return True
    # A data set hands on what its graphs hold, and a loader that samples one graph keeps its edges.
    if isinstance(value, (type, Dataset, DataLoader, Mapping, tuple, list)):
        return False
    return any(hasattr(value, name) for name in (*ADJACENCY, "edge_index_dict"))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a batch: in nested tuples, lists and mappings, and in the fields of data objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, BaseData):
        for store in value.stores:
            yield from tensors_in(dict(store))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_data(value):
        yield from tensors_in(getattr(value, "__dict__", {}))


# What a model takes ###################################################################################################


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model whose ``forward`` says what it takes, inside ``torch.compile`` and the wrappers of data parallelism."""
    inner = model._modules.get("_orig_mod")  # not of what a wrapper passes attributes on from
    if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _forward_of(model: nn.Module) -> Any:
    forward = getattr(model, "forward", None)
    if forward is not None and getattr(forward, "__name__", "") != "_forward_unimplemented":
        return forward
    others = [name for name in ("encode", "decode", "predict", "embed") if hasattr(model, name)]
    method = others[0] if others else "method"
    has = f", with {' and '.join(others)}" if others else ""
    raise TypeError(
        f"Expected a model with a forward (got {type(model).__name__}, which has none{has}); "
        f"{_remedy(f'model.{method}(batch.x, batch.edge_index)')}"
    )


def _remedy(call: str) -> str:
    return f"say how it runs: forward=lambda model, batch: {call}"


def _parameters(model: nn.Module, forward: Any) -> list[Parameter]:
    named = getattr(vars(model).get("signature"), "param_dict", None)
    if named:  # torch_geometric.nn.Sequential, whose forward does not tell
        return [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in named]
    try:
        return list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # compiled code, which does not tell
        return [Parameter("args", Parameter.VAR_POSITIONAL)]


def parameters_of(model: nn.Module) -> list[Parameter]:
    """What ``model`` is called with.

    Raises:
        TypeError: If it has no ``forward``.
    """
    model = _unwrapped(model)
    return _parameters(model, _forward_of(model))


def _signature(model: nn.Module) -> inspect.Signature:
    """That of ``forward``: of a decorator, which may add arguments (a converted layer's adds none), not the wrapped."""
    return inspect.signature(_forward_of(model), follow_wrapped=hasattr(type(model), "float_class"))


def _check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    forward = _forward_of(model)
    try:
        _signature(model).bind(*args, **kwargs)
    except ValueError:
        return
    except TypeError as error:
        given = [*(type(a).__name__ for a in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())]
        raise TypeError(
            f"Expected a batch that fits {_described(model, _parameters(model, forward))} "
            f"(got ({', '.join(given)}): {error}); {_remedy('model(...)')}"
        ) from None


def _described(model: nn.Module, parameters: list[Parameter]) -> str:
    stars: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}
    return f"{type(model).__name__}.forward({', '.join(stars.get(p.kind, '') + p.name for p in parameters)})"


# What a batch holds ###################################################################################################


class _Fields:
    """The fields of a ``Data``, or the dictionaries by type of a ``HeteroData``, by name."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.hetero = isinstance(batch, HeteroData) or (not isinstance(batch, BaseData) and _has_dicts(batch))

    def plain(self, name: str) -> str:
        """A field's name apart from the suffix that stands for "by type"."""
        return name.removesuffix("_dict") if self.hetero else name

    def get(self, name: str) -> Any:
        """The field, :obj:`None` where there is none."""
        name = self.plain(name)
        if name in ADJACENCY_NAMES:
            return next((v for key in ADJACENCY if (v := self._field(key)) is not None), None)
        return self._field(name)

    def _field(self, name: str) -> Any:
        if isinstance(self.batch, HeteroData):
            return self.batch.collect(name, allow_empty=True) or None
        if self.hetero:
            return getattr(self.batch, f"{name}_dict", None)
        if isinstance(self.batch, BaseData):
            known = set(self.batch.keys()) | set(COUNTS)  # not what its methods are called
            return getattr(self.batch, name, None) if name in known else None
        value = getattr(self.batch, name, None)
        return None if callable(value) and not isinstance(value, Tensor) else value


def _has_dicts(batch: Any) -> bool:
    return hasattr(batch, "edge_index_dict")


def _inputs_of(model: nn.Module, parameters: list[Parameter], fields: _Fields) -> Inputs:
    """The arguments of ``model`` from the fields of a batch."""
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    if not positional and any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return (fields.get("x"), fields.get("edge_index")), {}
    if _takes_batch(model, parameters, positional, fields):
        return (fields.batch,), {}
    args: list[Any] = []
    for place, parameter in enumerate(positional):
        value = _value_at(place, parameter, fields)
        if value is None:
            break
        args.append(value)
    kwargs: dict[str, Any] = {}
    for parameter in [*positional[len(args) :], *(p for p in parameters if p.kind is Parameter.KEYWORD_ONLY)]:
        if not _wanted(parameter, fields):
            continue
        value = fields.get(parameter.name)
        if value is not None:
            kwargs[parameter.name] = value
        elif parameter.default is Parameter.empty:
            raise TypeError(
                f"Expected a batch with what {_described(model, parameters)} requires (got no {parameter.name!r} in "
                f"{fields.batch}); {_remedy('model(batch.x, ...)')}"
            )
    return tuple(args), kwargs


def _wanted(parameter: Parameter, fields: _Fields) -> bool:
    """Whether an argument is passed where the batch has a field of its name."""
    return parameter.default is Parameter.empty or fields.plain(parameter.name) in OPTIONAL_FIELDS


def _takes_batch(model: nn.Module, parameters: list[Parameter], positional: list[Parameter], fields: _Fields) -> bool:
    """Whether the one argument that ``forward`` requires is the batch itself.

    Raises:
        TypeError: If that cannot be told.
    """
    required = [p for p in positional if p.default is Parameter.empty] or positional[:1]
    if not required:
        return False
    first = required[0]
    kind = _annotated(first)
    if kind == "data" and len(required) == 1:
        return True
    if kind == "tensor" or first.name in FEATURE_NAMES or fields.plain(first.name) in ADJACENCY_NAMES:
        return False
    like_batch = re.search(r"data|graph|batch|^g$|sample", first.name) is not None
    known = fields.get(first.name) is not None
    if len(required) == 1 and (like_batch or known):
        return like_batch
    if len(required) > 1 and not like_batch:
        return False
    raise TypeError(
        f"Expected a forward that says what it takes of a data object (got {_described(model, parameters)}, whose "
        f"{first.name!r} may be the object or its features); {_remedy('model(...)')}"
    )


def _annotated(parameter: Parameter) -> str | None:
    """``"data"`` or ``"tensor"``, after the annotation; :obj:`None` where it does not tell."""
    annotation = parameter.annotation
    if annotation is Parameter.empty:
        return None
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", None) or str(annotation)
    if re.search(r"Data\b|Batch\b", text):
        return "data"
    return "tensor" if "Tensor" in text else None


def _value_at(place: int, parameter: Parameter, fields: _Fields) -> Any:
    """What goes to a position: by name, else ``x`` first and the adjacency second; :obj:`None` to go on by keyword."""
    optional, name = parameter.default is not Parameter.empty, fields.plain(parameter.name)
    if optional and (place >= 2 or name not in {"x", *ADJACENCY_NAMES}):
        return None
    value = fields.get(name)
    if value is not None or name in FIELD_NAMES or name in ADJACENCY_NAMES:
        return value
    return fields.get(("x", "edge_index")[place]) if place < 2 else None
