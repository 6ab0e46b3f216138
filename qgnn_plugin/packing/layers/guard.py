"""The guard around the forward of a packed layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...layers.errors import REFUSALS, expect_features, name_layer
from ...quantizers.autocast import full_precision
from ...quantizers.transforms import transform_of
from ..lazy.of_nodes import mapped_nodes

__all__ = ["inference", "unseen"]

Forward = TypeVar("Forward", bound=Callable[..., Any])


def unseen(function: Forward, short: Callable[..., Any] | None = None) -> Forward:
    """Run ``function`` past the mode that sees what a model gathers (:mod:`..lazy.gathers`).

    It costs every call of torch's functions some time, and kernels are run at once where there is none.  Where the mode
    was there, ``short`` is asked first: the short way of the same call, :obj:`None` where it is not taken, as it is not
    before anything that looks at functions.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() != 1:
            return function(*args, **kwargs)
        mode = torch._C._pop_torch_function_stack()
        passes = getattr(mode, "sees_gathers", False)
        if not passes:
            torch._C._push_on_torch_function_stack(mode)
        try:
            few = short(*args, **kwargs) if passes and short is not None else None
            return function(*args, **kwargs) if few is None else few
        finally:
            if passes:
                torch._C._push_on_torch_function_stack(mode)

    return run  # type: ignore[return-value]


def inference(forward: Forward, short: Callable[..., Any] | None = None) -> Forward:
    """Guard a packed layer's forward: eval mode only, no gradient, output quantization.

    ``short`` is its short way, as :func:`unseen` takes it; who calls the forward has asked it before.

    Raises:
        RuntimeError: In training mode, or where an input requires a gradient and gradients are on, is a batch of
            :func:`torch.func.vmap` or has a forward-mode derivative.
    """

    alone = unseen(forward, short)

    @functools.wraps(forward)
    @full_precision
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            raise RuntimeError(
                f"Expected the packed '{self._packed.spec.name}' in eval mode (got training mode): packed "
                f"models only run inference; call .eval(), or train the quantized model"
            )
        transform = transform_of((*args, *kwargs.values()))
        if transform is not None:
            raise RuntimeError(
                f"Expected no {transform} through the packed '{self._packed.spec.name}' (got an input that has one): "
                f"packed models only run inference, of one input after another; samples may be a dimension before that "
                f"of the nodes, and the model that was given to pack_model has gradients"
            )
        if not torch.is_grad_enabled():
            return run(self, args, kwargs)
        if _wants_gradient((*args, *kwargs.values(), _edge_mask(self))):
            raise RuntimeError(
                f"Expected no gradient through the packed '{self._packed.spec.name}' (got an input that requires one): "
                f"packed models only run inference; take gradients, such as forces, of the quantized model, or call "
                f"the packed one under torch.no_grad()"
            )
        with torch.no_grad():
            return run(self, args, kwargs)

    def run(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return concluded(self, forward(self, *args, **kwargs))
        try:
            if not self._runs_own_forward:
                expect_features(args[0] if args else kwargs.get("x", ()))
            if self._runs_own_forward:
                return concluded(self, forward(self, *args, **kwargs))
            of_nodes = None
            if len(args) == 1 and not kwargs:
                of_nodes = mapped_nodes(id(self), args[0], functools.partial(alone, self))
            return concluded(self, alone(self, *args, **kwargs) if of_nodes is None else of_nodes)
        except REFUSALS as error:
            name_layer(error, self._packed.spec.name)
            raise

    def concluded(self: Any, out: Any) -> Any:
        if self.output_quantizer is None:
            return out
        if self._runs_own_forward and isinstance(out, tuple):  # with attention weights
            return (self.output_quantizer(out[0], is_finite=True).dequantize(), *out[1:])
        if not isinstance(out, Tensor):
            return out
        return self.output_quantizer(out, is_finite=True).dequantize()

    return guarded  # type: ignore[return-value]


def _edge_mask(layer: Any) -> Tensor | None:
    """The mask of an explanation of edges, a parameter or an attribute."""
    mask = vars(layer).get("_edge_mask")
    return layer._parameters.get("_edge_mask") if mask is None else mask


def _wants_gradient(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (tuple, list)) and _wants_gradient(value):
            return True
    return False
