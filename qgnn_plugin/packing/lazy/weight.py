"""The weight of a packed layer, to be read as the float matrix it stands for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .calls import is_deferring
from .stand_in import StandIn, refusing_reads

__all__ = ["FrozenWeight", "is_transforming", "read_only", "refuse_dtype"]


def read_only(layer: str, attempt: str) -> ValueError:
    """The error of whoever writes to a weight that is held as packed words."""
    return ValueError(
        f"Expected the weight of the packed '{layer}' to be read only (got {attempt}): it is dequantized from packed "
        f"words, and a write would be lost; change the quantized model and pack it again, or work on a .clone()"
    )


def refuse_dtype(what: str, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise where ``fn``, which is to be applied to all tensors of something packed, changes their dtype.

    Raises:
        ValueError: If it does, as that of ``.half()``.
    """
    dtype = fn(torch.zeros(1, dtype=torch.float32)).dtype
    if dtype != torch.float32:
        raise ValueError(
            f"Expected the packed {what} to stay in float32 (got {str(dtype).removeprefix('torch.')}): codes are "
            f"integers and their ranges float32, whatever the model was; give it float32 features, and convert what "
            f"it returns"
        )


class FrozenWeight(StandIn, Tensor):  # type: ignore[misc]
    """A float32 matrix that is dequantized when its values are touched; what would write to it raises.

    Shape, dtype and device are known without.  Views of it, such as ``.t()`` or ``.data``, are read-only too.

    Args:
        layer: What errors call it: its layer, or its own name in there.
        value: The matrix, or what computes it.
        shape: Its shape, of a value yet to be computed.
        device: Its device, likewise.
        is_same: Whether the converted model reads these values too; else whoever reads them while the packed model
            runs is warned.
        owner: Its layer, where ``layer`` is its own name.
    """

    _layer: str
    _owner: str
    _value: Tensor | Callable[[], Tensor]
    _is_same: bool
    rows: Callable[[Tensor], Tensor] | None = None  # those numbered by indices, without the others

    @staticmethod
    def __new__(
        cls,
        layer: str,
        value: Tensor | Callable[[], Tensor],
        shape: torch.Size,
        device: torch.device,
        is_same: bool = True,
        owner: str | None = None,
    ) -> FrozenWeight:
        strides = value.stride() if isinstance(value, Tensor) else None
        dtype = value.dtype if isinstance(value, Tensor) else torch.float32
        weight = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)
        weight._layer, weight._value, weight._is_same = layer, value, is_same
        weight._owner = layer if owner is None else owner
        return refusing_reads(weight)

    # Fast paths of torch.nn that would take the matrix past its layer leave tensors with a torch function alone.
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if is_transforming():
                return func(*_plain(args), **_plain(kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        if written is not None:
            raise read_only(written._layer, func.__name__)
        if args and isinstance(args[0], cls) and args[0].rows is not None and not kwargs and func in _OF_ROWS:
            part = _OF_ROWS[func](*args)
            if part is not None:
                return part
        out = func(*_plain(args), **_plain(kwargs))
        frozen = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, cls)]
        if all(value.alias_info is None for value in func._schema.returns):
            if func.overloadpacket not in _MADE_LIKE:
                _warn_of_others([weight for weight in frozen if not weight._is_same])
            return out
        layer, is_same, owner = frozen[0]._layer, frozen[0]._is_same, frozen[0]._owner
        if isinstance(out, Tensor):
            return cls(layer, out, out.shape, out.device, is_same, owner)
        return tree_map_only(Tensor, lambda view: cls(layer, view, view.shape, view.device, is_same, owner), out)

    def materialized(self) -> Tensor:
        if not isinstance(self._value, Tensor):
            with torch.no_grad():
                self._value = self._value()
        return self._value

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise read_only(self._layer, "an assignment to .data")

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad:
            raise read_only(self._layer, "requires_grad_()")
        return self

    # What reads memory, without a way to write to it:

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        array = self.materialized().numpy(*args, **kwargs)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialized().__array__(*args, **kwargs).copy()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialized().clone().__dlpack__(*args, **kwargs)


