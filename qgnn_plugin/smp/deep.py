r"""Deep stacks: layers of equal width that stay trainable (docs/smoothness.md; GCNII, Chen et al., ICML 2020, eq. 5).

A stack of plain convolutions loses its signal with depth.  Layer ``l`` of a converted stack computes

.. math::
    S = (1 - a) P H + a H_0 \qquad H' = (1 - b_l) S + b_l S W_l + \mathrm{bias} \qquad b_l = \log(\theta / l + 1)

with ``H_0`` the input of the stack's first layer, ``a`` the initial residual and ``theta`` the identity map.

The user's ``forward`` hands a layer its input and nothing else, so ``H_0`` is kept in a :class:`DeepStack` that the
layers of one stack share.  It lives from the stack's first layer to its last, per thread, and never longer than the
call of the module around the stack, whose class is swapped for one that sees to that.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from ..aliases import Alias
from ..config import SMPConfig

__all__ = [
    "DeepLayer",
    "DeepStack",
    "StackPlace",
    "StackScope",
    "close_scopes",
    "connect_stacks",
    "conv_widths",
    "find_stacks",
]

SHORTEST = 2  # layers: the residual of a single one would be its own input


@dataclass(frozen=True)
class StackPlace:
    """Where a layer stands in its stack.

    Args:
        stack: Qualified name of the stack's first layer.
        depth: ``l``, from 1.
        length: Layers in the stack.
    """

    stack: str
    depth: int
    length: int

    def __str__(self) -> str:
        return f"deep {self.depth}/{self.length}"


class DeepStack:
    """The input of a stack during a forward pass, one per thread; copies and pickles start without."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return DeepStack, ()

    @property
    def initial(self) -> Tensor | None:
        """``H_0`` [N, F] while the stack runs, else :obj:`None`."""
        return getattr(self._local, "initial", None)

    @initial.setter
    def initial(self, value: Tensor | None) -> None:
        self._local.initial = value


class DeepLayer:
    """Mixin of a layer in a deep stack."""

    deep_place = Alias("_deep_place")
    deep_stack = Alias("_deep_stack")
    deep_config = Alias("_deep_config")
    _deep_place: StackPlace
    _deep_stack: DeepStack
    _deep_config: SMPConfig
    _qualified_name: str

    @property
    def initial_residual(self) -> float:
        """``a``."""
        return self._deep_config.initial_residual or 0.0

    @property
    def identity_strength(self) -> float:
        """``b_l``: the weight of the layer's own map against the identity."""
        theta = self._deep_config.identity_map
        return 1.0 if theta is None else math.log(theta / self._deep_place.depth + 1)

    def initial_features(self, x: Tensor) -> Tensor | None:
        """``H_0`` for the nodes of ``x`` [*, N, F], :obj:`None` where no residual is used; call once per forward.

        As in :class:`torch_geometric.nn.GCN2Conv`, fewer rows than those of ``H_0`` are its leading ones.

        Raises:
            RuntimeError: If the stack's first layer has not run in this forward pass.
            ValueError: If ``x`` is not a matrix that fits ``H_0``.
        """
        if not isinstance(x, Tensor):
            raise ValueError(
                f"Expected one feature matrix for '{self._qualified_name}', a layer of a deep stack (got a "
                f"{type(x).__name__}); exclude the layer from the stack by an override of 'smp'"
            )
        if self.initial_residual == 0:
            return None
        place, stack = self._deep_place, self._deep_stack
        if place.depth == 1:
            stack.initial = x
        initial = stack.initial
        if initial is None:
            raise RuntimeError(
                f"Expected '{place.stack}' to run before '{self._qualified_name}' in the same forward pass: it is the "
                f"first layer of their deep stack; run the stack in order, or leave this layer out of it by an override"
            )
        if place.depth == place.length:
            stack.initial = None
        nodes = max(x.dim() - 2, 0)  # [*, N, F]
        sizes = [(*t.shape[:nodes], *t.shape[nodes + 1 :]) for t in (x, initial)]
        if initial.dim() != x.dim() or sizes[0] != sizes[1] or initial.size(nodes) < x.size(nodes):
            raise ValueError(
                f"Expected the input of '{self._qualified_name}' to have the shape of that of '{place.stack}', "
                f"{list(initial.shape)} (got {list(x.shape)})"
            )
        return initial.narrow(nodes, 0, x.size(nodes)) if initial.size(nodes) > x.size(nodes) else initial

    def with_initial(self, x: Tensor, initial: Tensor | None) -> Tensor:
        """``(1 - a) x + a H_0``."""
        return x if initial is None else x * (1 - self.initial_residual) + initial * self.initial_residual

    def identity_mapped(self, support: Tensor, mapped: Tensor) -> Tensor:
        """``(1 - b_l) support + b_l mapped``."""
        strength = self.identity_strength
        if strength == 1:
            return mapped
        if support.shape != mapped.shape:
            raise ValueError(
                f"Expected '{self._qualified_name}' to keep the shape of its input, {list(support.shape)} (got "
                f"{list(mapped.shape)}); leave it out of the deep stack by an override of 'smp'"
            )
        return support * (1 - strength) + mapped * strength


# Finding stacks #######################################################################################################


