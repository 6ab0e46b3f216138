"""What a convolution is told in: sites, codes, and what both of its executions do with them.

A convolution is written once, as a mixin with a ``forward``, on top of :class:`Convolution`.  Its converted class is
that mixin on :class:`Trainable`, its packed class the same mixin on :class:`Frozen`:

* a trainable site gives codes with straight-through gradients, and a sum, a product or a correction is a tensor that
  autograd knows;
* a frozen site hands its range down: a sum or a product is a
  :class:`~qgnn_plugin.packing.lazy.producers.Producer`, which writes the codes of whatever comes next from the
  registers that it was added up in, and floats only where somebody needs these.

Both run the same float operations in the same order, so that a packed layer equals the converted one in eval mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..graph.adjacency import NormalizedGraph
from ..graph.samples import Samples
from ..layers import compressed
from ..layers.arithmetic import aggregate_sum
from ..layers.errors import names_layer
from ..layers.message_passing import QuantizedConv
from ..layers.watched import is_hooked, mapped_by_call
from ..packing.layers.conv import Activation, PackedConv, packed_dense
from ..packing.layers.linear import PackedLinear
from ..packing.layers.ranges import PackedTensor
from ..packing.lazy.deferred import materialized
from ..packing.lazy.producers import Producer, Step, with_epilogue
from ..quantizers.autocast import full_precision
from ..smp.constraint import SmoothLayer

__all__ = ["Convolution", "Frozen", "Mapped", "Result", "Trainable", "code_sums", "scaled", "trainable"]

Codes = Activation  # what a site gives
Result = Any  # floats [N, F]: a tensor, or in a frozen layer what computes them


class Mapped(NamedTuple):
    """``W x``, not computed yet.

    Args:
        lin: The linear layer.
        x: Features ``[*, N, K]``, of which ``lin`` is called with its bias, or codes ``[N, K]``, multiplied without.
        samples: How features have their samples; :obj:`None` of codes.
    """

    lin: Any
    x: Any
    samples: Samples | None = None

    def floats(self) -> Tensor:
        """``[N, F]``, the rows of all samples."""
        if self.samples is None:
            return self.lin.apply_to(self.x, None)
        return self.samples.rows(self.lin(self.x))


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x`` by a constant ``[N, 1]``, that of the sources of a :class:`NormalizedGraph`."""
    return x if factor is None else compressed.row_scaled(x, factor)


def code_sums(sent: Any, graph: NormalizedGraph, exact: bool) -> Tensor:
    r""":math:`t_i \sum_j w_{ij} x_j` over codes, with gradients; ``exact`` as in :func:`aggregate_sum`."""
    if graph.propagate is not None:
        return graph.propagated(sent.dequantize())
    out = aggregate_sum(sent, graph.plan, graph.weight, exact=exact)
    return out if graph.target is None else out * graph.target


class Convolution(SmoothLayer):
    """The primitives, and what follows from them alone; see :class:`Trainable` and :class:`Frozen`.

    Their names are private, since layers of the user's own get them as well.
    """

    _known: ClassVar[dict[str, bool]] = {}  # what a frozen site need not find out

    def _precision(self, lin: Any) -> torch.dtype:
        """The dtype of a layer with the map ``lin``."""
        raise NotImplementedError

    def _coded(
        self, site: Any, mapped: Mapped, factor: Tensor | None = None, floats: bool = False
    ) -> tuple[Codes, Tensor | None]:
        """What neighbours send, ``Q(s_j W x_j)``, and ``W x`` where that was written: where its ``floats`` are needed.

        ``factor`` is ``s`` ``[N, 1]``.
        """
        raise NotImplementedError

    def _sums(self, sent: Codes, graph: NormalizedGraph, bias: Tensor | None = None) -> Result:
        r""":math:`t_i \sum_j w_{ij} x_j + b` over codes."""
        raise NotImplementedError

    def _product(self, lin: Any, x: Codes | Result) -> Result:
        """What ``lin`` makes of codes, or of what it quantizes itself, with its bias; by a call where it has hooks."""
        raise NotImplementedError

    def _multiple(self, x: Codes, factor: Tensor) -> Result:
        """``t x`` of codes and a scalar ``t``."""
        raise NotImplementedError

    def _plus(self, first: Result, second: Result) -> Result:
        """The sum of two results; what can add to what is there, as a sum over neighbours can, is best second."""
        raise NotImplementedError

    def _then(self, result: Result, step: Step) -> Result:
        """With ``step``, which treats every row for itself, applied to it."""
        raise NotImplementedError

    def _floats(self, result: Result) -> Tensor:
        """A result as a tensor."""
        raise NotImplementedError

    def _finished(self, result: Result) -> Tensor:
        """A result as what the layer returns, which the next one may have in its own range."""
        raise NotImplementedError

    def _averaged(self, x: Tensor, graph: NormalizedGraph, site: Any) -> Result:
        r""":math:`t_i \sum_j w_{ij} Q(s_j x_j)`: the source factor goes in before quantization, the target's after."""
        return self._sums(site(scaled(x, graph.source), **self._known), graph)

    def _convolved_with(
        self: Any, graph: NormalizedGraph, site: Any, mapped: Mapped, bias: Tensor | None = None
    ) -> Tensor:
        r""":math:`t_i \sum_j w_{ij} Q(s_j W x_j) + b`, its change corrected where it has a constraint."""
        minds = self._minds_change
        sent, z = self._coded(site, mapped, graph.source, floats=minds)
        if minds:
            return self._corrected(z, self._sums(sent, graph), graph, bias)
        return self._finished(self._sums(sent, graph, bias))

    def _corrected(
        self: Any, z: Tensor, out: Result, smoother: NormalizedGraph, bias: Tensor | None, averaged: bool = True
    ) -> Tensor:
        """``out`` with its change from ``z`` corrected, or measured, on the graph ``smoother``; then the bias."""
        out = self._smooth(z, self._floats(out), smoother.apply, smoother.plan.num_edges, averaged=averaged)
        return out if bias is None else out + bias


