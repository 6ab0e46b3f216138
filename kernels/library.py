"""Registration of the ops with ``torch.library``, namespace ``qgnn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .backend import check_devices, dispatch

__all__ = ["register"]

_library = torch.library.Library("qgnn", "DEF")


def register(op: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define ``qgnn::<op>`` with its fake (meta) implementation; devices dispatch through
    :mod:`.backend`.
    """
    _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return dispatch(op, check_devices(*tensors))(*args, **kwargs)

    for key in ("CPU", "CUDA"):
        _library.impl(op, run, key)
    torch.library.register_fake(f"qgnn::{op}", fake, lib=_library)