def is_transforming() -> bool:
    """Whether a transform of ``torch.func`` runs, such as that by which messages are recorded.

    What a weight is computed of may be the transform's then, which is gone where an operation comes to dispatch: read
    there, it would end the process.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


aten = torch.ops.aten
# What takes a tensor for its shape, dtype and device alone.
_MADE_LIKE = {
    *(aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like),
    *(aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full, aten.new_empty_strided, aten.is_same_size),
}


def _slice(weight: FrozenWeight, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor | None:
    """``weight[start:end]``, of which the other rows are not dequantized."""
    first, last, _ = slice(start, end).indices(weight.size(0))
    rows, device = weight.rows, weight.device
    if dim != 0 or step != 1 or first >= last or rows is None:
        return None
    shape = torch.Size((last - first, *weight.shape[1:]))
    part = FrozenWeight(
        weight._layer, lambda: rows(torch.arange(first, last, device=device)), shape, device, weight._is_same,
        weight._owner,
    )  # fmt: skip
    part.rows = lambda index: rows(index + first)
    return part


def _take(weight: FrozenWeight, index: Any) -> Tensor | None:
    """The rows numbered by ``index``, where these are no more than all and none counts from the end."""
    if type(index) is not Tensor or index.dtype not in (torch.int64, torch.int32) or weight.rows is None:
        return None
    if not 0 < index.numel() <= weight.size(0) or index.device != weight.device:
        return None
    low, high = index.aminmax()
    if low < 0 or high >= weight.size(0):
        return None
    if not weight._is_same:
        _warn_of_others([weight])
    return weight.rows(index.reshape(-1).long()).view(*index.shape, *weight.shape[1:])


# What reads some rows, and views of these.
_OF_ROWS: dict[Any, Callable[..., Tensor | None]] = {
    aten.slice.Tensor: _slice,
    aten.index_select.default: lambda weight, dim, index: _take(weight, index) if dim == 0 else None,
    aten.index.Tensor: lambda weight, indices: _take(weight, indices[0]) if len(indices) == 1 else None,
    aten.embedding.default: lambda weight, index, *rest: _take(weight, index),
}


def _warn_of_others(weights: list[FrozenWeight]) -> None:
    """Warn where a packed model that runs reads weights that its converted form takes in floats."""
    if weights and is_deferring():
        listed = ", ".join(f"'{weight._layer}'" for weight in weights)
        owners = ", ".join(f"'{name}'" for name in dict.fromkeys(weight._owner for weight in weights))
        warnings.warn(
            f"The values of the weight of {listed} are read past the packed layer, by the model's code or a hook: they "
            f"are those of its codes, where the converted model has the float weight, so that results made of them "
            f"differ; exclude {owners} from conversion",
            stacklevel=3,
        )


_NESTED = (tuple, list, dict)


def _plain(value: Any) -> Any:
    """Weights among arguments as the matrices that they stand for."""
    if isinstance(value, FrozenWeight):
        return value.materialized()
    if type(value) is tuple:  # looks at most arguments alone: those of an operation are asked for again and again
        return tuple(_plain(one) if isinstance(one, (FrozenWeight, *_NESTED)) else one for one in value)
    return tree_map_only(FrozenWeight, FrozenWeight.materialized, value) if isinstance(value, _NESTED) else value


def _leaves(args: tuple[Any, ...]) -> list[Any]:
    return [leaf for arg in args for leaf in (tree_leaves(arg) if isinstance(arg, _NESTED) else (arg,))]


def _written(func: Any, args: Any, kwargs: Any) -> FrozenWeight | None:
    """The frozen weight that ``func`` would write to."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for leaf in tree_leaves(value):
                if isinstance(leaf, FrozenWeight):
                    return leaf
    return None
