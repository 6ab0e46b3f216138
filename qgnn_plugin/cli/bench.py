"""``qgnn bench``: your model on your graph, float against packed."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..analysis.comparison import compare
from ..conversion.convert import restore_model
from ..packing import pack_model
from .building import origin_of
from .commands import convert, load
from .loading import Loaded, Readers, load_data, outputs_of, read_model
from .progress import working

__all__ = ["bench"]

MOST_DIFFERENT = 1e-3  # of a packed model from the converted one, of its largest output


def bench(options: Any) -> bool | None:
    """Compare the model in a file, or one with random weights, with its packed form; ``False`` where they disagree."""
    data = load_data(options)
    if options.checkpoint is None:
        if options.model is None:
            options.model = "GCN"
        origin = origin_of(options, data.x.size(1), outputs_of(data))
        loaded = Loaded(origin.build().eval(), "float", origin)
    else:
        loaded = load(options, data)
    if loaded.kind == "packed":
        reference = loaded.origin.build() if options.reference is None else _reference(options, data)
        known = options.reference is not None
        print(compare(reference, loaded.model, data, same_weights=known, seconds=options.seconds))
        return None
    if loaded.kind == "converted":
        return _measure(restore_model(loaded.model), loaded.model, data, options)
    agree = True
    for bits in options.bits:
        print(f"{bits} bits")
        with working([f"convert to {bits} bits"]) as begin:
            begin()
            qmodel = convert(loaded.model, data, bits, options.quant)
        agree &= _measure(loaded.model, qmodel, data, options)
    return agree


def _measure(float_model: nn.Module, qmodel: nn.Module, data: Any, options: Any) -> bool:
    with working(["pack and compare"]) as begin:
        begin()
        found = compare(float_model, pack_model(qmodel), data, qmodel=qmodel, seconds=options.seconds)
    print(f"{found}\n")
    return found.exact is None or found.exact <= MOST_DIFFERENT


def _reference(options: Any, data: Any) -> nn.Module:
    readers = Readers(options, data.x.size(1), outputs_of(data))
    return read_model(options.reference, readers).expect(
        "float", path=options.reference, remedy="pass the float checkpoint as --reference"
    ).model
