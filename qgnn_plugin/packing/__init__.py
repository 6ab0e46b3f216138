"""Packed integer models for inference: packed layers, their files, and packed embeddings."""

from . import convs, linear
from .base import PackedLayer, register_packed
from .model import PackedBytes, is_packed, pack_model, packed_bytes, packed_layers

__all__ = [
    "PackedBytes",
    "PackedLayer",
    "convs",
    "is_packed",
    "linear",
    "pack_model",
    "packed_bytes",
    "packed_layers",
    "register_packed",
]
