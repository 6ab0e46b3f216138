"""Fast paths of :mod:`torch.nn` and PyG that read the weights of the layers inside past these layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import HeteroDictLinear

from ..config import OFF
from .base import SwappedLayer, named_as

__all__ = ["WithoutFastPath", "close_fast_paths", "open_fast_paths"]


class WithoutFastPath(SwappedLayer):
    """Mixin of a module around quantized layers: it runs them, one by one, in eval mode as well."""

    guard: type[WithoutFastPath]

    def own_sites(self) -> dict[str, int]:
        return {}

    def added_names(self) -> tuple[str, ...]:
        return ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).guard, type(self).float_class), self.__dict__.copy()

    def _is_off(self: Any) -> bool:
        layers = [m for m in self.modules() if isinstance(m, SwappedLayer)]
        return all(bits == OFF for layer in layers for bits in layer.own_sites().values())


class GuardedEncoderLayer(WithoutFastPath):
    """Guards :class:`torch.nn.TransformerEncoderLayer`."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """What the fast path asks for: 0 for an activation that it does not know."""
        return self.__dict__["activation_relu_or_gelu"] if self._is_off() else 0


class GuardedEncoder(WithoutFastPath):
    """Guards :class:`torch.nn.TransformerEncoder`, which makes nested tensors for the fast path of its layers."""

    layers: nn.ModuleList
    norm: nn.Module | None

    @property
    def use_nested_tensor(self) -> bool:
        return self._is_off() and self.__dict__["use_nested_tensor"]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        out: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)  # type: ignore[misc]
        if mask is not None or src_key_padding_mask is None or not self._drops_padding(src, src_key_padding_mask):
            return out
        blank = out.new_zeros(1, 1, out.size(-1))
        return torch.where(src_key_padding_mask[..., None] != 0, blank if self.norm is None else self.norm(blank), out)

    def _drops_padding(self, src: Tensor, padding: Tensor) -> bool:
        """Whether the float encoder would make a nested tensor here, which comes back with zeros as padding.

        It does so in eval mode without gradients, where all padding follows what it pads.
        """
        if self._is_off() or not vars(self).get("use_nested_tensor") or self.layers[0].training or src.dim() != 3:
            return False
        if src.is_nested or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
            return False
        if torch.is_grad_enabled() and (src.requires_grad or self._had_gradients()):
            return False
        if not getattr(self, "mask_check", True):
            return True
        valid = padding == 0
        return not torch.compiler.is_compiling() and not bool((valid[:, 1:] & ~valid[:, :-1]).any())

    def _had_gradients(self: Any) -> bool:
        """Whether its weights want gradients; taken for granted of those that are packed."""
        inside = [m for m in self.layers[0].modules() if isinstance(m, SwappedLayer)]
        return any("packed" in m.notes for m in inside) or any(p.requires_grad for p in self.layers[0].parameters())


class GuardedHeteroDictLinear(WithoutFastPath):
    """Guards :class:`torch_geometric.nn.HeteroDictLinear`, which multiplies many types in one kernel."""

    def forward(self: Any, x_dict: dict[Any, Tensor]) -> dict[Any, Tensor]:
        if self._is_off():
            return super().forward(x_dict)  # type: ignore[misc]
        return {key: lin(x_dict[key]) for key, lin in self.lins.items() if key in x_dict}


GUARDS: dict[type[nn.Module], type[WithoutFastPath]] = {
    nn.TransformerEncoderLayer: GuardedEncoderLayer,
    nn.TransformerEncoder: GuardedEncoder,
    HeteroDictLinear: GuardedHeteroDictLinear,
}

_CLASSES: dict[tuple[type, type], type] = {}


def _guarded_class(guard: type[WithoutFastPath], float_class: type[nn.Module]) -> type:
    key = (guard, float_class)
    if key not in _CLASSES:
        namespace = {**named_as(float_class), "guard": guard, "__repr__": SwappedLayer.__repr__}
        _CLASSES[key] = type(float_class.__name__, (guard, float_class), namespace)
    return _CLASSES[key]


def _rebuild(guard: type[WithoutFastPath], float_class: type[nn.Module]) -> Any:
    return object.__new__(_guarded_class(guard, float_class))


def close_fast_paths(model: nn.Module) -> None:
    """Let every module of ``model`` that would read the weights of quantized layers inside it call them, in place."""
    for module in list(model.modules()):
        guard = next((guard for cls, guard in GUARDS.items() if isinstance(module, cls)), None)
        if guard is None or isinstance(module, SwappedLayer):
            continue
        if any(isinstance(inner, SwappedLayer) for inner in module.modules()):
            module.__class__ = _guarded_class(guard, type(module))


def open_fast_paths(model: nn.Module) -> None:
    """Undo :func:`close_fast_paths`."""
    guarded: list[Any] = [module for module in model.modules() if isinstance(module, WithoutFastPath)]
    for module in guarded:
        module.__class__ = type(module).float_class
