"""Files of packed tensors: safetensors with a description and checksums in the header.

A description of more than a few fields is a third of a small file, most of it the same few names: it is compressed
(zlib, in base 85, which JSON need not escape), and the version of the file says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from ...atomic import PathLike, atomic_file, named, shown
from ...kernels.layout import LAYOUT_VERSION
from . import tensor_file

__all__ = ["PathLike", "kind_of", "read", "refuse", "write"]

FORMAT = "qgnn_plugin"
PLAIN, COMPRESSED = VERSIONS = (1, 2)  # how the description is written
LARGEST_DESCRIPTION = tensor_file.LARGEST_HEADER  # bytes, once it is no longer compressed
DIGEST_BYTES = 8
DIGEST_CHARS = 2 * DIGEST_BYTES


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def write(path: PathLike, kind: str, tensors: Mapping[str, Tensor], description: Any) -> None:
    """Write tensors and a JSON description, atomically: a reader sees the old file or the new one.

    The header holds the bit layout's version, a checksum of the description and one of every tensor
    (in the order of their sorted names).

    Raises:
        OSError: If there is no such folder, ``path`` is one, or it cannot be written.
        ValueError: If a tensor is sparse or of a type that the format does not know.
    """
    stored = {name: _on_host(name, tensor) for name, tensor in tensors.items()}
    version, description = _shorter(description)
    header = {
        "version": version,
        "layout": LAYOUT_VERSION,
        "kind": kind,
        "checksums": "".join(_digest(tensor_file.as_bytes(stored[name])) for name in sorted(stored)),
        "description": description,
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    with atomic_file(path) as file:
        tensor_file.write(file, stored, {FORMAT: _digest(text.encode()) + text})


def _shorter(description: Any) -> tuple[int, Any]:
    """The version of a file with this description, and what is written: the text of fewer bytes."""
    text = json.dumps(description, separators=(",", ":"), allow_nan=False)
    compressed = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    return (COMPRESSED, compressed) if len(compressed) < len(text) else (PLAIN, description)


def _description(path: PathLike, header: Mapping[str, Any]) -> Any:
    """The description in a header, of either version."""
    value: Any = header.get("description")
    if header["version"] == PLAIN:
        return value
    try:
        stream = zlib.decompressobj()
        text = stream.decompress(base64.b85decode(value), LARGEST_DESCRIPTION)
        if not stream.eof:
            raise ValueError("it is truncated or too long")
        return tensor_file.parse_json(text.decode())
    except (TypeError, ValueError, zlib.error) as error:
        refuse(path, "description", f"a compressed text ({error})", value)


def _on_host(name: str, tensor: Tensor) -> Tensor:
    tensor_file.check(name, tensor)
    return tensor.detach().cpu().contiguous().resolve_conj()


def read(path: PathLike, kind: str, *, verify: bool = True, mmap: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`write` wrote: tensors and the description; nothing is executed.

    Args:
        path: The file.
        kind: What it must hold.
        verify: Compare every tensor with its checksum.
        mmap: Map the file instead of reading it into memory of its own.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, truncated, foreign, or of another kind or version.
    """
    tensors, header = _opened(path, mmap=mmap)
    for field, values in {"version": VERSIONS, "layout": (LAYOUT_VERSION,), "kind": (kind,)}.items():
        found = header.get(field)
        if not any(type(found) is type(value) and found == value for value in values):
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"Expected {field} {wanted} in '{shown(path)}' (got {_brief(found)})")
    _check_sums(path, tensors, header.get("checksums"), verify)
    return tensors, _description(path, header)


def kind_of(path: PathLike) -> str:
    """What a file holds: ``"model"`` or ``"embeddings"``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, truncated or foreign.
    """
    return str(_opened(path, mmap=True)[1].get("kind"))


def _opened(path: PathLike, *, mmap: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a file, not yet compared with their checksums, and its header."""
    name = named(path)
    if not os.path.isfile(name):
        found = "a folder" if os.path.isdir(name) else "nothing" if not os.path.lexists(name) else "no regular file"
        raise FileNotFoundError(f"Expected a file (got {found} at '{shown(path)}')")
    try:
        tensors, metadata = tensor_file.read(name, mmap=mmap)
        header = _header(metadata)
    except (tensor_file.FormatError, UnicodeError) as error:
        raise ValueError(
            f"Expected a file written by qgnn_plugin (got '{shown(path)}', which is damaged, truncated or not a "
            f"safetensors file: {error})"
        ) from error
    if header is None:
        raise ValueError(
            f"Expected a file written by qgnn_plugin (got '{shown(path)}', a safetensors file from elsewhere)"
        )
    return tensors, header


def _header(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The description and what is around it, :obj:`None` where there is none of ours."""
    if FORMAT not in metadata:
        return None
    digest, text = metadata[FORMAT][:DIGEST_CHARS], metadata[FORMAT][DIGEST_CHARS:]
    if _digest(text.encode()) != digest:
        raise tensor_file.FormatError("the checksum of its description does not match")
    header = tensor_file.parse_json(text)
    if not isinstance(header, dict):
        raise tensor_file.FormatError("its description is no mapping")
    return header


def _check_sums(path: PathLike, tensors: Mapping[str, Tensor], sums: Any, verify: bool) -> None:
    names, width = sorted(tensors), DIGEST_CHARS
    if not isinstance(sums, str) or len(sums) != width * len(names):
        refuse(path, "checksums", f"one for each of {len(names)} tensors", sums)
    for i, name in enumerate(names if verify else []):
        if _digest(tensor_file.as_bytes(tensors[name])) != sums[width * i : width * (i + 1)]:
            raise ValueError(f"'{shown(path)}' is damaged: the checksum of tensor '{name}' does not match")


def refuse(path: PathLike, field: str, expected: str, found: Any) -> NoReturn:
    """Say which field of a file's description is not what it must be."""
    raise ValueError(f"Expected {expected} in the field '{field}' of '{shown(path)}' (got {_brief(found)})")


def _brief(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
