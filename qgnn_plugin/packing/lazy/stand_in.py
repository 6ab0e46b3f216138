"""Tensors that stand for values yet to be computed: what reads their memory without passing the dispatcher."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

__all__ = ["StandIn"]


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
