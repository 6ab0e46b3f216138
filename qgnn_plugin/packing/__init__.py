"""Packed integer models for inference: packed layers, their files, and packed embeddings."""

from . import generic, linear, maps, own_weights, sums
from .base import PackedLayer, register_packed
from .cuda_graph import CapturedModel, capture
from .embeddings import PackedEmbeddings
from .files import load_packed, save_packed
from .model import PackedBytes, is_packed, pack_model, packed_bytes, packed_layers
from .rows import PackedRows, pack_rows

__all__ = [
    "CapturedModel",
    "PackedBytes",
    "PackedEmbeddings",
    "PackedLayer",
    "PackedRows",
    "capture",
    "generic",
    "is_packed",
    "linear",
    "load_packed",
    "maps",
    "own_weights",
    "pack_model",
    "pack_rows",
    "packed_bytes",
    "packed_layers",
    "register_packed",
    "save_packed",
    "sums",
]
