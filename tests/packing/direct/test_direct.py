"""The short way of packed linear layers is the long way bit for bit, and nobody takes it who looks at the call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from cpu_support import threads
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import has_numba, use_backend
from qgnn_plugin.packing.layers.few_rows import direct_product
from qgnn_plugin.packing.lazy.sizes import FEW_RESULTS

pytestmark = pytest.mark.skipif(not has_numba(), reason="kernels of the CPU are compiled by numba")
WIDTH, CHANNELS = 19, 35


@pytest.fixture(autouse=True)
def cpu_backend() -> Iterator[None]:
    with use_backend("cpu"):
        yield


class Watching(TorchDispatchMode):
    """Looks at every operation, which is then run as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def long_way(layer: nn.Module, x: Tensor) -> Tensor:
    with Watching():
        assert direct_product(layer, x) is None
        return layer(x)


def packed_linear(num_in: int = WIDTH, num_out: int = CHANNELS, bias: bool = True, **config: Any) -> Any:
    layer = nn.Linear(num_in, num_out, bias)
    qmodel = qgnn.quantize_model(nn.Sequential(layer), config=qgnn.QuantConfig(**config))
    return qgnn.pack_model(qgnn.calibrate(qmodel, [(torch.randn(50, num_in),)]))[0]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 110),
    num_in=st.integers(1, 70),
    num_out=st.integers(1, 70),
    bits=st.sampled_from([1, 2, 4, 8]),
    granularity=st.sampled_from(["row", "tensor"]),
    weights=st.sampled_from(["channel", "tensor"]),
    levels=st.sampled_from(["half", "affine"]),
    bias=st.booleans(),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_few_rows(
    rows: int,
    num_in: int,
    num_out: int,
    bits: int,
    granularity: str,
    weights: str,
    levels: str,
    bias: bool,
    spread: float,
) -> None:
    config = {"granularity": granularity, "weight_granularity": weights, "weight_levels": levels}
    layer = packed_linear(num_in, num_out, bias, bits=bits, **config)
    assume(not layer._site.is_zero_one and not layer.input_quantizer.spec.is_zero_one)
    x = torch.randn(rows, num_in) * torch.rand(rows, 1) * spread
    x[torch.rand(rows) < 0.1] = 0
    x[torch.rand(rows, num_in) < 0.1] *= 1e20
    found = direct_product(layer, x)
    assert found is not None
    assert torch.equal(found, long_way(layer, x))
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("shape", [(WIDTH,), (4, WIDTH), (2, 3, WIDTH), (1, 1, 1, WIDTH)])
def test_shapes(shape: tuple[int, ...]) -> None:
    layer, x = packed_linear(), torch.randn(shape)
    found = direct_product(layer, x)
    assert found is not None
    assert torch.equal(found, long_way(layer, x))


def test_another_default_of_floats_changes_nothing() -> None:
    layer, x = packed_linear(), torch.randn(5, WIDTH)
    expected = layer(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(direct_product(layer, x), expected)  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)


class Looking(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


WATCHED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Watching,
    "function mode": Looking,
    "profiler": torch.profiler.profile,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another backend": lambda: use_backend("torch"),
}
GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "a gradient": lambda x: x.requires_grad_(),
    "doubles": Tensor.double,
    "halves": Tensor.half,
    "a subclass": lambda x: x.as_subclass(Subclass),
    "a parameter": nn.Parameter,
    "other strides": lambda x: x.t().contiguous().t(),
    "sparse rows": Tensor.to_sparse_csr,
    "NaN": lambda x: x.fill_(float("nan")),
    "one infinity": lambda x: x.index_fill_(0, torch.tensor([2]), float("inf")),
    "no row": lambda x: x[:0],
    "another width": lambda x: x[:, 1:].contiguous(),
    "a number": lambda x: x.sum(),
    "another device": lambda x: x.to("meta"),
    "no tensor": Tensor.numpy,
    "many rows": lambda x: x.repeat(FEW_RESULTS // (len(x) * CHANNELS) + 1, 1),
    "negated memory": torch._neg_view,
}


