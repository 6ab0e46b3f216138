"""Descriptions that were edited, under checksums that are right: refused by file and field, or the same model."""

from __future__ import annotations

import base64
import copy
import json
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packing.cases import ATTENTION, CLASSES, FEATURES, HIDDEN, MODELS, Mixed, packed_pair
from torch import nn
from torch_geometric.nn import GCN

import qgnn_plugin
from qgnn_plugin import PackedEmbeddings, QuantConfig, SMPConfig
from qgnn_plugin.packing.files import container

BUILD = {**MODELS, **ATTENTION, "mixed": Mixed}
SMOOTH = SMPConfig(multiplier=0.3)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gcn": ("gcn", {"bits": 2, "output_bits": 8}),
    "sage": ("sage", {"bits": 4, "granularity": "channel"}),
    "gat": ("gat", {"bits": 4, "granularity": "node", "smp": None}),
    "gatv2": ("gatv2", {"bits": 8, "attention_bits": 4}),
    "appnp": ("appnp", {"bits": 8, "truncation": None, "message_levels": "half"}),
    "mixed": ("mixed", {"bits": 4, "message_bits": 32}),
}
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 32, 31, 2**31, 2 * 10**9, 10**12, 10**30, -(10**400), 0.5, -1.5, 1e308, "",
    "x", "channel", "node", "symmetric", "explicit", "proximal", [], {}, [[]], {"bits": 4}, "\ud800", "a" * 5000,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def edited(description: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy with one edit, and what that was."""
    value = copy.deepcopy(description)
    *path, key = rng.choice(list(places(value)))
    owner = value
    for step in path:
        owner = owner[step]
    kind = rng.choice(["replace", "replace", "replace", "change", "delete", "add", "deep"])
    old = owner[key]
    if kind == "replace" or (kind == "change" and not isinstance(old, (int, float, str))):
        owner[key] = rng.choice(VALUES)
    elif kind == "change":
        owner[key] = old + "x" if isinstance(old, str) else (not old if isinstance(old, bool) else old + 1)
    elif kind == "delete":
        del owner[key]
    elif kind == "deep":
        owner[key] = deep(300)
    elif isinstance(owner, dict):
        owner[f"{key}_"] = old
    else:
        owner.append(old)
    return value, f"{kind} at {'.'.join(map(str, (*path, key)))}: {old!r:.60} -> {json.dumps(owner)!s:.60}"


def rewrite(path: Path, change: Callable[[Any], Any], source: Path | None = None) -> None:
    """Write ``source`` again with another header text, under right checksums."""
    data = (source or path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["qgnn_plugin"][container.DIGEST_CHARS :])
    if inner["version"] == container.COMPRESSED:
        inner |= {"version": container.PLAIN, "description": container._description(path, inner)}
    text = change(inner)
    text = text if isinstance(text, str) else json.dumps(text)
    header["__metadata__"]["qgnn_plugin"] = container._digest(text.encode("utf-8", "surrogatepass")) + text
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attacked(
    path: Path, source: Path, count: int, load: Callable[[], Any], same: Callable[[Any], bool], seed: int = 0
) -> None:
    rng, edits = random.Random(seed), 0
    before, start = peak(), time.perf_counter()
    while edits < count:
        said = ""

        def change(inner: Any) -> Any:
            nonlocal said
            inner["description"], said = edited(inner["description"], rng)
            return inner

        rewrite(path, change, source)
        edits += 1
        refused: Exception | None = None
        try:
            loaded = load()
        except Exception as error:
            refused = error
        if refused is None:
            assert same(loaded), said
        else:
            assert type(refused) is ValueError, (said, refused)
            assert str(path) in str(refused), (said, refused)
    assert peak() - before < 300 * 2**20
    assert time.perf_counter() - start < 0.5 * count


@pytest.mark.parametrize("name", CASES)
def test_edited_descriptions_of_models(name: str, tmp_path: Path) -> None:
    build, config = CASES[name]
    _, packed, args = packed_pair(build, **config)
    source, path = tmp_path / "source", tmp_path / "edited"
    qgnn_plugin.save_packed(packed, source)
    model, expected = BUILD[build](), packed(*args)
    attacked(
        path, source, 80, lambda: qgnn_plugin.load_packed(path, model), lambda m: torch.equal(m(*args), expected)
    )


@pytest.mark.parametrize("kind", ["deep", "smooth"])
def test_edited_descriptions_that_hold_numbers(kind: str, tmp_path: Path) -> None:
    """A strength or a step size may be any number in its range: what comes out is another model, and soon."""
    x, edge_index = torch.randn(30, FEATURES), torch.randint(0, 30, (2, 90))
    smp = SMOOTH if kind == "smooth" else SMPConfig(initial_residual=0.1, identity_map=0.5)
    model: nn.Module = GCN(FEATURES, HIDDEN, 4, CLASSES)
    qmodel = qgnn_plugin.quantize_model(model, config=QuantConfig(bits=4, smp=smp)).eval()
    source, path = tmp_path / "source", tmp_path / "edited"
    qgnn_plugin.save_packed(qgnn_plugin.pack_model(qgnn_plugin.calibrate(qmodel, (x, edge_index))), source)
    attacked(
        path, source, 80, lambda: qgnn_plugin.load_packed(path, model), lambda m: m(x, edge_index).size(0) == 30
    )


@pytest.mark.parametrize("granularity", ["node", "tensor"])
def test_edited_descriptions_of_embeddings(granularity: str, tmp_path: Path) -> None:
    table = PackedEmbeddings.from_float(torch.randn(9, 33), 4, granularity=granularity)  # type: ignore[arg-type]
    source, path = tmp_path / "source", tmp_path / "edited"
    table.save(source)
    expected = table.dequantize()
    attacked(
        path, source, 100, lambda: PackedEmbeddings.load(path), lambda t: torch.equal(t.dequantize(), expected)
    )


TEXTS: dict[str, Callable[[Any], Any]] = {
    "nested beyond the stack": lambda inner: "[" * 100_000 + "]" * 100_000,
    "a number that is none": lambda inner: json.dumps(inner).replace('"bits": 2', '"bits": NaN'),
    "an infinite number": lambda inner: json.dumps(inner).replace('"bits": 2', '"bits": 1e999'),
    "a name twice": lambda inner: json.dumps(inner).replace('"kind"', '"kind": "model", "kind"'),
    "no mapping": lambda inner: [inner],
    "nothing": lambda inner: "",
    "no checksums": lambda inner: {**inner, "checksums": None},
    "other checksums": lambda inner: {**inner, "checksums": inner["checksums"][::-1]},
    "no description": lambda inner: {k: v for k, v in inner.items() if k != "description"},
    "another version": lambda inner: {**inner, "version": [1]},
}


@pytest.mark.parametrize("what", TEXTS)
def test_other_texts(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    qgnn_plugin.save_packed(packed_pair("gcn", bits=2)[1], path)
    rewrite(path, TEXTS[what])
    with pytest.raises(ValueError, match=r"model'"):
        qgnn_plugin.load_packed(path, MODELS["gcn"]())
    PackedEmbeddings.from_float(torch.randn(9, 33), 2).save(path)
    rewrite(path, TEXTS[what])
    with pytest.raises(ValueError, match=r"model'"):
        PackedEmbeddings.load(path)


def folded(text: bytes) -> str:
    return base64.b85encode(zlib.compress(text, 9)).decode()


COMPRESSED: dict[str, Callable[[Any], Any]] = {
    "no text": lambda text: {"model": "GCN"},
    "none": lambda text: None,
    "other letters": lambda text: "é" + text[1:],
    "cut": lambda text: text[:-20],
    "damaged": lambda text: text[:30] + text[31:] + text[30],
    "no JSON": lambda text: folded(b"{"),
    "no UTF-8": lambda text: folded(b'"\xff"'),
    "a name twice": lambda text: folded(b'{"model": 1, "model": 1}'),
    "a number that is none": lambda text: folded(b"[NaN]"),
    "nested beyond the stack": lambda text: folded(b"[" * 100_000 + b"]" * 100_000),
    "much of nothing": lambda text: folded(b" " * (container.LARGEST_DESCRIPTION + 1)),
    "something else": lambda text: folded(b"[1]"),
}


@pytest.mark.parametrize("what", COMPRESSED)
def test_other_compressed_descriptions(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    qgnn_plugin.save_packed(packed_pair("gcn", bits=2)[1], path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["qgnn_plugin"][container.DIGEST_CHARS :])
    assert inner["version"] == container.COMPRESSED
    text = json.dumps({**inner, "description": COMPRESSED[what](inner["description"])})
    header["__metadata__"]["qgnn_plugin"] = container._digest(text.encode()) + text
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])
    with pytest.raises(ValueError, match=r"field 'description' of '.*model'"):
        qgnn_plugin.load_packed(path, MODELS["gcn"]())


def other_shape(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    name = next(name for name in header if name.endswith("words"))
    return {**header, name: {**header[name], **changes}}


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a size beyond the file": lambda header: other_shape(header, shape=[10**12, 10**12]),
    "negative": lambda header: other_shape(header, shape=[-1, 2]),
    "no number": lambda header: other_shape(header, shape=["a"]),
    "too many dimensions": lambda header: other_shape(header, shape=[1] * 1000),
    "empty but huge": lambda header: other_shape(header, shape=[0, 2**40, 2**40], data_offsets=[0, 0]),
    "unknown type": lambda header: other_shape(header, dtype="F7"),
    "a list for a type": lambda header: other_shape(header, dtype=["F32"]),
    "beyond the end": lambda header: other_shape(header, data_offsets=[0, 10**15]),
    "overlap": lambda header: other_shape(header, data_offsets=[0, 8]),
    "an entry of none": lambda header: {**header, "x": None},
    "metadata of none": lambda header: {**header, "__metadata__": None},
    "metadata of numbers": lambda header: {**header, "__metadata__": {"qgnn_plugin": 1}},
    "a list": lambda header: [header],
}


@pytest.mark.parametrize("what", HEADERS)
def test_other_headers(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    qgnn_plugin.save_packed(packed_pair("gcn", bits=2)[1], path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(HEADERS[what](json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    with pytest.raises(ValueError, match=r"model'"):
        qgnn_plugin.load_packed(path, MODELS["gcn"]())


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9])
def test_headers_longer_than_the_file(length: int, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="truncated"):
        qgnn_plugin.load_packed(tmp_path / "model", MODELS["gcn"]())


@pytest.mark.parametrize(
    ("name", "value"), [("message_quantizer.scale", float("nan")), ("lin.weight_scale", float("inf"))]
)
def test_ranges_that_are_none(name: str, value: float, tmp_path: Path) -> None:
    packed = packed_pair("gcn", bits=2)[1]
    packed.convs[0].state_dict(keep_vars=True)[name].fill_(value)
    qgnn_plugin.save_packed(packed, tmp_path / "model")
    with pytest.raises(ValueError, match=rf"finite numbers in the field 'convs.0.{name}' of '.*model'"):
        qgnn_plugin.load_packed(tmp_path / "model", MODELS["gcn"]())
