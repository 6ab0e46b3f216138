"""What every packed layer shares: its description, its settings, and the guard around its forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from ..config import OFF, QuantConfig
from ..kernels.aggregate import aggregate
from ..kernels.backend import is_direct
from ..kernels.finite import is_finite
from ..kernels.layout import pack_codes
from ..layers.arithmetic import aggregate_sum
from ..layers.base import QuantizedLayer, SwappedLayer, float_state, named_as
from ..layers.errors import REFUSALS, expect_features, name_layer
from ..layers.graph import NormalizedGraph
from ..layers.own_weights import outside_compiler
from ..quantizers import QuantizedTensor
from ..quantizers.autocast import full_precision
from ..quantizers.transforms import transform_of
from ..smp.constraint import OTHER_PREFIX, SmoothLayer, constraint_names
from ..smp.deep import StackPlace
from .asked import Asked
from .deferred import DeferredTensor, Producer, computed, conclude, is_deferring, plain
from .direct import Direct
from .matrix import PackedMatrix
from .ranges import UNSET, LastProduct, PackedRange, PackedTensor, SiteSpec
from .weight import refuse_dtype

__all__ = [
    "LayerSpec",
    "PackedConv",
    "PackedLayer",
    "frozen_class",
    "inference",
    "packed_class",
    "register_packed",
]

Activation = PackedTensor | QuantizedTensor
Forward = TypeVar("Forward", bound=Callable[..., Any])

_REGISTRY: dict[type[QuantizedLayer], type[PackedLayer]] = {}

WEIGHT = "weight_quantizer"  # the site of a weight, whose range is held with its words
NEVER_RAN = "never ran"  # the reason of a layer that no data reached while ranges were set


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
        check: In files of an earlier version, whether its input is the model's; every layer checks what enters.
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

    @property
    def stays_plain(self) -> bool:
        """Whether the layer goes on as its float class; one of a deep stack computes something else."""
        return self.reason == NEVER_RAN and self.deep_place is None

    @classmethod
    def of(cls, name: str, layer: Any, reason: str | None) -> LayerSpec:
        """Describe a converted layer.

        Raises:
            ValueError: If one of its ranges is unset.
        """
        return cls(
            name,
            type(layer).float_class.__name__,
            layer._conversion.config,
            _sites(layer, reason),
            reason,
            getattr(layer, "_smp", None) is not None and layer._multiplier_value > 0,
            type(layer).quantizes_output,
            getattr(layer, "attention_bits", OFF),
            deep_place=getattr(layer, "_deep_place", None),
        )


def _sites(layer: Any, reason: str | None) -> dict[str, SiteSpec]:
    own = dict(layer.own_quantizers())
    if reason is not None:
        return {site: SiteSpec.outline(quantizer) for site, quantizer in own.items()}
    # Other sites that nothing reached, such as that of targets where there were none, raise once something does; a
    # weight that a layer's own code did not read stays as it is.
    needed = () if getattr(layer, "has_others", False) else (WEIGHT,)
    return {site: SiteSpec.of(q) if q.is_set or site in needed else SiteSpec(UNSET) for site, q in own.items()}


def inference(forward: Forward) -> Forward:
    """Guard a packed layer's forward: eval mode only, no gradient, output quantization.

    Raises:
        RuntimeError: In training mode, or where an input requires a gradient and gradients are on, is a batch of
            :func:`torch.func.vmap` or has a forward-mode derivative.
    """

    @functools.wraps(forward)
    @full_precision
    def guarded(self: PackedLayer, *args: Any, **kwargs: Any) -> Any:
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

    def run(self: PackedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return concluded(self, forward(self, *args, **kwargs))
        try:
            if not self._runs_own_forward:
                expect_features(args[0] if args else kwargs.get("x", ()))
            return concluded(self, forward(self, *args, **kwargs))
        except REFUSALS as error:
            name_layer(error, self._packed.spec.name)
            raise

    def concluded(self: PackedLayer, out: Any) -> Any:
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


@dataclass
class PackedState:
    """What a packed layer knows of itself beside the float layer's own attributes.

    Args:
        spec: Its description.
        float_bytes: Bytes of its float parameters and buffers.
        defers: Whether its result may be put off: until one was needed twice, then floats are written once.
        added: Names of the attributes that the float layer does not have.
        is_read: Whether code around it reads its weight, in the converted form as values of codes too.
    """

    spec: LayerSpec
    float_bytes: int
    defers: bool = True
    added: frozenset[str] = frozenset()
    is_read: bool = False

    def write_floats(self) -> None:
        self.defers = False

    @property
    def last(self) -> LastUsed:
        """What the layer derived from its numbers when it ran last."""
        return self.__dict__.get("_last") or self.__dict__.setdefault("_last", LastUsed())


class LastUsed:
    """What a packed layer derives from its numbers, for as long as these are the same; not copied, nor saved."""

    def __init__(self) -> None:
        self.lower, self.asked = LastProduct(), Asked()
        self.matrix: PackedMatrix | None = None
        self.direct: Direct | None = None
        self.parts: tuple[tuple[Any, ...], list[Any]] | None = None

    def __reduce__(self) -> Any:
        return LastUsed, ()


class PackedLayer(SwappedLayer):
    """Mixin of packed layers: a copy of the converted layer with its numbers frozen.

    The class of the copy is a subclass of (mixin, the layer's own class), as that of a converted layer, and the copy
    has everything that the float layer has: attributes, children, hooks.  What is packed takes the place of the
    parameters named in ``packs``.
    """

    packed_mixin: ClassVar[type[PackedLayer]]
    notes = ("packed",)
    packs: ClassVar[tuple[str, ...]] = ()  # float parameters that packed words take the place of
    adds: ClassVar[tuple[str, ...]] = ()  # what takes it
    _runs_own_forward: ClassVar[bool] = False  # whether ``forward`` is that of the layer's own class
    compiles_unblocked: ClassVar[bool] = False  # whether ``torch.compile`` has its messages of all edges at once
    output_quantizer: PackedRange | None
    training: bool
    _packed: PackedState
    _modules: dict[str, Any]
    _parameters: dict[str, Any]
    _forward_hooks: dict[int, Any]
    _forward_pre_hooks: dict[int, Any]

    @classmethod
    def kept(cls, layer: Any) -> dict[str, Any]:
        """What a copy of ``layer``, a float or a converted one, takes over."""
        state = float_state(layer)
        for name in cls.packs:
            state["_parameters"].pop(name, None)
        return state

    @classmethod
    def _read_by(cls, float_class: type[nn.Module]) -> Iterable[str]:
        """Methods of ``float_class`` that read what takes the place of its weights."""
        del float_class
        return ()

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        """Add what packing brings, numbers still to be filled in.

        Args:
            layer: The float layer, or its converted form, of which this one has a copy of everything kept.
            spec: Its description.
        """
        self._packed = PackedState(spec, _float_bytes(layer))
        device = next((p.device for p in layer.parameters()), None)
        for site, described in spec.sites.items():
            if self._holds_range(site):
                self._add_range(site, described, device)
        if not spec.output:
            self.output_quantizer = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_hooks or self._forward_pre_hooks:  # these see plain tensors
            args, kwargs = plain(args), plain(kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _rebuild_packed, (cls.packed_mixin, cls.float_class, cls.own_names), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not hasattr(type(self), "float_class"):
            _adopt(self, state)
        elif isinstance(self, MessagePassing) and "inspector" not in state:  # which adopted layers do not have
            nn.Module.__setstate__(self, state)
        else:
            super().__setstate__(state)  # type: ignore[misc]

    def upgrade(self, state: dict[str, Any]) -> None:
        """Bring the attributes of an old pickle to their names of today."""

    # Words and ranges are parameters and buffers of the usual kind, whatever the layer's own class does with its own.

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_dtype(f"'{self._packed.spec.name}'", fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """Refused: there are no float parameters to initialize.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"Expected no reset_parameters() on the packed '{self._packed.spec.name}': its weights are packed words; "
            f"reset the float model, convert and train it, and pack it again"
        )

    @property
    def _qualified_name(self) -> str:
        return self._packed.spec.name

    def own_sites(self) -> dict[str, int]:
        return {name.removesuffix("_quantizer"): site.bits for name, site in self._packed.spec.sites.items()}

    def _shown_ranges(self: Any) -> Iterable[tuple[str, str]]:
        inside = {name: child for name, child in self.named_modules() if isinstance(child, PackedRange)}
        return ((name, inside[name].shown_range()) for name in self._packed.spec.sites if name in inside)

    def added_names(self) -> Iterable[str]:
        return (*self._packed.added, "_packed", "_deep_stack")

    def _own_call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of ``forward``, that of the layer's own class, where it runs as it is."""
        return forward(self, *args, **kwargs)

    def _path_taken(self) -> str:
        """How the layer computes, for the summary."""
        return "kernel"

    def deferred(self, producer: Producer) -> Tensor:
        """What ``producer`` computes, put off where the packed model around may never need it as floats."""
        if not (self._packed.defers and is_deferring()) or self._forward_hooks:
            return producer()
        return DeferredTensor(producer, self._packed.write_floats, self._packed.last.asked)

    def _holds_range(self, site: str) -> bool:
        """Whether a site is a range for features, not that of a weight."""
        return site != WEIGHT

    def _add_range(self: Any, site: str, spec: SiteSpec, device: torch.device | None) -> None:
        owner: nn.Module = self
        *path, last = site.split(".")
        for name in path:
            if name not in owner._modules:
                owner.add_module(name, nn.ModuleDict())
            owner = owner._modules[name]  # type: ignore[assignment]
        label = f"{self._packed.spec.name}.{site.removesuffix('_quantizer')}"
        owner.add_module(last, PackedRange(spec, label, device=device))

    def fill(self: Any, layer: Any) -> None:
        """Take the numbers of the converted ``layer``."""
        for site, quantizer in layer.own_quantizers():
            if self._holds_range(site):
                self.get_submodule(site).fill(quantizer)

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        """Why ``layer`` has to run its quantized-float path; :obj:`None` where it can be packed."""
        del layer
        return None