def find_stacks(widths: Mapping[str, tuple[int, int] | None]) -> dict[str, StackPlace]:
    """Group layers into stacks: consecutive, of equal width, their names apart in one number only.

    Args:
        widths: Input and output width of every candidate in module order; :obj:`None` for one that cannot be in a
            stack.

    Returns:
        The place of every layer in a stack.
    """
    places: dict[str, StackPlace] = {}
    run: list[str] = []

    def close() -> None:
        if len(run) >= SHORTEST:
            places.update({name: StackPlace(run[0], depth, len(run)) for depth, name in enumerate(run, 1)})
        run.clear()

    for name, width in widths.items():
        if width is None or width[0] != width[1]:
            close()
            continue
        if run and not (widths[run[-1]] == width and _continues(run, name)):
            close()
        run.append(name)
    close()
    return places


def _continues(run: list[str], name: str) -> bool:
    position = _differing_number(run[-1], name)
    return position is not None and (len(run) == 1 or position == _differing_number(run[0], run[1]))


def _differing_number(first: str, second: str) -> int | None:
    """Which number alone differs, as in ``convs.1`` and ``convs.2`` or ``block3.conv`` and ``block4.conv``."""
    a, b = re.split(r"(\d+)", first), re.split(r"(\d+)", second)
    differing = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    if len(a) != len(b) or len(differing) != 1 or differing[0] % 2 == 0:
        return None
    return differing[0]


# The module around a stack ############################################################################################


class StackScope:
    """Mixin of the module whose ``forward`` runs deep stacks: what these remember lasts one call."""

    float_class: ClassVar[type[nn.Module]]
    deep_stacks: tuple[DeepStack, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild_scope, (type(self).float_class,), self.__dict__.copy()


_SCOPES: dict[type[nn.Module], type[nn.Module]] = {}


def _scope_class(float_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``(StackScope, float_class)``, made once, under the same name."""
    if float_class not in _SCOPES:
        _SCOPES[float_class] = _make_scope_class(float_class)
    return _SCOPES[float_class]


def _make_scope_class(float_class: type[nn.Module]) -> type[nn.Module]:
    inner: Any = float_class.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = [stack.initial for stack in self.deep_stacks]
        try:
            for stack in self.deep_stacks:
                stack.initial = None
            return inner(self, *args, **kwargs)
        finally:
            for stack, initial in zip(self.deep_stacks, outer, strict=True):
                stack.initial = initial

    namespace = {"float_class": float_class, "forward": forward, "__module__": float_class.__module__}
    return type(float_class.__name__, (StackScope, float_class), {**namespace, "__doc__": float_class.__doc__})


def _rebuild_scope(float_class: type[nn.Module]) -> Any:
    return object.__new__(_scope_class(float_class))


def connect_stacks(model: nn.Module, places: Mapping[str, StackPlace]) -> None:
    """Give the layers of each stack their common memory, and the modules around them its scope; in place.

    Args:
        model: The model.
        places: Every layer of a stack, by qualified name.
    """
    close_scopes(model)
    stacks: dict[str, DeepStack] = {}
    for name, place in places.items():
        layer: Any = model.get_submodule(name)
        stack = stacks.setdefault(place.stack, DeepStack())
        if isinstance(layer, DeepLayer):  # or not converted yet
            layer._deep_stack = stack
    for first, stack in stacks.items():
        around: Any = _module_around(model, [name for name, place in places.items() if place.stack == first])
        if around is None:
            continue
        if not isinstance(around, StackScope):
            around.__class__ = _scope_class(type(around))
            around.deep_stacks = ()
        around.deep_stacks += (stack,)


def close_scopes(model: nn.Module) -> None:
    """Give the modules around stacks their own classes back; in place."""
    scopes: list[Any] = [module for module in model.modules() if isinstance(module, StackScope)]
    for module in scopes:
        del module.deep_stacks
        module.__class__ = type(module).float_class


def _module_around(model: nn.Module, names: list[str]) -> nn.Module | None:
    """The innermost module with a ``forward`` that holds all of ``names``; :obj:`None` where not even the model has."""
    paths = [name.split(".")[:-1] for name in names]
    common = next(i for i in range(min(map(len, paths)), -1, -1) if len({tuple(path[:i]) for path in paths}) == 1)
    for length in range(common, -1, -1):
        module = model.get_submodule(".".join(paths[0][:length]))
        if type(module).forward is not nn.Module.forward and not isinstance(module, MessagePassing):
            return module
    return None


def conv_widths(conv: Any) -> tuple[int, int] | None:
    """Input and output width of a convolution, :obj:`None` where it does not tell."""
    if isinstance(inner := getattr(conv, "nn", None), nn.Module):
        maps = [weight for m in inner.modules() if isinstance(weight := getattr(m, "weight", None), Tensor)]
        maps = [weight for weight in maps if weight.dim() == 2]
        return (maps[0].size(1), maps[-1].size(0)) if maps else None
    width, out = getattr(conv, "in_channels", None), getattr(conv, "out_channels", None)
    if not (isinstance(width, int) and isinstance(out, int)):
        return None
    return width, out * conv.heads if getattr(conv, "concat", False) else out
