"""A device that is not the CPU, for machines without one.

Tensors there say ``meta``, hold their values on the CPU, and behave as a GPU's do: no operation takes them together
with the CPU's tensors, and nothing reads them but :meth:`~torch.Tensor.item` and its kin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "ForeignTensor", "foreign_device", "waits"]

DEVICE = torch.device("meta")
aten = torch.ops.aten
waits: list[str] = []  # what a device would have been waited for: values read back, and results sized by them


class ForeignTensor(torch.Tensor):
    """A tensor on :data:`DEVICE`, whose values are ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> ForeignTensor:
        out = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=held.requires_grad,
        )  # fmt: skip
        out.held = held
        return out

    is_meta = False

    def _read(self) -> Tensor:
        waits.append("a value read back")
        return self.held

    def item(self) -> Any:
        return self._read().item()

    def tolist(self) -> Any:
        return self._read().tolist()

    def __bool__(self) -> bool:
        return bool(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __int__(self) -> int:
        return int(self._read())

    __index__ = __int__

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ForeignTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(not issubclass(kind, (cls, torch.nn.Parameter)) and kind is not Tensor for kind in types):
            return NotImplemented  # another subclass, which knows what it wraps
        return _run(func, args, kwargs or {})


def _is_foreign(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _held(value: Any) -> Any:
    return value.held if isinstance(value, ForeignTensor) else value


def _waits(func: Any, args: Any) -> bool:
    """Whether the result's size depends on values, or is one."""
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or func is aten.equal.default


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on the values; the result is where the operands are, or where it is asked for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    foreign = [isinstance(tensor, ForeignTensor) for tensor in tensors]
    copies = func in (aten._to_copy.default, aten.copy_.default)
    if any(foreign) and _waits(func, args):
        waits.append(str(func))
    if any(foreign) and not copies and not all(f or t.dim() == 0 for f, t in zip(foreign, tensors, strict=True)):
        shapes = [(type(tensor).__name__, list(tensor.shape)) for tensor in tensors]
        raise RuntimeError(f"Expected all tensors of {func} on one device (got {shapes})")
    result_is_foreign = any(foreign)
    if func is aten.copy_.default:
        result_is_foreign = foreign[0]
    if kwargs.get("device") is not None:
        result_is_foreign = _is_foreign(kwargs["device"])
        if any(foreign) and not result_is_foreign:
            waits.append("a copy to the CPU")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(_held(tensor)): tensor for tensor in tensors}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if copies and func is not aten.copy_.default and id(value) in known:
            value = value.clone()
        elif id(value) in known:  # changed in place
            return known[id(value)]
        return ForeignTensor(value) if result_is_foreign else value

    return tree_map(wrapped, out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {type(leaf) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        if kinds - {Tensor, torch.nn.Parameter, ForeignTensor}:
            return func(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


@contextmanager
def foreign_device() -> Iterator[torch.device]:
    """:data:`DEVICE` takes part in everything that runs inside."""
    original: Callable[..., Tensor] = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        out = original(data, **kwargs)  # torch builds it on the CPU, unseen by the dispatcher
        return ForeignTensor(out) if _is_foreign(device) else out

    torch.tensor = tensor
    try:
        with _Dispatch():
            yield DEVICE
    finally:
        torch.tensor = original
