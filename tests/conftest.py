"""Shared by every test."""

import os

# Triton reads this when a kernel is decorated, so before anything imports one.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Every test starts from the same global generator and modes, whatever the one before it left.

    Without denormal numbers, say, property tests of float ranges look for values forever.
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialized tensors with NaN (integers: the largest value, booleans: true).

    An output that a kernel forgets to write then fails any comparison.
    """

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if out.is_floating_point() or out.is_complex():
                value: Any = float("nan")
            else:
                value = True if out.dtype == torch.bool else torch.iinfo(out.dtype).max
            with torch.no_grad():
                return out.fill_(value)

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poisoned(getattr(Tensor, name)))
