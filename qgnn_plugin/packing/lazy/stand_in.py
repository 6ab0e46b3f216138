"""Tensors that stand for values yet to be computed: what reads their memory without passing the dispatcher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

__all__ = ["StandIn", "explain_missing_memory", "refusing_reads"]


def refusing_reads(tensor: Any) -> Any:
    """``tensor``, a wrapper without memory of its own, of which code in C++ that asks for its address is told so.

    Methods of :class:`StandIn` serve readers in Python; a null pointer would be read by the others
    (``torch.utils.dlpack.to_dlpack``, functions of ``torch.utils.cpp_extension``).
    """
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


def explain_missing_memory(error: BaseException | None) -> None:
    """Raise what to do in place of the error of torch that :func:`refusing_reads` brings about.

    Raises:
        TypeError: If ``error`` is that.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("Cannot access data pointer of Tensor"):
        raise TypeError(
            "Expected an ordinary tensor where memory is read past Python (got the result of a packed layer that is "
            "not computed yet, or the weight of one): hand on its .clone(), or use torch.from_dlpack(tensor) in place "
            "of to_dlpack"
        ) from error


class StandIn:
    """Mixin of a wrapper tensor: readers of memory have those of :meth:`materialized`."""

    def materialized(self) -> Tensor:
        """The value, an ordinary tensor; computed on the first call."""
        raise NotImplementedError

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialized().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.materialized().tolist()

    def apply_(self, function: Any) -> Any:
        self.materialized().apply_(function)
        return self

    def data_ptr(self) -> int:
        return self.materialized().data_ptr()

    def untyped_storage(self) -> Any:
        return self.materialized().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialized().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.materialized(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialized().__reduce_ex__(protocol)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return self.materialized().__repr__(*args, **kwargs)
