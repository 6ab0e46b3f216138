"""Packed models and embeddings as files."""

from .packed_model import load_packed, save_packed

__all__ = ["load_packed", "save_packed"]
