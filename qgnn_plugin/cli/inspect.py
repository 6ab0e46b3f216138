"""``qgnn inspect``: what is in a packed file, without the model that it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import OFF
from ..packing import PackedEmbeddings
from ..packing.files.container import kind_of, read, refuse
from ..packing.files.packed_model import KIND
from ..packing.files.schema import read_description
from ..packing.layers.base import LayerSpec
from ..tables import table

__all__ = ["inspect"]

HEADER = ("layer", "type", "runs", "bits", "bytes", "ranges")
RANGES = ("scale", "lower_end")  # ends of the names of tensors that hold ranges


def inspect(options: Any) -> None:
    """Print layers, bits, bytes, ranges and checks.

    Raises:
        ValueError: If the file is damaged or foreign.
    """
    path = options.file
    kind = kind_of(path)
    if kind != KIND:
        embeddings = PackedEmbeddings.load(path)
        print(f"{path}: packed embeddings, {len(embeddings):,} x {embeddings.num_features} in {embeddings.bits} bits")
        per = "row" if embeddings.scale.numel() > 1 else "table"
        print(f"one range per {per}; {_bytes({'words': embeddings.words}):,} bytes of codes")
        print("checks: every checksum matches, every range is finite, unused bits are zero")
        return
    tensors, value = read(path, kind)
    description = read_description(path, value)
    for name, tensor in tensors.items():
        if name.endswith(RANGES) and not bool(tensor.isfinite().all()):
            refuse(path, name, "finite numbers", tensor[~tensor.isfinite()].tolist())
    owned = _owners(tensors, [spec.name for spec in description.specs])
    print(f"{path}: packed {description.model}, {path.stat().st_size:,} bytes, {_bytes(tensors):,} of tensors")
    if description.origin is not None:
        arguments = ", ".join(f"{k}={v!r}" for k, v in description.origin.get("arguments", {}).items())
        print(f"built by {description.origin.get('class')}({arguments})")
    print(table(HEADER, [_cells(spec, owned[spec.name]) for spec in description.specs]))
    others = {name: tensor for name, tensor in tensors.items() if not any(name in own for own in owned.values())}
    if others:
        print(f"other tensors, as they are: {', '.join(others)} ({_bytes(others):,} bytes)")
    print(f"checks: {len(tensors)} of {len(tensors)} checksums match, that of the description too; ranges are finite")


def _owners(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of every layer, each with the innermost that it is in."""
    owned: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        inside = [name for name in names if name == "" or key.startswith(f"{name}.")]
        if inside:
            owned[max(inside, key=len)][key] = tensor
    return owned


def _cells(spec: LayerSpec, own: Mapping[str, Tensor]) -> tuple[str, ...]:
    bits = {site.removesuffix("_quantizer"): s.bits for site, s in spec.sites.items()}
    if spec.attention_bits != OFF:
        bits["attention"] = spec.attention_bits
    return (
        spec.name or "(model)",
        spec.type if spec.deep_place is None else f"{spec.type} ({spec.deep_place})",
        "packed" if spec.reason is None else f"float: {spec.reason}",
        " ".join(f"{site}:{width}" for site, width in bits.items()),
        f"{_bytes(own):,}",
        _ranges(spec, own) or "-",
    )


def _ranges(spec: LayerSpec, own: Mapping[str, Tensor]) -> str:
    """``site:[low, high]`` where a site has one range, its number of ranges where it has several."""
    found = []
    for site, described in spec.sites.items():
        prefix = f"{spec.name}.{site}" if spec.name else site
        scale, lower = own.get(f"{prefix}.scale"), own.get(f"{prefix}.lower_end")
        if scale is None or not described.has_range:
            continue
        if lower is None:  # zero is a fixed code
            lower = -scale * (described.zero_code or 0.0)
        name = site.removesuffix("_quantizer")
        if scale.numel() > 1:
            found.append(f"{name}: {scale.numel()} ranges")
            continue
        low = float(lower) + 0.0
        high = low + float(scale) * (2**described.bits - 1)
        per_row = {"node": " of each row's peak", "row": " times each row's multiplier"}.get(described.granularity, "")
        found.append(f"{name}:[{low:.3g},{high:.3g}]{per_row}")
    return " ".join(found)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
