"""Values that are built on one stream of an accelerator and used on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

__all__ = ["Built", "derived", "lasting", "tensors_of"]

T = TypeVar("T")

_CPU = torch.device("cpu")


def _module_of(device: torch.device) -> Any:
    """The module that knows the streams of ``device``; :obj:`None` where there are none."""
    if device.type == "cpu":
        return None
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return None
    return module if hasattr(module, "current_stream") else None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in ``value``: itself, those of a tuple, and the attributes of an object of this package."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value) or hasattr(value, "rowptr"):
        for item in vars(value).values():
            yield from tensors_of(item)


class Built:
    """Orders the streams that use a value after the one that built it.

    Made on the stream that has just launched what builds ``value``.  :meth:`wait` makes the current stream wait, once,
    and keeps the value's memory from being reused before that stream is done with it.

    Args:
        value: Tensors, as :func:`tensors_of` finds them.
        on_cpu: Whether they are known to be on the CPU, where there is nothing to order.
    """

    __slots__ = ("device", "event", "ordered", "value")

    def __init__(self, value: Any, on_cpu: bool = False) -> None:
        self.value = value
        self.ordered: set[Any] | None = None
        if on_cpu:
            self.device = _CPU
            return
        self.device = next((t.device for t in tensors_of(value) if t.device.type != "cpu"), _CPU)
        module = _module_of(self.device)
        if module is not None and not _is_capturing(module):
            stream = module.current_stream(self.device)
            self.event, self.ordered = stream.record_event(), {stream}

    def wait(self) -> None:
        """To be called before each use of the value."""
        if self.ordered is None:
            return
        module = _module_of(self.device)
        stream = module.current_stream(self.device)
        # A capture begins by waiting for all that was launched before it, and may wait for nothing else.
        if stream in self.ordered or _is_capturing(module):
            return
        stream.wait_event(self.event)
        for tensor in tensors_of(self.value):
            tensor.record_stream(stream)
        self.ordered.add(stream)


def _is_capturing(module: Any) -> bool:
    capturing = getattr(module, "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())


def lasting(build: Callable[[], T]) -> T:
    """What ``build()`` makes, to be kept: in inference mode too, tensors that may be saved for a backward pass."""
    if not torch.is_inference_mode_enabled():
        return build()
    with torch.inference_mode(False), torch.no_grad():
        return build()


class derived(Generic[T]):
    """A property computed on first use and kept, in the instance's attributes on the CPU.

    On an accelerator it is ordered as :class:`Built` says, since the first use may be on any stream.  The instance has
    a ``device``.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__
        self.name = function.__name__

    @overload
    def __get__(self, instance: None, owner: Any = None) -> derived[T]: ...
    @overload
    def __get__(self, instance: Any, owner: Any = None) -> T: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        if instance.device.type == "cpu":
            if torch.compiler.is_compiling():  # a trace may be inside of a function that changes nothing
                return self.function(instance)
            value = instance.__dict__[self.name] = lasting(lambda: self.function(instance))  # found there from now on
            return value
        kept = instance.__dict__.setdefault("_derived", {})
        built = kept.get(self.name)
        if built is not None and torch.compiler.is_compiling():
            return built.value  # compiling waits for the device
        if built is None:
            built = kept[self.name] = Built(lasting(lambda: self.function(instance)))
        else:
            built.wait()
        return built.value
