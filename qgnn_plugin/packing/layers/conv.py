"""What packed convolutions share: sums over packed messages, and the smoothness correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...graph.adjacency import NormalizedGraph
from ...kernels.aggregate import aggregate
from ...kernels.backend import is_direct
from ...kernels.finite import is_finite
from ...kernels.layout import pack_codes
from ...layers.arithmetic import aggregate_sum
from ...quantizers import QuantizedTensor
from ...smp.constraint import OTHER_PREFIX, SmoothLayer
from ..lazy.producers import Producer, with_epilogue
from .base import LayerSpec, PackedLayer
from .matrix import Activation
from .ranges import PackedTensor

__all__ = ["Activation", "PackedConv", "packed_dense"]


class PackedConv(PackedLayer, SmoothLayer):
    """Base of packed convolutions: sums over packed messages, and the smoothness correction where it acts."""

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        constrained = issubclass(type(self).float_class, SmoothLayer)  # by itself
        if not constrained:
            self._smp = spec.config.smp if spec.smooth else None
            self._buffer_prefix = OTHER_PREFIX if hasattr(self, "multiplier") else ""
        if spec.smooth:
            device = next((p.device for p in layer.parameters()), None)
            multiplier = torch.zeros((), dtype=torch.float32, device=device)
            self.register_buffer(self._buffer_prefix + "multiplier", multiplier)

    def upgrade(self, state: dict[str, Any]) -> None:
        for name in ("deep_place", "deep_config", "deep_stack"):
            if name in state:
                state[f"_{name}"] = state.pop(name)
        if not issubclass(type(self).float_class, SmoothLayer):
            state["_smp"] = state.pop("smp")

    @property
    def _is_smoothing(self) -> bool:
        return self._packed.spec.smooth

    @property
    def _smoothing_force(self) -> Tensor:
        return self._constraint_buffer("multiplier")

    def fill(self, layer: Any) -> None:
        super().fill(layer)
        if self._is_smoothing:
            self._smoothing_force.copy_(layer._smoothing_force)

    def aggregation(self, x: Activation, graph: NormalizedGraph, **epilogue: Any) -> Producer:
        r""":math:`t_i \sum_j w_{ij} x_j` over codes.

        ``epilogue`` goes to :func:`qgnn_plugin.kernels.aggregate.aggregate`; values that are not
        packed take bias and nothing else.
        """
        _expect_finite_graph(graph)
        if graph.propagate is not None:
            out = graph.propagated(x.dequantize())
            return Producer.of(out if epilogue.get("bias") is None else out + epilogue["bias"])
        if isinstance(x, QuantizedTensor) and x.qmax is not None:
            x = packed_dense(x)

        width = x.num_features if isinstance(x, PackedTensor) else x.shape[1]
        bias = epilogue.get("bias")
        fits = bias is None or (bias.shape == (width,) and bias.dtype is torch.float32)

        def run(start: int, stop: int, addend: Tensor | None = None, **more: Any) -> Tensor:
            part = graph.rows(start, stop)
            if isinstance(x, PackedTensor):
                added: dict[str, Any] = {"addend": addend} if addend is not None and fits and is_direct() else {}
                end = {} if addend is not None and not added else more
                y = aggregate(
                    x.words, part.plan, x.scale, x.lower, x.num_features, x.bits, edge_weight=part.weight,
                    dst_scale=None if part.target is None else part.target.view(-1), multiplier=x.multiplier,
                    is_checked=fits, **added, **epilogue, **end,
                )  # fmt: skip
                return y if addend is None or added else with_epilogue(y.add_(addend), **more)
            assert addend is None
            assert set(epilogue) <= {"bias"}
            out = aggregate_sum(x, part.plan, part.weight)
            out = out if part.target is None else out * part.target
            return with_epilogue(out if epilogue.get("bias") is None else out + epilogue["bias"], **more)

        is_packed = isinstance(x, PackedTensor)
        adds = is_packed and graph.plan.device.type == "cpu"
        return Producer(graph.plan.num_dst, width, graph.plan.device, run, is_fused=is_packed, adds=adds)


_FINITE = "_is_finite"  # attribute of a graph whose numbers were looked at


def _expect_finite_graph(graph: NormalizedGraph) -> None:
    """Refuse weights and factors of normalization that are NaN or infinite; once per graph.

    Raises:
        ValueError: If there are any.
    """
    if _FINITE in graph.__dict__ or torch.compiler.is_compiling():
        return
    target = None if graph.target is graph.source else graph.target
    for values, what in ((graph.weight, "edge weights"), (graph.source, "degrees"), (target, "degrees")):
        if values is not None and not is_finite(values):
            raise ValueError(
                f"Expected finite {what} (got NaN or infinity); check the edge weights, and for negative ones that the "
                f"layer does not normalize"
            )
    graph.__dict__[_FINITE] = True


def packed_dense(x: QuantizedTensor) -> PackedTensor:
    """Pack codes that are still unpacked, those of sparse features."""
    dense, bits = x.dense(), x.bits
    words = pack_codes(dense.codes, bits)
    if x.rows is not None:
        scale, lower, multiplier = x.rows.scale, x.rows.lower, x.rows.integers()
        return PackedTensor(words, scale, lower, dense.codes.size(1), bits, x.unsigned, multiplier)
    return PackedTensor(words, x.scale, x.lower, dense.codes.size(1), bits, x.unsigned)
