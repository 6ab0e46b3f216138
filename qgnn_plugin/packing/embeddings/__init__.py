"""Tables of packed rows: embeddings that are searched, states that are read and written."""

from .embeddings import PackedEmbeddings

__all__ = ["PackedEmbeddings"]
