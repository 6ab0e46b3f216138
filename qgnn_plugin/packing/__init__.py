"""Packed integer models for inference: packed layers, their files, and packed embeddings."""

from .cuda_graph import CapturedModel, capture
from .embeddings.embeddings import PackedEmbeddings
from .embeddings.rows import PackedRows, pack_rows
from .files.packed_model import load_packed, save_packed
from .layers import linear, maps
from .layers.base import PackedLayer, register_packed
from .lazy import sums
from .message_passing import generic, own_weights
from .model import PackedBytes, is_packed, pack_model, packed_bytes, packed_layers

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