@pytest.mark.parametrize("name", [*WATCHED, *GIVEN])
def test_the_long_way(name: str) -> None:
    layer, x = packed_linear(), torch.randn(5, WIDTH)
    assert direct_product(layer, x) is not None
    around, value = WATCHED.get(name, nullcontext)(), GIVEN.get(name, lambda x: x)(x)
    with around:
        assert direct_product(layer, value) is None


def test_whoever_traces_or_maps() -> None:
    layer, x = packed_linear(), torch.randn(5, WIDTH)
    taken: list[bool] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            taken.append(direct_product(layer, x) is not None)
            return x + 1

    torch.jit.trace(Model(), x, check_trace=False)
    torch.export.export(Model(), (x,))
    torch.func.vmap(lambda x: x.add(taken.append(direct_product(layer, x) is not None) or 0))(x)
    assert taken == [False] * 3


def test_layers_that_do_more() -> None:
    layer, x = packed_linear(), torch.randn(5, WIDTH)
    seen: list[Any] = []
    handle = layer.input_quantizer.register_forward_hook(lambda *args: seen.append(args))
    layer(x)
    assert len(seen) == 1
    handle.remove()
    handle = layer.register_forward_hook(lambda layer, args, out: out + 1)
    above = layer(x)
    handle.remove()
    assert torch.equal(above, layer(x) + 1)
    wide = packed_linear(output_bits=4)
    assert direct_product(wide, x) is None
    assert direct_product(packed_linear(granularity="node"), x) is None
    assert direct_product(packed_linear(weight_bits=32), x) is None
    with pytest.raises(RuntimeError, match="eval mode"):
        layer.train()(x)


def test_what_is_refused_is_refused_alike() -> None:
    layer = packed_linear()
    for x in (torch.full((5, WIDTH), float("nan")), torch.randn(5, 3), torch.randn(5, WIDTH).double()):
        with pytest.raises((ValueError, TypeError)) as short:
            layer(x)
        with pytest.raises((ValueError, TypeError)) as long, Watching():
            layer(x)
        assert str(short.value) == str(long.value)


def writes(layer: Any, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    owner = layer.input_quantizer if name in ("scale", "unit", "lower_end") else layer
    held = getattr(owner, name)
    other = torch.randint_like(held, 1 << 30) if name == "words" else held * 0.5
    yield "in place", lambda: held.copy_(other)
    yield "by NumPy", lambda: held.detach().numpy().__setitem__(..., other.numpy() * 3)
    yield ".data", lambda: setattr(held, "data", (other * 2).clone())
    kind = nn.Parameter if isinstance(held, nn.Parameter) else Tensor.clone
    yield "another tensor", lambda: setattr(owner, name, kind(other * 5))
    state = {name: other * 7}
    yield "a state", lambda: owner.load_state_dict(state, strict=False)
    yield "a state's own tensors", lambda: owner.load_state_dict({name: other * 9}, strict=False, assign=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["words", "weight_scale", "bias", "scale", "unit", "lower_end"])
def test_numbers_are_read_anew(name: str) -> None:
    layer, x = packed_linear(), torch.randn(5, WIDTH)
    for how, write in writes(layer, name):
        before = layer(x)
        write()
        found = direct_product(layer, x)
        assert found is not None, how
        assert not torch.equal(found, before), how
        assert torch.equal(found, long_way(layer, x)), how


def test_copies_have_prepared_calls_of_their_own() -> None:
    layer, x = packed_linear(), torch.randn(5, WIDTH)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._packed.last.direct is None
        layer.bias.data.add_(1)
        assert torch.equal(other(x), expected)


def test_threads_share_what_is_worth_it() -> None:
    layer, x = packed_linear(256, 256), torch.randn(200, 256)
    with threads(1):
        alone = direct_product(layer, x)
    assert alone is not None
    with threads(2):
        assert direct_product(layer, x) is None
        assert torch.equal(layer(x), alone)


def test_inside_a_model_nothing_is_put_off() -> None:
    """A model whose layers go the short way gives what it gives on the long way."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model), [(torch.randn(50, 8),)]).eval()
    packed, x = qgnn.pack_model(qmodel), torch.randn(9, 8)
    found = packed(x)
    with Watching():
        assert torch.equal(found, packed(x))
    torch.testing.assert_close(found, qmodel(x))