class Trainable(Convolution, QuantizedConv):
    """Base of converted convolutions: every result is a tensor."""

    def _runs_floats(self, x: Any) -> bool:
        """Whether a call with ``x`` is for the layer's own class."""
        del x
        return self.is_off

    def _precision(self, lin: Any) -> torch.dtype:
        return lin.weight.dtype

    def _coded(
        self, site: Any, mapped: Mapped, factor: Tensor | None = None, floats: bool = False
    ) -> tuple[Codes, Tensor | None]:
        z = mapped.floats()
        return site(scaled(z, factor)), z

    def _sums(self: Any, sent: Codes, graph: NormalizedGraph, bias: Tensor | None = None) -> Tensor:
        out = code_sums(sent, graph, exact=not self.training)
        return out if bias is None else out + bias

    def _product(self, lin: Any, x: Any) -> Tensor:
        return lin(x) if isinstance(x, Tensor) else mapped_by_call(lin, x)

    def _multiple(self, x: Any, factor: Tensor) -> Tensor:
        return factor * x.dequantize() if x.packed is None else compressed.multiple(x.codes, factor, x.packed)

    def _plus(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    def _then(self, result: Tensor, step: Step) -> Tensor:
        return step(result)

    def _floats(self, result: Tensor) -> Tensor:
        return result

    def _finished(self, result: Tensor) -> Tensor:
        return result


def trainable(forward: Callable[..., Any]) -> Any:
    """``forward``, told once, as that of a converted layer: errors name it, and at 32 bits its own class runs."""

    @functools.wraps(forward)
    @names_layer
    @full_precision
    def converted(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self._runs_floats(x):
            return type(self).float_class.forward(self, x, *args, **kwargs)
        return forward(self, x, *args, **kwargs)

    return converted


class Frozen(Convolution, PackedConv):
    """Base of packed convolutions: a result is a :class:`Producer`, or a tensor where floats had to be written.

    Their ``forward`` is the one that is told once, under :func:`~qgnn_plugin.packing.layers.guard.inference`.
    """

    def _precision(self, lin: Any) -> torch.dtype:
        return torch.float32

    def _coded(
        self, site: Any, mapped: Mapped, factor: Tensor | None = None, floats: bool = False
    ) -> tuple[Codes, Tensor | None]:
        lin, x, samples = mapped
        if not floats and isinstance(lin, PackedLinear):
            row_scale = None if factor is None else factor.view(-1)
            taken, bias = (x, None) if samples is None else (lin.quantize(samples.rows(x)), lin.bias)
            fused = lin.packed_to(taken, site, bias, row_scale)
            if fused is not None:
                return fused, None
        z = mapped.floats()
        return site(z if factor is None else z * factor), z

    def _sums(self, sent: Codes, graph: NormalizedGraph, bias: Tensor | None = None) -> Producer:
        return self.aggregation(sent, graph, bias=bias)

    def _product(self, lin: Any, x: Any) -> Result:
        if is_hooked(lin) or not isinstance(lin, PackedLinear):
            return materialized(lin(self._floats(x)) if isinstance(x, (Producer, Tensor)) else mapped_by_call(lin, x))
        if isinstance(x, Producer):
            assert lin.input_quantizer is not None
            x = lin.input_quantizer.of(x)
        elif isinstance(x, Tensor):
            x = lin.quantize(x)
        return lin.product(x, lin.bias) or Producer.of(lin.apply_to(x, lin.bias))

    def _multiple(self, x: Any, factor: Tensor) -> Producer:
        codes = x if isinstance(x, PackedTensor) else packed_dense(x)

        def run(start: int, stop: int, **more: Any) -> Tensor:
            return with_epilogue(codes.rows(start, stop).dequantize().mul_(factor), **more)

        return Producer(codes.words.size(0), codes.num_features, codes.words.device, run, is_fused=False)

    def _plus(self, first: Result, second: Result) -> Producer:
        first, second = (Producer.of(part) if isinstance(part, Tensor) else part for part in (first, second))
        return first.plus(second)

    def _then(self, result: Result, step: Step) -> Result:
        return step(result) if isinstance(result, Tensor) else result.then(step)

    def _floats(self, result: Result) -> Tensor:
        return result if isinstance(result, Tensor) else result()

    def _finished(self, result: Result) -> Tensor:
        return result if isinstance(result, Tensor) else self.deferred(result)
