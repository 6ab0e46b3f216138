"""Offers traced messages to packed layers: a kernel for each form of call that can be traced."""

from __future__ import annotations

from torch import Tensor

from ..packing.lazy.producers import Producer
from ..packing.message_passing.call import MessageKernel, NotByRows, Propagation, register_message_kernel

__all__ = ["find_traced"]


@register_message_kernel
def find_traced(call: Propagation) -> MessageKernel | None:
    """A kernel for calls of this form; :obj:`None` where the layer's message has none."""
    # Tracing needs parts of torch that take their time to load.
    from ..kernels.generated.program import Unsupported
    from .samples import SampledCalls, samples_of
    from .shadow import NotTraceable

    calls = SampledCalls()
    try:
        if samples_of(call) is None:
            calls.calls.find(call)
        else:
            calls.run(call)
    except (NotTraceable, Unsupported, NotByRows):
        return None

    def run(call: Propagation) -> Tensor | Producer:
        try:
            return calls.run(call)
        except (NotTraceable, Unsupported) as reason:
            raise NotByRows(str(reason)) from reason

    return MessageKernel(run, "generated kernel")
