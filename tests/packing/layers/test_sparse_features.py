"""Sparse features: every layout that the float layer takes, checked once, in converted and packed layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core.support import CONVS, NODES, OUT, WIDTH, graph, quantized
from torch import Tensor, nn

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.kernels.cache import PlanCache


def _repeated(x: Tensor) -> Tensor:
    """A COO matrix with every entry in two halves."""
    coo = x.to_sparse()
    indices, values = torch.cat([coo.indices()] * 2, 1), torch.cat([coo.values() / 2] * 2)
    return torch.sparse_coo_tensor(indices, values, x.shape, check_invariants=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "csr": Tensor.to_sparse_csr,
    "coo": Tensor.to_sparse,
    "coo, not coalesced": _repeated,
    "csc": Tensor.to_sparse_csc,
}
LAYERS = {
    **{name: make for name, make in CONVS.items() if name.startswith(("GCN", "GAT", "SAGE", "GIN", "Graph", "APPNP"))},
    "Linear": lambda: nn.Linear(WIDTH, OUT),
}


def _values(kind: str) -> Tensor:
    if kind == "zeros":
        return torch.zeros(NODES, WIDTH)
    x = torch.rand(NODES, WIDTH) * (torch.rand(NODES, WIDTH) > 0.7)
    return x.sign() if kind == "ones" else x - 0.5 * (x > 0) if kind == "signed" else x


def _arguments(name: str, x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if name == "Linear" else (x, graph())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_that_are_made_in_inference_mode(layout: str) -> None:
    x = _values("signed")
    qmodel = qgnn.calibrate(qgnn.quantize_model(nn.Linear(WIDTH, OUT), bits=4), [(x,)], method="ranges").eval()
    for model in (qmodel, qgnn.pack_model(qmodel)):
        with torch.no_grad():
            expected = model(LAYOUTS[layout](x))
        with torch.inference_mode():
            made = LAYOUTS[layout](x.clone())
            for _ in range(2):
                assert torch.equal(model(made), expected)


@pytest.mark.parametrize("kind", ["positive", "signed", "ones", "zeros"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layout_gives_what_dense_features_give(name: str, kind: str) -> None:
    x, layer = _values(kind), LAYERS[name]()
    expected = None
    # Means of 0/1 features are halfway between two of 256 codes of a full range, where an ulp decides: halves of ones
    # are not seen to be 0/1.
    config = QuantConfig(bits=8, granularity="tensor" if kind == "ones" else "row")
    for convert in LAYOUTS.values():
        arguments = _arguments(name, convert(x))
        qmodel = quantized(layer, *arguments, config=config)
        with torch.no_grad():
            out = qmodel(*arguments)
            assert torch.equal(qgnn.pack_model(qmodel)(*arguments), out)
            expected = out if expected is None else expected
            torch.testing.assert_close(out, expected)
            dense = quantized(layer, *_arguments(name, x), config=config)(*_arguments(name, x))
            assert float((dense - out).norm()) <= 0.01 * float(dense.norm())  # their ranges may be others


def _csr(crow: list[int], col: list[int]) -> Tensor:
    values = torch.ones(len(col))
    return torch.sparse_csr_tensor(torch.tensor(crow), torch.tensor(col), values, (3, WIDTH), check_invariants=False)


WRONG = {
    "a column too far": _csr([0, 1, 2, 3], [0, WIDTH, 1]),
    "a column far out": _csr([0, 1, 2, 3], [0, 10**9, 1]),
    "a negative column": _csr([0, 1, 2, 3], [0, -1, 1]),
    "falling rows": _csr([0, 3, 1, 3], [0, 1, 2]),
    "rows past the end": _csr([0, 1, 2, 9], [0, 1, 2]),
    "a late start": _csr([1, 1, 2, 3], [0, 1, 2]),
    "a column twice": _csr([0, 2, 2, 3], [4, 4, 1]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("bits", [2, 32])
def test_patterns_that_contradict_themselves_are_refused(wrong: str, bits: int) -> None:
    right = _csr([0, 1, 2, 3], [0, 5, 1])
    model = quantized(nn.Sequential(nn.Linear(WIDTH, OUT), nn.Linear(OUT, OUT)), right, config=_config(bits))
    for converted in (model, qgnn.pack_model(model)):
        converted(right)
        with pytest.raises(ValueError, match=r"Expected (columns|row pointers|each column)"):
            converted(WRONG[wrong])


def _config(bits: int) -> qgnn.QuantConfig:
    return qgnn.QuantConfig(bits=4, input_bits=bits)


def test_a_layout_is_converted_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    get = PlanCache.get

    def counted(self: PlanCache, tensors: object, key: tuple[str, ...], build: Callable[[], object]) -> object:
        return get(self, tensors, key, lambda: built.append(key[0]) or build())

    x = _values("positive").to_sparse()
    model = qgnn.pack_model(quantized(nn.Linear(WIDTH, OUT), x))
    monkeypatch.setattr(PlanCache, "get", counted)
    for _ in range(3):
        model(x)
    assert not [key for key in built if key.startswith("features")]
