"""Calls of packed models, in which layers may defer their results: what is left of these is computed at the end."""

from __future__ import annotations

import contextlib
import weakref
from contextvars import ContextVar

import torch
from torch.overrides import TorchFunctionMode

from .stand_in import StandIn, explain_missing_memory

__all__ = ["Scope", "is_deferring", "left_to_scope"]

_scope: ContextVar[Scope | None] = ContextVar("qgnn_deferring", default=None)


class Scope:
    """One call of a packed model, as a context: the deferred tensors that were made in it.

    Args:
        mode: What looks at the functions of torch that are called in it, if anything does.
    """

    __slots__ = ("made", "mode", "outer")

    def __init__(self, mode: TorchFunctionMode | None = None) -> None:
        self.mode = mode

    def __enter__(self) -> Scope:
        self.made: list[weakref.ref[StandIn]] = []
        self.outer = _scope.get()
        _scope.set(self)
        if self.mode is not None:
            self.mode.__enter__()
        return self

    def end_mode(self) -> None:
        """Have nothing look at functions of torch from now on."""
        if self.mode is not None:
            mode, self.mode = self.mode, None
            mode.__exit__(None, None, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            explain_missing_memory(error)
            self.end_mode()
            if kind is None:
                self._compute_what_is_left()
        finally:
            _scope.set(self.outer)

    def _compute_what_is_left(self) -> None:
        """Compute what something still refers to after the call, such as an attribute of the model or a field of what
        it returns, and put ordinary tensors in its place.

        What it follows from may be written over from now on.
        """
        left = [tensor for made in self.made if (tensor := made()) is not None]
        self.made.clear()  # what is weakly referred to is not swapped
        for tensor in left:
            tensor.materialized()
        for tensor in reversed(left):  # views hold what they are of
            with contextlib.suppress(RuntimeError):  # where others refer to it so, it stays what stands for its value
                torch.utils.swap_tensors(tensor, tensor.materialized().detach())


def is_deferring() -> bool:
    """Whether a packed model is running in a :class:`Scope`; never while compiling."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and _scope.get() is not None


def left_to_scope(tensor: StandIn) -> None:
    """Have the call that runs, if any, compute ``tensor`` at its end, where something still refers to it."""
    scope = _scope.get()
    if scope is not None:
        scope.made.append(weakref.ref(tensor))
