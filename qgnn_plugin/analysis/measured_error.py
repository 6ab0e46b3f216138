"""A layer, how it was called, and what was found about its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["LayerCall", "MeasuredError", "Rerun"]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def _argument(self, position: int, name: str) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def features(self) -> Any:
        return self._argument(0, "x")

    @property
    def edge_index(self) -> Any:
        return self._argument(1, "edge_index")

    @property
    def edge_weight(self) -> Any:
        return self._argument(2, "edge_weight")


@dataclass(frozen=True)
class MeasuredError:
    """Errors of a layer by itself; norms are Frobenius norms.

    Args:
        error: ``||Q(H) - H||`` where messages are quantized, of several sites the largest.
        carried: Distance of the result to that without quantization.
        bound: What ``carried`` can be at most, or why there is no bound.
        norm: Of the result without quantization.
        states: Of a propagation: ``carried`` and ``bound`` of every state.
        growth: Of a layer in a deep stack: by how much it may enlarge an error of its input.
    """

    error: float
    carried: float
    bound: float | str
    norm: float
    states: tuple[tuple[float, float], ...] = ()
    growth: float | None = None


class Rerun:
    """Runs a layer again, by default as it was called.

    Args:
        layer: The layer.
        call: How it was called.
        initial: Features that entered its deep stack, :obj:`None` outside of one.
    """

    def __init__(self, layer: Any, call: LayerCall, initial: Tensor | None = None) -> None:
        self.layer, self.call, self.initial = layer, call, initial

    def __call__(self, features: Any = None, **more: Any) -> Any:
        args, kwargs = self.call.args, {**self.call.kwargs, **more}
        if features is not None:
            args, kwargs = (features, *args[1:]), {k: v for k, v in kwargs.items() if k != "x"}
        if self.initial is not None:
            self.layer._deep_stack.initial = self.initial
        return self.layer(*args, **kwargs)

    def result(self, features: Any = None) -> Tensor:
        """Its result, without attention weights."""
        out = self(features)
        return out[0] if isinstance(out, tuple) else out