_CLASSES: dict[tuple[type, type, tuple[str, ...]], type] = {}


def frozen_class(mixin: type[PackedLayer], float_class: type[nn.Module], own_names: tuple[str, ...] = ()) -> type:
    """The subclass of ``(mixin, float_class)``, made once, under the name of ``float_class``.

    ``own_names`` are those of aliases that mean the layer's own attributes (see :func:`names_kept`).
    """
    key = (mixin, float_class, own_names)
    if key not in _CLASSES:
        namespace = {**named_as(float_class, own_names), "packed_mixin": mixin}
        # Before those of a class that shares a base with the mixin, which then comes first.
        namespace |= {"__repr__": SwappedLayer.__repr__, "reset_parameters": PackedLayer.reset_parameters}
        if mixin._runs_own_forward:
            namespace["forward"] = inference(_own_forward(float_class.forward))
        for name in mixin._read_by(float_class):
            namespace[name] = outside_compiler(namespace.get(name, getattr(float_class, name)))
        if issubclass(float_class, MessagePassing):
            # PyG would generate one onto this class; methods of the user's own find that of the layer.
            original: Any = float_class
            for method in ("propagate", "edge_updater"):
                for name in (method, f"_orig_{method}", f"_jinja_{method}"):
                    own = getattr(mixin, f"quantized_{method}", None)
                    namespace[name] = own or getattr(original, name, getattr(original, method))
        _CLASSES[key] = type(float_class.__name__, (mixin, float_class), namespace)
    return _CLASSES[key]


