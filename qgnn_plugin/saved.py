"""The configuration of a converted model inside its state dict: small tensors, which every format of files can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONFIG_KEY", "decode", "encode", "refusal", "refuse", "whole"]

CONFIG_KEY = "_quantization_state"  # of a layer, after its prefix; sites have an `_extra_state` each
LONGEST = 1 << 20


def encode(value: Mapping[str, Any]) -> Tensor:
    """Plain values as the bytes of JSON in an int16 tensor on the host: sums of many state dicts do not overflow."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    return torch.tensor(list(text), dtype=torch.int16)


def decode(state: Any) -> dict[str, Any]:
    """What :func:`encode` was given; of an average of state dicts what all of them were.

    Raises:
        ValueError: If ``state`` is something else.
    """
    if not isinstance(state, Tensor) or state.dim() != 1 or len(state) > LONGEST:
        raise ValueError(f"Expected the settings of a converted model, a vector (got {_brief(state)})")
    try:
        value = json.loads(bytes(whole(state).tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected the settings of a converted model (got none: {error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"Expected the settings of a converted model (got {type(value).__name__})")
    return value


def whole(state: Tensor) -> Tensor:
    """Integers, which an average of equal ones has become floats next to.

    Raises:
        ValueError: If there are others, as in an average of different ones.
    """
    integers = state.round().long()
    if not torch.allclose(integers.double(), state.double(), rtol=0, atol=0.02):
        raise ValueError("averaged over different models")
    return integers


def _brief(state: Any) -> str:
    return f"{state.dtype} {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__


def difference(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str, str] | None:
    """The settings that differ, ``name=value`` each, as they are here and as they were saved."""
    names = [name for name in {**mine, **saved} if mine.get(name) != saved.get(name)]
    if not names:
        return None
    here, there = (", ".join(f"{n}={v[n]!r}" for n in names if n in v) or "nothing" for v in (mine, saved))
    return here, there


REMEDY = (
    "; convert the model as the saved one was, qgnn_plugin.quantize_like(model, state_dict), or load float weights, "
    "those of qgnn_plugin.restore_model(saved)"
)


def refusal(site: str, mine: Mapping[str, Any], state: Any, part: str | None = None) -> str | None:
    """Why ``state`` does not belong to something with the settings ``mine``; :obj:`None` where it does.

    Args:
        site: Its name, for the message.
        mine: The settings that there are.
        state: Those that were saved, encoded.
        part: Which of the saved values are settings; default all.
    """
    if isinstance(state, Tensor) and state.is_meta:
        return None
    try:
        saved = decode(state)
    except ValueError as error:
        return f"'{site}': {error}"
    settings = saved if part is None else saved.get(part)
    if not isinstance(settings, dict):
        return f"'{site}': Expected the settings of a converted model (got {type(settings).__name__})"
    differing = difference(mine, settings)
    if differing is None:
        return None
    return f"Expected a state dict with {differing[0]} at '{site}' (got {differing[1]})"


def refuse(error_msgs: list[str], message: str) -> None:
    """Add ``message`` to those of :meth:`torch.nn.Module.load_state_dict`, the first one with the way out."""
    error_msgs.append(message if any(REMEDY in other for other in error_msgs) else message + REMEDY)
