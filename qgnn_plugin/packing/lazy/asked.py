"""Ranges that a result is packed in together: what was asked of it one after another is computed in one pass later."""

from __future__ import annotations

from typing import Any

__all__ = ["Asked", "key_of"]

Out = dict[str, Any]  # a range, as kernels take it
Key = tuple[int, int, Any]

MOST = 12  # ranges of one result


def key_of(out: Out) -> Key:
    """What tells ranges apart, for as long as they are held."""
    return id(out["out_scale"]), out["out_bits"], out.get("columns")


class Asked:
    """The ranges that follow the first one that results of a layer are packed in, as in the calls before.

    A layer that sends features and multiplies them too (GraphConv, RGCNConv) packs them in two ranges.  The first call
    computes them twice; from the next one on, the blocks of floats that the first range is asked of are packed in the
    others as well.  A range that is not asked again is forgotten.
    """

    def __init__(self) -> None:
        # By the key of the first range: that range, held so that its key stays that of no other, and the others.
        self._held: dict[Key, tuple[Out, dict[Key, Out]]] = {}
        self._unused: dict[Key, set[Key]] = {}

    def note(self, first: Out, other: Out) -> bool:
        """Take it that ``other`` follows ``first``; whether there is room for it."""
        _, others = self._held.setdefault(key_of(first), (first, {}))
        if len(others) >= MOST:
            return False
        others[key_of(other)] = other
        return True

    def after(self, first: Out) -> list[Out]:
        """The ranges to be packed together with ``first``, without those that nobody wanted in the call before."""
        key = key_of(first)
        if key not in self._held:
            return []
        others = self._held[key][1]
        for unused in self._unused.pop(key, ()):
            others.pop(unused, None)
        self._unused[key] = set(others)
        return list(others.values())

    def was_used(self, first: Out, other: Out) -> None:
        """Take it that codes in the range ``other`` were wanted."""
        self._unused.get(key_of(first), set()).discard(key_of(other))
