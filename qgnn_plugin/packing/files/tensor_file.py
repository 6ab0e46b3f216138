"""The safetensors format, read from memory that is the reader's own and written to a file that is open.

The library takes paths only, as UTF-8, and maps what it reads: a file that is overwritten or cut would change the
tensors, or end the process.  The format (https://github.com/huggingface/safetensors#format): eight bytes with the
length of a JSON header, the header (name to type, shape and place), the data.
"""

from __future__ import annotations

import json
import math
import mmap as memory_map
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["FormatError", "as_bytes", "check", "parse_json", "read", "write"]

ALIGNMENT = 8
LENGTH = struct.Struct("<Q")
METADATA = "__metadata__"
MOST_DIMENSIONS = 64
LARGEST_HEADER = 100_000_000  # the library's own limit

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class FormatError(ValueError):
    """What is wrong with a file's form."""


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    flat = torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(data)


def check(name: str, tensor: Tensor) -> None:
    """Raise unless the format knows tensors of this kind.

    Raises:
        ValueError: If it is sparse or of a type that the format does not know.
    """
    if tensor.layout != torch.strided or tensor.dtype not in _NAMES or tensor.is_meta:
        raise ValueError(
            f"Expected a dense tensor of a common type at '{name}' (got {tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}); keep it out of the state dict: register_buffer(..., persistent=False)"
        )


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous host tensors that pass :func:`check`; the same ones give the same bytes."""
    # The widest first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    file.write(LENGTH.pack(len(text)))
    file.write(text)
    for name in names:
        file.write(as_bytes(tensors[name]))


def read(path: str | bytes, *, mmap: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the metadata.

    Nothing larger than the file is allocated: every size is checked against what is there.

    Args:
        path: The file.
        mmap: Map the file instead of reading it; tensors may be written to without changing it.

    Raises:
        FormatError: If it is no safetensors file, cut, or at odds with itself.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < LENGTH.size:
            raise FormatError(f"it is truncated: {size} bytes")
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        start = LENGTH.size + length
        if length > LARGEST_HEADER or start > size:
            raise FormatError(f"it is truncated or not a safetensors file: a header of {length} bytes in {size}")
        header = parse_json(file.read(length))
        if mmap:
            data: Any = memory_map.mmap(file.fileno(), size, access=memory_map.ACCESS_COPY)
        else:
            data, start = bytearray(size - start), 0
            if file.readinto(data) != len(data):
                raise FormatError("it became shorter while it was read")
    if not isinstance(header, dict):
        raise FormatError("its header is no mapping")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FormatError("its metadata are no texts")
    return _tensors(header, data, start), metadata


def _tensors(header: Mapping[str, Any], data: Any, start: int) -> dict[str, Tensor]:
    """The tensors that lie in ``data`` from ``start`` on, one after another without gaps."""
    size, end = len(data) - start, 0
    entries = {name: _entry(name, value) for name, value in header.items()}
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        count = math.prod(shape)
        if begin != end or stop > size or stop - begin != count * dtype.itemsize or begin % dtype.itemsize:
            raise FormatError(f"it is truncated or tensor '{name}' is not where its header says")
        if count:
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
        end = stop
    if end != size:
        raise FormatError(f"its tensors end at {end} of {size} bytes")
    return {name: tensors[name] for name in header}


def _entry(name: str, value: Any) -> tuple[torch.dtype, list[int], int, int]:
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
        sizes = isinstance(shape, list) and isinstance(place, list) and all(map(_is_size, (*shape, *place)))
        if isinstance(dtype, str) and dtype in _TYPES and sizes and len(place) == 2 and _can_be(shape):
            return _TYPES[dtype], shape, *place
    raise FormatError(f"it has no type, shape and place for tensor '{name}'")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _can_be(shape: list[int]) -> bool:
    """Whether there are tensors of this shape: strides are 64-bit numbers, those of empty tensors too."""
    return len(shape) <= MOST_DIMENSIONS and math.prod(max(1, size) for size in shape) < 2**59


def parse_json(text: str | bytes) -> Any:
    """JSON in which no name comes twice and all numbers are finite.

    Raises:
        FormatError: If it is something else, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its description cannot be read: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value
