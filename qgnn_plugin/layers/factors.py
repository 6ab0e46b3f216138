"""Weights that a layer's own code multiplies by: ``x @ self.weight`` with integers, whatever else with their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Factor", "FactorTensor", "UsedWeight", "not_reading", "reading", "readings"]


class Multiplier(Protocol):
    """What a factor asks of the layer that it belongs to."""

    def _times_features(self, x: Tensor, name: str, matrix: Any) -> Tensor:
        """``x W^T`` of ``[*, K]``."""

    def _part(self, weight: Any, start: int, stop: int) -> Any:
        """Rows of a matrix."""


@dataclass(frozen=True)
class Factor:
    """A weight ``[*lead, K, O]``, or ``[*lead, O, K]``, as the rows ``[*lead, O]`` of a matrix over ``K``.

    With ``K`` in another place, ``lead`` and ``O`` are the dimensions that are left.

    Args:
        layer: Whose it is.
        name: Its name there.
        matrix: The rows.
        lead: The leading dimensions.
        num_out: ``O``.
        num_in: ``K``.
        summed: The dimension of ``K``, negative.
    """

    layer: Multiplier
    name: str
    matrix: Any
    lead: tuple[int, ...]
    num_out: int
    num_in: int
    summed: int

    def at(self, index: int) -> Factor:
        """One of the leading dimension."""
        size = math.prod(self.lead[1:]) * self.num_out
        index += self.lead[0] if index < 0 else 0
        part = self.layer._part(self.matrix, index * size, (index + 1) * size)
        return replace(self, matrix=part, lead=self.lead[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        rows = [*self.lead, self.num_out]
        rows.insert(len(rows) + 1 + self.summed, self.num_in)
        return tuple(rows)

    @property
    def has_lead(self) -> bool:
        """Whether leading dimensions may be taken apart."""
        return bool(self.lead) and self.summed in (-1, -2)

    def times(self, x: Tensor) -> Tensor:
        """``x W^T`` ``[*, rows]`` of ``[*, K]``."""
        return self.layer._times_features(x, self.name, self.matrix)


class FactorTensor:
    """Mixin of tensors that stand for a weight while its layer runs: products with them are the layer's.

    Views of one, such as ``W[i]`` and ``W.t()``, are factors too; whatever else is asked of it sees its values.
    """

    _factor: Any = None  # a Factor

    def _values(self) -> Any:
        """What operations take that are no products."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _VIEWS and _is_factor(args[0]):
                factor = _VIEWS[func](args[0]._factor, *args[1:], **kwargs)
                if factor is not None:
                    return args[0]._viewed(lambda w: func(w, *args[1:], **kwargs), factor)
            elif func in _PRODUCTS:
                found = _PRODUCTS[func](*args, **kwargs)
                if found is not None:
                    return found
            return _unwrapped(func(*(_plain(a) for a in args), **{k: _plain(v) for k, v in kwargs.items()}))


def _is_factor(x: Any) -> bool:
    return isinstance(x, FactorTensor) and x._factor is not None


def _plain(x: Any) -> Any:
    """The values of a weight as an ordinary tensor."""
    if isinstance(x, FactorTensor):
        return x._values()
    if isinstance(x, (tuple, list)) and any(map(_is_factor, x)):
        return type(x)(_plain(item) for item in x)
    return x


def _unwrapped(out: Any) -> Any:
    if isinstance(out, UsedWeight):
        return out.as_subclass(Tensor)
    if type(out) in (tuple, list):
        return type(out)(_unwrapped(item) for item in out)
    return out


class UsedWeight(FactorTensor, Tensor):
    """The quantized values of a weight of a converted layer."""

    @staticmethod
    def of(values: Tensor, factor: Factor) -> UsedWeight:
        weight = values.as_subclass(UsedWeight)
        weight._factor = factor
        return weight

    def _values(self) -> Tensor:
        return self.as_subclass(Tensor)

    def _viewed(self, view: Callable[[Tensor], Any], factor: Factor | list[Factor]) -> Any:
        out = view(self.as_subclass(Tensor))
        if isinstance(factor, list):
            return tuple(UsedWeight.of(part, own) for part, own in zip(out, factor, strict=True))
        return UsedWeight.of(out, factor)


# Views ################################################################################################################


def _item(w: Factor, index: Any) -> Factor | None:
    return w.at(index) if w.has_lead and type(index) is int and -w.lead[0] <= index < w.lead[0] else None


def _unbound(w: Factor, dim: int = 0) -> list[Factor] | None:
    return [w.at(i) for i in range(w.lead[0])] if w.has_lead and dim == 0 else None


def _turned(w: Factor) -> Factor | None:
    return replace(w, summed=-3 - w.summed) if w.summed in (-1, -2) else None


