"""The float teacher of a distilled model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """A float model that gives soft labels: in eval mode, without gradients.

    It is not an ``nn.Module`` on purpose: as an attribute of one it stays out of ``parameters()``
    and ``state_dict()``, so it is neither trained, nor saved, nor wrapped for several devices.

    Args:
        model: The trained model; switched to eval mode here and left in it.
        student: The model that learns from it.

    Raises:
        ValueError: Teacher and student share parameters: it would change as the student trains.
    """

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        shared = {id(p) for p in model.parameters()} & {id(p) for p in student.parameters()}
        if shared:
            raise ValueError(
                f"expected a teacher of its own (got one that shares {len(shared)} parameters "
                "with the model): pass copy.deepcopy(teacher), taken before training"
            )
        self.model = model.eval()
        self._inputs: list[tuple[Any, int]] = []
        self._logits: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Move the teacher; forgets the cached logits."""
        self.model.to(device)
        self.forget()

    def forget(self) -> None:
        """Drop the cached logits and the inputs that they belong to."""
        self._inputs, self._logits = [], None

    @torch.no_grad()
    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, constant: bool) -> Tensor:
        """Logits of ``model(*args, **kwargs)``.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.
            constant: The same inputs are likely to come again (full-batch training): keep the
                logits and return them for as long as every input is the same object, unmodified.
        """
        if not constant:
            return self.model(*args, **kwargs)
        inputs = [_identity(value) for value in (*args, *kwargs.values())]
        if self._logits is None or not _same(inputs, self._inputs):
            self._logits = self.model(*args, **kwargs)
            self._inputs = inputs
        return self._logits

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inputs": [], "_logits": None}


def _identity(value: Any) -> tuple[Any, int]:
    """The object and, for a tensor, the count of its in-place modifications."""
    tracked = isinstance(value, Tensor) and not value.is_inference()
    return value, value._version if tracked else 0


def _same(inputs: list[tuple[Any, int]], others: list[tuple[Any, int]]) -> bool:
    return len(inputs) == len(others) and all(
        value is other and version == other_version
        for (value, version), (other, other_version) in zip(inputs, others, strict=True)
    )
