"""Models by name: a class of PyG or an import path, and the arguments that it takes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch_geometric.nn as pyg
from torch import nn

__all__ = ["Origin", "origin_of"]

TRUSTED = "torch_geometric.nn."  # classes that a file may name: nothing else is imported because a file says so
GAT_HEADS = 8

# What the options stand for in the signature of a class, the first name that it has.
NAMES = {
    "in_channels": ("in_channels", "in_features", "in_dim", "input_dim", "num_features", "num_node_features"),
    "hidden": ("hidden_channels", "hidden_dim", "hidden_features", "hidden"),
    "layers": ("num_layers", "layers"),
    "out_channels": ("out_channels", "out_features", "out_dim", "output_dim", "num_classes"),
    "dropout": ("dropout",),
}


@dataclass(frozen=True)
class Origin:
    """How a model is built: written into the files that the command line makes, so that it can read them.

    Args:
        class_path: Where its class is imported from.
        arguments: What it is called with, as JSON knows it.
    """

    class_path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_file(cls, value: Any) -> Origin:
        """The origin that a file names; only classes of PyG, since importing anything else would run its code.

        Raises:
            ValueError: If it is no origin.
        """
        known = isinstance(value, Mapping) and value.keys() == {"class", "arguments"}
        if not known or not isinstance(value["class"], str) or not isinstance(value["arguments"], Mapping):
            raise ValueError(f"Expected a file that names class and arguments of its model (got {str(value)[:80]})")
        return cls(value["class"], dict(value["arguments"]))

    @property
    def is_trusted(self) -> bool:
        return self.class_path.startswith(TRUSTED)

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.class_path, "arguments": dict(self.arguments)}

    def build(self) -> nn.Module:
        """A new model with random weights.

        Raises:
            ValueError: If the class is unknown, no model, or takes other arguments.
        """
        cls = model_class(self.class_path)
        try:
            return cls(**self.arguments)
        except TypeError as error:
            raise ValueError(
                f"Expected arguments that {self.class_path} takes (got {error}); see --model_args"
            ) from error


def origin_of(options: Any, in_channels: int | None, out_channels: int | None) -> Origin:
    """The model that ``--model``, ``--hidden`` and the like describe.

    Raises:
        ValueError: If the class is unknown, or requires what no option gives.
    """
    cls = model_class(options.model)
    parameters = inspect.signature(cls).parameters
    values = {
        "in_channels": in_channels,
        "hidden": options.hidden,
        "layers": options.layers,
        "out_channels": out_channels,
        "dropout": options.dropout,
    }
    arguments: dict[str, Any] = {}
    for option, names in NAMES.items():
        name = next((n for n in names if n in parameters), None)
        if name is not None and values[option] is not None:
            arguments[name] = values[option]
    if cls is pyg.GAT:
        arguments["heads"] = GAT_HEADS
    arguments |= options.model_args
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in optional and name not in arguments
    ]
    if missing:
        raise ValueError(
            f"Expected every argument that {cls.__name__} requires (got none for {', '.join(missing)}); "
            f"pass them: --model_args '{{\"{missing[0]}\": ...}}'"
        )
    # As JSON has them: what is read back is what was written, and no type of the parser is left.
    return Origin(f"{cls.__module__}.{cls.__qualname__}", json.loads(json.dumps(arguments)))


def model_class(name: str) -> type[nn.Module]:
    """The class of a name: of :mod:`torch_geometric.nn`, or an import path (the working directory included).

    Raises:
        ValueError: If there is none, or it is no :class:`torch.nn.Module`.
    """
    if "." in name:
        cls = _imported(name)
    else:
        cls = getattr(pyg, name, None)
        if cls is None:
            near = difflib.get_close_matches(name, [n for n in dir(pyg) if n[0].isupper()], n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"Expected a class of torch_geometric.nn or an import path such as package.module.Class (got {name!r})."
                f"{hint}"
            )
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise ValueError(f"Expected {name!r} to be a class of models, a torch.nn.Module (got {type(cls).__name__})")
    return cls


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does: a console script looks beside itself only
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Expected something to import at {path!r} (got {error})") from error
    finally:
        sys.path.remove(here)
