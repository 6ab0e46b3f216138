"""What every packed layer shares: its description, its settings, and the guard around its forward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..config import OFF, QuantConfig
from ..kernels.aggregate import aggregate
from ..kernels.layout import pack_codes
from ..layers.arithmetic import aggregate_sum
from ..layers.base import QuantizedLayer
from ..layers.graph import NormalizedGraph
from ..quantizers import QuantizedTensor
from ..quantizers.autocast import full_precision
from ..smp.constraint import SmoothLayer
from ..smp.deep import StackPlace
from .deferred import DeferredTensor, Producer, conclude, is_deferring, plain
from .ranges import UNSET, PackedRange, PackedTensor, SiteSpec

__all__ = ["LayerSpec", "PackedConv", "PackedLayer", "inference", "packed_class", "register_packed"]

Activation = PackedTensor | QuantizedTensor
Forward = TypeVar("Forward", bound=Callable[..., Any])

_REGISTRY: dict[type[QuantizedLayer], type[PackedLayer]] = {}

# Settings that conversion adds, held in the description instead.
_OWN = {"layer_name", "quant_config", "attention_bits", "training", "constraint_state", "smp"}


@dataclass(frozen=True)
class LayerSpec:
    """A converted layer apart from its numbers: with the float layer, enough to build its packed form.

    Args:
        name: Qualified name in the model.
        type: Name of its float class.
        config: Its configuration.
        sites: Its own quantizers, by attribute (``"lin.weight_quantizer"`` belongs to ``lin``).
        reason: Why the layer runs its quantized-float path, :obj:`None` for a packed layer.
        smooth: Whether its multiplier is above 0.
        output: Whether its result is quantized.
        attention_bits: Width of attention numerators, 32 for float.
        check: Whether its input is the model's: NaN and infinity are refused there.
        deep_place: Where it stands in a deep stack, :obj:`None` outside of one.
    """

    name: str
    type: str
    config: QuantConfig
    sites: Mapping[str, SiteSpec] = field(default_factory=dict)
    reason: str | None = None
    smooth: bool = False
    output: bool = False
    attention_bits: int = OFF
    check: bool = False
    deep_place: StackPlace | None = None

    @classmethod
    def of(cls, name: str, layer: Any, reason: str | None) -> LayerSpec:
        """Describe a converted layer.

        Raises:
            ValueError: If one of its ranges is unset.
        """
        return cls(
            name,
            type(layer).float_class.__name__,
            layer.quant_config,
            _sites(layer, reason),
            reason,
            getattr(layer, "smp", None) is not None and layer.multiplier_value > 0,
            type(layer).quantizes_output,
            getattr(layer, "attention_bits", OFF),
            deep_place=getattr(layer, "deep_place", None),
        )


def _sites(layer: Any, reason: str | None) -> dict[str, SiteSpec]:
    own = dict(layer.own_quantizers())
    if reason is not None:
        return {site: SiteSpec.outline(quantizer) for site, quantizer in own.items()}
    cls = packed_class(type(layer).mixin)
    assert cls is not None
    idle = cls.idle_sites(layer)
    return {site: SiteSpec(UNSET) if site in idle and not q.is_set else SiteSpec.of(q) for site, q in own.items()}


def inference(forward: Forward) -> Forward:
    """Guard a packed layer's forward: eval mode only, no gradient, output quantization."""

    @functools.wraps(forward)
    @full_precision
    def guarded(self: PackedLayer, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            raise RuntimeError(
                f"Expected the packed '{self.spec.name}' in eval mode (got training mode): packed "
                f"models only run inference; call .eval(), or train the quantized model"
            )
        with torch.no_grad():
            out = forward(self, *args, **kwargs)
            if self.output_quantizer is not None and isinstance(out, Tensor):
                out = self.output_quantizer(out).dequantize()
            return out

    return guarded  # type: ignore[return-value]


class PackedLayer(nn.Module):
    """Base of packed layers.

    Args:
        layer: The float layer, or its converted form: read for settings, shapes and its children.
        spec: Its description.
        memo: Replacements for the modules inside it, as :func:`copy.deepcopy` takes them.
    """

    children_kept: ClassVar[tuple[str, ...]] = ()  # modules inside the layer that go on as they are
    tensors_kept: ClassVar[tuple[str, ...]] = ("bias",)  # float parameters and buffers that go on
    entry: ClassVar[str] = "input_quantizer"  # the site that a layer's input passes first, if it has one
    output_quantizer: PackedRange | None

    def __init__(self, layer: Any, spec: LayerSpec, memo: dict[int, Any]) -> None:
        super().__init__()
        self.spec = spec
        for name, value in vars(layer).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and not name.startswith("_") and name not in _OWN:
                setattr(self, name, value)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            for suffix in ("", "_with_kwargs"):
                getattr(self, name + suffix).update(copy.copy(getattr(layer, name + suffix)))
        for name in self.children_kept:
            child = getattr(layer, name, None)
            kept = copy.deepcopy(child, memo) if isinstance(child, nn.Module) else None
            setattr(self, name, kept)
        for name in self.tensors_kept:
            value = getattr(layer, name, None)
            value = value.detach().clone() if isinstance(value, Tensor) else None
            self.register_buffer(name, value)
        device = next((p.device for p in layer.parameters()), None)
        for site, described in spec.sites.items():
            if site != "weight_quantizer":
                self._add_range(site, described, device, check=spec.check and site == self.entry_of(layer))
        if not spec.output:
            self.output_quantizer = None
        self.float_bytes = _float_bytes(layer)
        self.defers = True  # until a result of it was needed twice: then floats are written once
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_hooks or self._forward_pre_hooks:  # these see plain tensors
            args, kwargs = plain(args), plain(kwargs)
        return super().__call__(*args, **kwargs)

    def deferred(self, producer: Producer) -> Tensor:
        """What ``producer`` computes, put off where the packed model around may never need it as floats."""
        if not (self.defers and is_deferring()) or self._forward_hooks:
            return producer()
        return DeferredTensor(producer, self._write_floats)

    def _write_floats(self) -> None:
        self.defers = False

    def _add_range(self, site: str, spec: SiteSpec, device: torch.device | None, check: bool) -> None:
        owner: nn.Module = self
        *path, last = site.split(".")
        for name in path:
            if name not in owner._modules:
                owner.add_module(name, nn.ModuleDict())
            owner = owner._modules[name]  # type: ignore[assignment]
        label = f"{self.spec.name}.{site.removesuffix('_quantizer')}"
        packed = PackedRange(spec, label, check=check, device=device)
        owner.add_module(last, packed)

    def fill(self, layer: Any) -> None:
        """Take the numbers of the converted ``layer``."""
        for site, quantizer in layer.own_quantizers():
            if site != "weight_quantizer":
                self.get_submodule(site).fill(quantizer)  # type: ignore[operator]

    @classmethod
    def entry_of(cls, layer: Any) -> str | None:
        """The site that the input of ``layer`` passes first; :obj:`None` where an inner layer takes it."""
        del layer
        return cls.entry

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        """Why ``layer`` has to run its quantized-float path; :obj:`None` where it can be packed."""
        del layer
        return None

    @classmethod
    def idle_sites(cls, layer: Any) -> tuple[str, ...]:
        """Sites that ``layer`` may never use: these need no range."""
        del layer
        return ()


def _float_bytes(layer: nn.Module) -> int:
    """Bytes of the layer's own float parameters and buffers, without what conversion added."""
    buffers = [b for k, b in layer.named_buffers(recurse=False) if k not in ("multiplier", "slack")]
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(recurse=False), *buffers))


