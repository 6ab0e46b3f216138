"""Kernels written from an expression: what one edge computes, and how the edges of a row are reduced.

:mod:`.program` is the expression and its reference in torch, :mod:`.cpu` and :mod:`.triton` write kernels from it, and
:mod:`.run` chooses between them.
"""
