"""Converted layers: one mixin per layer type, found through a registry."""

from .base import QuantizedLayer
from .message_passing import QuantizedConv, QuantizedMessagePassing
from .registry import mixin_for, register_layer

__all__ = ["QuantizedConv", "QuantizedLayer", "QuantizedMessagePassing", "mixin_for", "register_layer"]
