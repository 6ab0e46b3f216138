"""Packed models as folders of ``config.json`` and ``model.safetensors``, the form that model hubs share; no network."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .atomic import PathLike, atomic_file, named, shown
from .packing import load_packed, save_packed
from .packing.model import specs_of

__all__ = ["PretrainedMixin", "from_pretrained", "save_pretrained"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1
ARGUMENTS = "_pretrained_arguments"  # attribute of a model: what its class was called with

Self = TypeVar("Self", bound="PretrainedMixin")


def save_pretrained(packed: nn.Module, folder: PathLike, *, arguments: Mapping[str, Any] | None = None) -> None:
    """Write a packed model as a folder, which is made where there is none.

    ``config.json`` says in plain words what the model is: its class, the arguments to build its float architecture
    with, and the configuration of every layer; ``model.safetensors`` is the file of :func:`qgnn_plugin.save_packed`.

    Args:
        packed: A model made by ``pack_model``.
        folder: Where to write.
        arguments: What the class of the model is called with, by name, as JSON has it; by default those that
            :class:`PretrainedMixin` has seen.

    Raises:
        TypeError: If ``arguments`` are no mapping of names.
        ValueError: If ``packed`` is no packed model, or ``arguments`` are not what JSON can hold.
        OSError: If the folder cannot be written.
    """
    specs = specs_of(packed)
    if arguments is None:
        arguments = vars(packed).get(ARGUMENTS)
    _check_arguments(arguments)
    layers = {spec.name: spec.config.to_dict() for spec in specs}
    configs = list(layers.values())
    same = all(config == configs[0] for config in configs)
    config = {
        "format": FORMAT,
        "library_name": "qgnn_plugin",
        "model_class": next((spec.type for spec in specs if spec.name == ""), type(packed).__name__),
        "arguments": None if arguments is None else dict(arguments),
        "quantization": configs[0] if same else layers,
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected arguments that JSON can hold: numbers, texts, lists and mappings (got {error}); give others by "
            f"from_pretrained(folder, model)"
        ) from None
    where = Path(named(folder))
    where.mkdir(parents=True, exist_ok=True)
    save_packed(packed, where / WEIGHTS)
    with atomic_file(where / CONFIG) as file:
        file.write(text.encode() + b"\n")


def _check_arguments(arguments: Any) -> None:
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise TypeError(f"Expected 'arguments' by name, a mapping (got {type(arguments).__name__})")
    for name in arguments:
        if not isinstance(name, str):
            raise TypeError(f"Expected names of arguments in 'arguments' (got {name!r})")


def from_pretrained(folder: PathLike, model: nn.Module | type[nn.Module], **options: Any) -> nn.Module:
    """Read a packed model from a folder that :func:`save_pretrained` wrote; nothing in it is executed.

    Args:
        folder: The folder.
        model: The float architecture, or its class, which is called with the arguments in ``config.json``.
        options: Those of :func:`qgnn_plugin.load_packed`.

    Raises:
        FileNotFoundError: If there is no such folder, or a file is missing in it.
        ValueError: If ``config.json`` is none of this library, or tells no arguments where ``model`` is a class,
            besides what :func:`qgnn_plugin.load_packed` raises.
    """
    where = Path(named(folder))
    config = _read(where / CONFIG)
    if isinstance(model, type):
        arguments = config.get("arguments")
        if not isinstance(arguments, dict):
            raise ValueError(
                f"Expected a folder that tells the arguments of {model.__name__} ('{shown(folder)}' does not); give "
                f"the model: from_pretrained(folder, {model.__name__}(...)), or save it with arguments=..."
            )
        model = model(**arguments)
    return load_packed(where / WEIGHTS, model, **options)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a folder written by save_pretrained (got no '{path}')")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"Expected JSON in '{path}' (got {error}); write the folder again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"Expected format {FORMAT} of qgnn_plugin in '{path}' (got {found}); write the folder again")
    return config


class PretrainedMixin:
    """Mixin of a user's model that remembers what it was built with, and reads and writes folders by itself::

        class Net(qgnn.PretrainedMixin, nn.Module):
            def __init__(self, in_channels: int, hidden: int) -> None: ...

        packed = qgnn.pack_model(qmodel)
        packed.save_pretrained("net-int4")
        packed = Net.from_pretrained("net-int4")
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model: Any = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)
        except TypeError:
            return model  # whose construction will say so
        given = dict(list(bound.arguments.items())[1:])
        for parameter in inspect.signature(cls.__init__).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        model.__dict__[ARGUMENTS] = given
        return model

    def save_pretrained(self: Any, folder: PathLike) -> None:
        """:func:`save_pretrained` of this model, which is packed."""
        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls: Any, folder: PathLike, **options: Any) -> Any:
        """:func:`from_pretrained` of this class."""
        return from_pretrained(folder, cls, **options)
