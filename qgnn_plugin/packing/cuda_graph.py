"""A packed model as one CUDA graph: on small graphs launches take longer than what they launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ..kernels.cache import Fingerprint, parts_of, pinned_plans
from .model import is_packed

__all__ = ["CapturedModel", "capture"]

WARM_UP = 3  # passes before the capture: they build plans, prepare weights and compile kernels


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedModel:
    """Record a forward pass of a packed model in a CUDA graph and return what replays it.

    ::

        captured = qgnn.capture(packed, x, edge_index)
        logits = captured(x, edge_index)  # the kernels alone; x may hold other values, of the same shape

    The graph, every other integer tensor and everything that is no tensor are part of the recording: a call with
    others is refused.  Hooks and whatever else Python does in ``forward`` happen while recording and not again.

    Args:
        model: A packed model (:func:`qgnn_plugin.pack_model`) on a CUDA device, in eval mode.
        args, kwargs: Its inputs.  Floating point tensors may hold other values in later calls.

    Raises:
        ValueError: If the model is not packed or training, or a tensor is not on one CUDA device.
        RuntimeError: If the model cannot be recorded, for example since its ``forward`` reads a value back.
    """
    if not is_packed(model):
        raise ValueError(f"Expected a packed model (got {type(model).__name__}); pack it with 'pack_model' first")
    if model.training:
        raise ValueError("Expected a model in eval mode (got training mode); call 'model.eval()' first")
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    found = sorted({str(t.device) for t in (*tensors, *model.parameters(), *model.buffers())})
    if len(found) != 1 or not _can_capture(torch.device(found[0])):
        raise ValueError(
            f"Expected the model and its inputs on one CUDA device (got {', '.join(found) or 'no tensors'}): CUDA "
            "graphs exist only there; move them with '.to(\"cuda\")', or call the model itself"
        )
    return CapturedModel(model, leaves, spec)


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


class CapturedModel:
    """A recorded forward pass of a packed model; made by :func:`capture`.

    Attributes:
        model: The model that was recorded.
    """

    def __init__(self, model: nn.Module, leaves: list[Any], spec: TreeSpec) -> None:
        self.model, self._spec, self._given = model, spec, leaves
        # Values that may change get memory of their own, which the recording reads.
        self._held = [leaf.detach().clone() if _may_change(leaf) else leaf for leaf in leaves]
        self._fixed = {i: _fingerprint(leaf) for i, leaf in enumerate(leaves) if _is_fixed_tensor(leaf)}
        args, kwargs = tree_unflatten(self._held, spec)
        with torch.no_grad(), pinned_plans() as self._pins:
            self._replay, self._out = _record(lambda: model(*args, **kwargs))
        self._state = _state(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these inputs, in memory of its own.

        Raises:
            ValueError: If the inputs differ from the recorded ones in more than the values of floating point tensors,
                or the model was changed.
        """
        leaves, spec = tree_flatten((args, kwargs))
        if spec != self._spec:
            raise ValueError(f"Expected inputs as they were captured, {self._spec} (got {spec}); capture them as well")
        for i, leaf in enumerate(leaves):
            self._check(i, leaf)
        if _state(self.model) != self._state:
            raise ValueError("Expected the model as it was captured (got other weights or buffers); capture it again")
        for held, leaf in zip(self._held, leaves, strict=True):
            if _may_change(held):
                held.copy_(leaf.detach())
        self._replay()
        return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self._out)

    def _check(self, i: int, leaf: Any) -> None:
        """Raise unless input ``i`` is what was captured, up to its values where those may change."""
        held = self._held[i]
        if _may_change(held):
            if not isinstance(leaf, Tensor) or _form(leaf) != _form(held):
                raise ValueError(f"Expected {_told(held)} as captured (got {_told(leaf)}); capture a model per shape")
        elif i in self._fixed:
            parts = parts_of((leaf,)) if isinstance(leaf, Tensor) else None
            if parts is None or _form(leaf) != _form(held) or not self._fixed[i].holds_for(parts):
                raise ValueError(
                    f"Expected the graph that was captured, {_told(held)} (got another one, or one changed in place): "
                    "its plan is part of the recording; capture the model for each graph, or call the model itself"
                )
        elif leaf is not held and leaf != held:
            raise ValueError(f"Expected {held!r} as captured (got {leaf!r}); capture the model for it")


def _may_change(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.is_floating_point()


def _is_fixed_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not _may_change(leaf)


def _fingerprint(leaf: Tensor) -> Fingerprint:
    parts = parts_of((leaf,))
    if parts is None:
        raise ValueError(f"Expected a tensor with memory of its own (got {type(leaf).__name__}); pass a plain one")
    return Fingerprint(parts)


def _form(leaf: Tensor) -> tuple[Any, ...]:
    return (leaf.layout, leaf.shape, leaf.dtype, leaf.device)


def _told(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)} on {leaf.device}" if isinstance(leaf, Tensor) else type(leaf).__name__


def _state(model: nn.Module) -> list[tuple[int, int]]:
    """What shows whether the tensors of ``model`` are where they were and hold what they held."""
    tensors = (*model.parameters(), *model.buffers())
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t.layout is torch.strided]


def _record(run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """``run`` as a CUDA graph: what replays it, and the outputs that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out
