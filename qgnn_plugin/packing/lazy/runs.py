"""How often results were computed: a layer whose result had to be computed twice writes floats from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .asked import Asked

__all__ = ["JointRuns", "Runs", "RunsOfColumns"]


class Runs:
    """How often a producer has run: all that follows from it shares the count.

    Args:
        on_repeat: Called where it runs again.
        asked: The ranges that its result is packed in.
    """

    def __init__(self, on_repeat: Callable[[], None], asked: Asked) -> None:
        self.count, self.on_repeat, self.asked = 0, on_repeat, asked

    def add(self) -> None:
        self.count += 1
        if self.count > 1:
            self.on_repeat()

    def undo(self) -> None:
        self.count -= 1


class JointRuns:
    """The runs of a sum are those of its terms; columns of one result, whose rows are computed once, are one."""

    is_once = False
    terms: tuple[Any, ...]

    def __init__(self, *terms: Any) -> None:
        every = [one for term in terms for one in (term.terms if type(term) is JointRuns else (term,))]
        firsts = {id(term): k for k, term in reversed(list(enumerate(every)))}
        self.terms = tuple(t for k, t in enumerate(every) if not getattr(t, "is_once", False) or firsts[id(t)] == k)

    @property
    def asked(self) -> Asked:
        """That of the first: ranges are told apart by what packs in them."""
        return self.terms[0].asked

    def add(self) -> None:
        for term in self.terms:
            term.add()

    def undo(self) -> None:
        for term in self.terms:
            term.undo()


class RunsOfColumns(JointRuns):
    """The runs of a result whose columns share the rows that are computed of it."""

    is_once = True

    def __init__(self, runs: Any) -> None:
        self.terms = (runs,)