class PackedConv(PackedLayer, SmoothLayer):
    """Base of packed convolutions: sums over packed messages, and the smoothness correction where it acts."""

    def __init__(self, layer: Any, spec: LayerSpec, memo: dict[int, Any]) -> None:
        super().__init__(layer, spec, memo)
        self.smp = spec.config.smp if spec.smooth else None
        if spec.smooth:
            device = next((p.device for p in layer.parameters()), None)
            self.register_buffer("multiplier", torch.zeros((), device=device))

    def fill(self, layer: Any) -> None:
        super().fill(layer)
        if self.smp is not None:
            self.multiplier.copy_(layer.force)

    def aggregation(self, x: Activation, graph: NormalizedGraph, **epilogue: Any) -> Producer:
        r""":math:`t_i \sum_j w_{ij} x_j` over codes.

        ``epilogue`` goes to :func:`qgnn_plugin.kernels.aggregate.aggregate`; values that are not
        packed take bias and nothing else.
        """
        if isinstance(x, QuantizedTensor) and x.qmax is not None:
            x = packed_dense(x)

        def run(start: int, stop: int, **more: Any) -> Tensor:
            part = graph.rows(start, stop)
            if isinstance(x, PackedTensor):
                return aggregate(
                    x.words, part.plan, x.scale, x.lower, x.num_features, x.bits, edge_weight=part.weight,
                    dst_scale=None if part.target is None else part.target.view(-1), **epilogue, **more,
                )  # fmt: skip
            assert set(epilogue) <= {"bias"}
            out = aggregate_sum(x, part.plan, part.weight)
            out = out if part.target is None else out * part.target
            return conclude(out if epilogue.get("bias") is None else out + epilogue["bias"], **more)

        width = x.num_features if isinstance(x, PackedTensor) else x.shape[1]
        return Producer(graph.plan.num_dst, width, graph.plan.device, run, is_fused=isinstance(x, PackedTensor))

    def aggregated(self, x: Activation, graph: NormalizedGraph, **epilogue: Any) -> Tensor:
        """The floats of :meth:`aggregation`."""
        return self.aggregation(x, graph, **epilogue)()


def packed_dense(x: QuantizedTensor) -> PackedTensor:
    """Pack codes that are still unpacked, those of sparse features."""
    assert x.qmax is not None
    dense = x.dense()
    bits = x.qmax.bit_length()
    words = pack_codes(dense.codes, bits)
    return PackedTensor(words, x.scale, x.lower, dense.codes.size(1), bits, x.unsigned)


def register_packed(mixin: type[QuantizedLayer], packed: type[PackedLayer]) -> None:
    """Pack layers converted by ``mixin`` into ``packed``."""
    _REGISTRY[mixin] = packed


def packed_class(mixin: type[QuantizedLayer]) -> type[PackedLayer] | None:
    """The packed class of layers converted by ``mixin``, :obj:`None` where there is none."""
    return _REGISTRY.get(mixin)
