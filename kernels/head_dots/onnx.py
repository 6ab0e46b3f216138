"""``head_dots`` in operations that ONNX has: those of its reference."""

from . import head_dots_reference as head_dots

__all__ = ["head_dots"]
