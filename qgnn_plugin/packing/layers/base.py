"""What every packed layer shares: its description, its settings, and what it was before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from ...config import OFF, QuantConfig
from ...layers.base import (
    WEIGHT,
    QuantizedLayer,
    SwappedLayer,
    around_super,
    extended_class,
    float_state,
    named_as,
)
from ...layers.own_weights import outside_compiler
from ...layers.reads import with_reading
from ...smp.constraint import constraint_names
from ...smp.deep import StackPlace
from ..lazy.asked import Asked
from ..lazy.calls import is_deferring
from ..lazy.columns import deferred_result
from ..lazy.deferred import materialized
from ..lazy.producers import Producer
from ..lazy.weight import refuse_dtype
from .few_rows import Direct
from .guard import inference
from .matrix import PackedMatrix
from .ranges import UNSET, LastProduct, PackedRange, SiteSpec

__all__ = ["LayerSpec", "PackedLayer", "frozen_class", "packed_class", "register_packed"]

_REGISTRY: dict[type[QuantizedLayer], type[PackedLayer]] = {}

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
        self.parts: dict[str, tuple[tuple[Any, ...], list[Any]]] = {}  # of weights, by their names

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
    _is_packed = True
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
            args, kwargs = materialized(args), materialized(kwargs)
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
            return producer.whole()
        return deferred_result(producer, self._packed.write_floats, self._packed.last.asked)

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

    ``own_names`` are those of aliases that mean the layer's own attributes
    (:func:`~qgnn_plugin.layers.base.names_kept`).
    """
    key = (mixin, float_class, own_names)
    if key not in _CLASSES:
        namespace = {**named_as(float_class, own_names), "packed_mixin": mixin}
        # Before those of a class that shares a base with the mixin, which then comes first.
        namespace |= {"__repr__": SwappedLayer.__repr__, "reset_parameters": PackedLayer.reset_parameters}
        extended = extended_class(float_class, [own for own, packed in _REGISTRY.items() if packed is mixin])
        if extended is not None:
            concrete = frozen_class(mixin, extended, own_names)
            _CLASSES[key] = around_super(float_class, concrete, extended, namespace)
            return _CLASSES[key]
        if mixin._runs_own_forward:
            namespace["forward"] = inference(_own_forward(float_class.forward))
        for name in mixin._read_by(float_class):
            namespace[name] = with_reading(namespace.get(name, getattr(float_class, name)), outside_compiler)
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
    from ...layers.registry import classes_of  # the registry imports what is packed here

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


def register_packed(mixin: type[QuantizedLayer], packed: type[PackedLayer]) -> None:
    """Pack layers converted by ``mixin`` into ``packed``."""
    _REGISTRY[mixin] = packed


def packed_class(mixin: type[QuantizedLayer]) -> type[PackedLayer] | None:
    """The packed class of layers converted by ``mixin``, :obj:`None` where there is none."""
    return _REGISTRY.get(mixin)
