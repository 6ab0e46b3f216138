"""Memory by its address, as kernels take it: a number enters compiled code in a fraction of what an array takes."""
# mypy: ignore-errors

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

__all__ = ["at"]


@intrinsic
def at(typingctx, address, kind):
    """The memory at ``address``, as a pointer to what ``kind`` is a number of; for ``numba.carray``."""
    result = types.CPointer(kind.dtype)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, kind), codegen