def _own_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of the layer's own class, run by :meth:`PackedLayer._own_call`."""

    @functools.wraps(forward)
    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._own_call(forward, *args, **kwargs)

    return own


def _rebuild_packed(mixin: type[PackedLayer], float_class: type[nn.Module], own_names: tuple[str, ...]) -> Any:
    return object.__new__(frozen_class(mixin, float_class, own_names))


def _adopt(layer: Any, state: dict[str, Any]) -> None:
    """Restore a layer from a pickle of the time when packed layers were no subclasses of the user's class."""
    from ..layers.registry import classes_of  # the registry imports what is packed here

    spec = state.pop("spec")
    mixins = [mixin for mixin, packed in _REGISTRY.items() if packed is type(layer)]
    known = [float_class for mixin in mixins for float_class in classes_of(mixin)]
    named = [float_class for float_class in known if float_class.__name__ == spec.type]
    layer.__class__ = frozen_class(type(layer), (named or known)[0])
    layer.upgrade(state)
    sites = {site.partition(".")[0] for site in spec.sites}
    state["_packed"] = PackedState(spec, state.pop("float_bytes"), state.pop("defers"), frozenset(sites))
    nn.Module.__setstate__(layer, state)


def _float_bytes(layer: nn.Module) -> int:
    """Bytes of the layer's own float parameters and buffers, without what conversion added."""
    added = constraint_names(layer)
    buffers = [b for k, b in layer.named_buffers(recurse=False) if k not in added]
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(recurse=False), *buffers))


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
    def _force(self) -> Tensor:
        return self._constraint_buffer("multiplier")

    def fill(self, layer: Any) -> None:
        super().fill(layer)
        if self._is_smoothing:
            self._force.copy_(layer._force)

    def aggregation(self, x: Activation, graph: NormalizedGraph, **epilogue: Any) -> Producer:
        r""":math:`t_i \sum_j w_{ij} x_j` over codes.

        ``epilogue`` goes to :func:`qgnn_plugin.kernels.aggregate.aggregate`; values that are not
        packed take bias and nothing else.
        """
        _expect_finite_graph(graph)
        if graph.propagate is not None:
            out = graph.propagated(x.dequantize())
            return computed(out if epilogue.get("bias") is None else out + epilogue["bias"])
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
                return y if addend is None or added else conclude(y.add_(addend), **more)
            assert addend is None
            assert set(epilogue) <= {"bias"}
            out = aggregate_sum(x, part.plan, part.weight)
            out = out if part.target is None else out * part.target
            return conclude(out if epilogue.get("bias") is None else out + epilogue["bias"], **more)

        is_packed = isinstance(x, PackedTensor)
        adds = is_packed and graph.plan.device.type == "cpu"
        return Producer(graph.plan.num_dst, width, graph.plan.device, run, is_fused=is_packed, adds=adds)

    def aggregated(self, x: Activation, graph: NormalizedGraph, **epilogue: Any) -> Tensor:
        """The floats of :meth:`aggregation`."""
        return self.aggregation(x, graph, **epilogue)()


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


def register_packed(mixin: type[QuantizedLayer], packed: type[PackedLayer]) -> None:
    """Pack layers converted by ``mixin`` into ``packed``."""
    _REGISTRY[mixin] = packed


def packed_class(mixin: type[QuantizedLayer]) -> type[PackedLayer] | None:
    """The packed class of layers converted by ``mixin``, :obj:`None` where there is none."""
    return _REGISTRY.get(mixin)