def _turned_matrix(w: Factor) -> Factor | None:
    return None if w.lead else _turned(w)


def _transposed(w: Factor, first: int, second: int) -> Factor | None:
    dims = len(w.lead) + 2
    last = {dim - dims if dim >= 0 else dim for dim in (first, second)}
    return _turned(w) if last == {-1, -2} and w.summed in last else None


def _same(w: Factor, *args: Any, **kwargs: Any) -> Factor | None:
    return None if args or kwargs else w


_VIEWS: dict[Any, Callable[..., Factor | list[Factor] | None]] = {
    Tensor.__getitem__: _item,
    Tensor.unbind: _unbound,
    torch.unbind: _unbound,
    Tensor.t: _turned_matrix,
    torch.t: _turned_matrix,
    Tensor.T.__get__: _turned_matrix,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _turned,  # type: ignore[attr-defined]
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    Tensor.contiguous: _same,
}


# Products #############################################################################################################


def _is_features(x: Any, dims: int = 1) -> bool:
    """Whether ``x`` is something that can be quantized as features are."""
    dense = isinstance(x, Tensor) and not _is_factor(x) and x.layout == torch.strided and x.is_floating_point()
    return dense and x.dim() >= dims


def _matmul(x: Any, w: Any) -> Tensor | None:
    if _is_features(x) and _is_factor(w):
        return _right(x, w._factor)
    if _is_factor(x) and _is_features(w, 2) and w.dim() == 2 and not x._factor.lead and x._factor.summed == -1:
        return x._factor.times(w.t()).t()
    return None


def _right(x: Tensor, w: Factor) -> Tensor | None:
    """``x @ W``."""
    if w.summed != -2:
        return None
    if not w.lead:
        return w.times(x)
    if len(w.lead) != 1:
        return None
    if x.dim() == 2 or (x.dim() == 3 and x.size(0) == 1):
        rows = x if x.dim() == 2 else x[0]
        return w.times(rows).unflatten(-1, (w.lead[0], w.num_out)).transpose(0, 1)
    if x.dim() == 3 and x.size(0) == w.lead[0]:
        return torch.stack([w.at(i).times(part) for i, part in enumerate(x.unbind(0))])
    return None


def _addmm(bias: Any, x: Any, w: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    product = None if _is_factor(bias) else _matmul(x, w)
    if product is None:
        return None
    return (bias if beta == 1 else beta * bias) + (product if alpha == 1 else alpha * product)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if not (_is_features(input) and _is_factor(weight)) or weight._factor.lead or weight._factor.summed != -1:
        return None
    y = weight._factor.times(input)
    return y if bias is None else y + bias


def _einsum(equation: Any, *operands: Any) -> Tensor | None:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return None
    terms, out = equation.replace(" ", "").split("->")
    pairs = list(zip(terms.split(","), operands, strict=True))
    if _is_factor(pairs[0][1]):
        pairs.reverse()
    (a, x), (b, w) = pairs
    if not _is_features(x) or not _is_factor(w) or any(len(set(t)) < len(t) for t in (a, b, out)):
        return None
    factor: Factor = w._factor
    shared = [label for label in a if label in b]
    rest = [label for label in b if label not in a]
    # One sum, over the dimension that rows are over; all others are of one of the two.
    if len(shared) != 1 or shared[0] in out or b[factor.summed] != shared[0] or len(out) != len(a) + len(b) - 2:
        return None
    place = a.index(shared[0])
    y = factor.times(x.movedim(place, -1)).unflatten(-1, (*factor.lead, factor.num_out))
    labels = [*(label for label in a if label != shared[0]), *rest]
    return y.permute([labels.index(label) for label in out])


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.bmm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda w, x: _matmul(x, w),
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.linear: _linear,
    torch.einsum: _einsum,
}


# Where ################################################################################################################

_READING: ContextVar[dict[int, dict[str, Any]] | None] = ContextVar("qgnn_reading", default=None)


@contextmanager
def reading(*modules: Any) -> Iterator[None]:
    """While their code runs: what ``modules`` are asked for their weights gives the quantized ones."""
    outer = _READING.get() or {}
    token = _READING.set({**{id(module): {} for module in modules}, **outer})
    try:
        yield
    finally:
        _READING.reset(token)


@contextmanager
def not_reading(module: Any) -> Iterator[None]:
    """While a module reads its own weights as they are."""
    found = _READING.get()
    token = _READING.set({key: value for key, value in found.items() if key != id(module)}) if found else None
    try:
        yield
    finally:
        if token is not None:
            _READING.reset(token)


def readings(module: Any) -> dict[str, Any] | None:
    """What was read of ``module`` so far, :obj:`None` where its code does not run."""
    found = _READING.get()
    return None if found is None else found.get(id(module))
