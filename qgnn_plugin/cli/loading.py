"""What commands read and write: data, checkpoints, packed models."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..atomic import atomic_file, shown
from ..conversion.convert import quantize_like
from ..data import load_dataset
from ..packing import load_packed
from ..packing.files.packed_model import read_origin
from ..saved import CONFIG_KEY
from .building import Origin, origin_of

__all__ = [
    "Loaded",
    "Readers",
    "expect_suffix",
    "expect_writable",
    "load_data",
    "outputs_of",
    "read_model",
    "save_checkpoint",
]

FORMAT = "qgnn checkpoint"
PACKED = ".safetensors"
Kind = Literal["float", "converted", "packed"]


@dataclass(frozen=True)
class Loaded:
    """A model from a file, and how it is built where that is known."""

    model: nn.Module
    kind: Kind
    origin: Origin

    def expect(self, *kinds: Kind, path: Path, remedy: str) -> Loaded:
        """Itself.

        Raises:
            ValueError: If it is of another kind.
        """
        if self.kind not in kinds:
            raise ValueError(f"Expected a {' or '.join(kinds)} model (got a {self.kind} one in '{path}'); {remedy}")
        return self


# Data #################################################################################################################


def load_data(options: Any) -> Any:
    """The graph that ``--dataset`` and the like name."""
    return load_dataset(options.dataset, options.root, split=options.split, seed=options.seed)


def outputs_of(data: Any) -> int:
    """Columns of the output that a model of ``data`` has: classes, or regression targets."""
    y = data.y
    if y.is_floating_point():
        return 1 if y.dim() == 1 else int(y.size(1))
    return int(y.max()) + 1


# Writing ##############################################################################################################


def expect_writable(path: Path, *, folder: bool = False) -> None:
    """Make the folder of ``path`` (or the folder itself), and make sure that files can be written to it.

    Before anything is computed: an hour of training is no time to learn that there is no place for its result.

    Raises:
        OSError: If not.
    """
    place = path if folder else path.parent
    if not folder and path.is_dir():
        raise IsADirectoryError(f"Expected the name of a file to write (got the folder '{path}')")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(f"Expected a folder that files can be written to (got '{place}': {error.strerror})") from error


def expect_suffix(path: Path, *suffixes: str) -> None:
    """Raise unless ``path`` ends in one of ``suffixes``.

    Raises:
        ValueError: If not.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"Expected a file name that ends in {' or '.join(suffixes)} as --out (got '{path}')")


def save_checkpoint(model: nn.Module, path: Path, origin: Origin) -> None:
    """The state dict of a float or converted model and how it is built; readable without pickled code."""
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, "model": origin.to_dict(), "state_dict": model.state_dict()}, file)


# Reading ##############################################################################################################


class Readers:
    """Where the architecture of a file comes from: options, or what the file says of itself.

    Args:
        options: Of the command line, ``model`` and the like among them.
        in_channels: Width of the features, where data tell it.
        out_channels: Of the outputs.
    """

    def __init__(self, options: Any, in_channels: int | None, out_channels: int | None) -> None:
        self.options, self.in_channels, self.out_channels = options, in_channels, out_channels

    def origin(self, path: Path, saved: Any) -> Origin:
        if self.options.model is not None:
            return origin_of(self.options, self.in_channels, self.out_channels)
        if saved is None:
            raise ValueError(f"'{path}' does not say which model it is of; pass --model, and what it was built with")
        origin = Origin.of_file(saved)
        if not origin.is_trusted:
            raise ValueError(
                f"'{path}' names {origin.class_path}, which is no class of PyG: to import it, pass "
                f"--model {origin.class_path} with --model_args"
            )
        return origin


def read_model(path: Path, readers: Readers) -> Loaded:
    """A packed model, or a float or converted one from a checkpoint; nothing in the file is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or foreign, or does not fit the model.
    """
    if path.suffix == PACKED:
        origin = readers.origin(path, read_origin(path))
        return Loaded(load_packed(path, origin.build()), "packed", origin)
    state, saved = _read_checkpoint(path)
    origin = readers.origin(path, saved)
    model = origin.build()
    state = _of_model(state, model)
    kind: Kind = "float"
    if any(key == CONFIG_KEY or key.endswith(f".{CONFIG_KEY}") for key in state):
        model, kind = quantize_like(model, state), "converted"
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"Expected a checkpoint of {origin.class_path} in '{path}' (got {_brief(error)})") from error
    return Loaded(model.eval(), kind, origin)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The state dict in a file, and the origin that it names, if any."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file (got {'a folder' if path.is_dir() else 'nothing'} at '{path}')")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"Expected a state dict or a Lightning checkpoint (got '{shown(os.fspath(path))}', which holds other "
            f"objects or is damaged: {_brief(error)}); save model.state_dict()"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        saved = content.get("model") if content.get("format") == FORMAT else None
        return dict(content["state_dict"]), saved
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content), None
    raise ValueError(f"Expected a state dict in '{path}' (got a {type(content).__name__} of something else)")


def _of_model(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` without the name under which a LightningModule holds its model."""
    own = set(model.state_dict())
    if own & set(state):
        return state
    prefixes = {key[: -len(name)] for key in state for name in own if key.endswith(f".{name}")}
    for prefix in sorted(prefixes):
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if own <= set(inner):
            return inner
    return state


def _brief(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."
