"""Files of packed tensors: safetensors with a description and checksums in the header."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.layout import LAYOUT_VERSION

__all__ = ["read", "write"]

FORMAT = "qgnn_plugin"
VERSION = 1
DIGEST_BYTES = 8
DIGEST_CHARS = 2 * DIGEST_BYTES
PathLike = str | os.PathLike[str]


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return _digest(flat.numpy())


def write(path: PathLike, kind: str, tensors: Mapping[str, Tensor], description: Any) -> None:
    """Write tensors and a JSON description, atomically: a reader sees the old file or the new one.

    The header holds the bit layout's version, a checksum of the description and one of every tensor
    (in the order of their sorted names).
    """
    path = Path(path)
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {
        "version": VERSION,
        "layout": LAYOUT_VERSION,
        "kind": kind,
        "checksums": "".join(_tensor_digest(stored[name]) for name in sorted(stored)),
        "description": description,
    }
    text = json.dumps(header, separators=(",", ":"))
    # One entry: safetensors writes several in random order, and equal models shall give equal files.
    metadata = {FORMAT: _digest(text.encode()) + text}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(stored, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: PathLike, kind: str, *, verify: bool = True) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`write` wrote: memory-mapped tensors and the description; nothing is executed.

    Args:
        path: The file.
        kind: What it must hold.
        verify: Compare every tensor with its checksum (reads the file once); otherwise pages are
            read when they are first used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, truncated, foreign, or of another kind or version.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Expected a file (got '{path}')")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _header(path, file.metadata() or {}, kind)
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Expected a file written by qgnn_plugin (got '{path}', which is damaged, truncated or not a "
            f"safetensors file: {error})"
        ) from error
    sums = header["checksums"]
    width = DIGEST_CHARS
    if len(sums) != width * len(names):
        raise ValueError(f"'{path}' is damaged: {len(names)} tensors, {len(sums) // width} checksums")
    for i, name in enumerate(names if verify else []):
        if _tensor_digest(tensors[name]) != sums[width * i : width * (i + 1)]:
            raise ValueError(f"'{path}' is damaged: the checksum of tensor '{name}' does not match")
    return tensors, header["description"]


def _header(path: PathLike, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise ValueError(f"Expected a file written by qgnn_plugin (got '{path}', a safetensors file from elsewhere)")
    digest, text = metadata[FORMAT][:DIGEST_CHARS], metadata[FORMAT][DIGEST_CHARS:]
    if _digest(text.encode()) != digest:
        raise ValueError(f"'{path}' is damaged: the checksum of its description does not match")
    header = json.loads(text)
    for name, value in {"version": VERSION, "layout": LAYOUT_VERSION, "kind": kind}.items():
        if header.get(name) != value:
            raise ValueError(f"Expected {name} {value!r} in '{path}' (got {header.get(name)!r})")
    return header
