"""Attention of torch.nn, and what around it would read the weights of its layers past them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from core.support import NODES, graph
from torch import Tensor, nn
from torch_geometric.nn import GINConv, GPSConv, HeteroDictLinear
from torch_geometric.nn.aggr import SetTransformerAggregation

import qgnn_plugin as qgnn
from qgnn_plugin.quantizers import QLRQuantizer

EMBED, HEADS, BATCH, LENGTH, KEYS = 16, 4, 3, 7, 5
PADDING = torch.arange(LENGTH) >= torch.tensor([[7], [5], [6]])
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own keys": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
}
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "per head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding, no weights": {"key_padding_mask": PADDING, "need_weights": False},
    "mask": {"attn_mask": torch.randn(LENGTH, LENGTH)},
    "mask per head": {"attn_mask": torch.randn(BATCH * HEADS, LENGTH, LENGTH), "key_padding_mask": PADDING.float()},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal, weights": {"attn_mask": CAUSAL, "is_causal": True},
}


class Calls(nn.Module):
    """A model of one attention layer."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.layer(query, key, value, **self.options)


def check(layer: nn.MultiheadAttention, args: tuple[Tensor, ...], bits: int, **options: Any) -> None:
    model = Calls(layer, options).eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits), [args], steps=5).eval()
    assert all(q.is_set for q in qgnn.quantizers(qmodel).values())
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        expected, actual, after = model(*args), qmodel(*args), packed(*args)
    for one, other, third in zip(actual, expected, after, strict=True):
        assert (one is None) == (other is None) == (third is None)
        if one is None:
            continue
        assert one.shape == other.shape
        if bits == 32:
            assert torch.equal(one, other)
            torch.testing.assert_close(third, one)
        else:
            assert float((one - other).norm() / other.norm()) < 0.05
            assert torch.equal(third, one)
    out = qmodel.train()(*args)
    (out[0].sum() + (0 if out[1] is None else out[1].square().sum())).backward()
    assert all(p.grad is not None for p in qmodel.parameters())
    restored: Any = qgnn.restore_model(qmodel).eval()
    assert type(restored.layer) is nn.MultiheadAttention
    with torch.no_grad():
        assert torch.equal(restored(*args)[0], expected[0])


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_self_attention(kind: str, batch_first: bool, bits: int) -> None:
    x = torch.randn(BATCH, LENGTH, EMBED)
    x = x if batch_first else x.transpose(0, 1)
    for options in CALLS.values():
        layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, **LAYERS[kind])
        check(layer, (x, x, x), bits, **options)


@pytest.mark.parametrize("bits", [8, 32])
def test_other_keys_widths_and_single_sequences(bits: int) -> None:
    x, y = torch.randn(BATCH, LENGTH, EMBED), torch.randn(BATCH, KEYS, EMBED)
    for args in ((x, y, y), (x, y, y.clone()), (x, x, x.clone()), (x[0], x[0], x[0]), (x[0], y[0], y[0])):
        check(nn.MultiheadAttention(EMBED, HEADS, batch_first=True), args, bits)
    other = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, kdim=8, vdim=6)
    check(other, (x, y[..., :8], y[..., :6]), bits)
    check(other, (x[0], y[0, :, :8], y[0, :, :6]), bits)


def test_every_site_is_used_and_the_summary_names_them() -> None:
    qmodel: Any = qgnn.quantize_model(nn.MultiheadAttention(EMBED, HEADS), 4)
    x = torch.randn(LENGTH, EMBED)
    qgnn.calibrate(qmodel, (x, x, x))
    assert set(qgnn.quantizers(qmodel)) == {
        "input_quantizer", "in_proj_weight_quantizer", "out_proj.input_quantizer", "out_proj.weight_quantizer",
    }  # fmt: skip
    row = qgnn.summary(qmodel).layers[0]  # type: ignore[union-attr]
    assert row.bits == {"input": 4, "in_proj_weight": 4}
    assert row.packed_bytes < row.float_bytes / 3  # type: ignore[union-attr]
    assert qgnn.summary(qmodel).coverage.share == 1  # type: ignore[union-attr]
    copied, file = copy.deepcopy(qmodel), io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(other.eval()(x, x, x)[0], qmodel.eval()(x, x, x)[0])


def test_a_state_from_before_attention_was_converted() -> None:
    x = torch.randn(LENGTH, EMBED)
    qmodel = qgnn.quantize_model(nn.MultiheadAttention(EMBED, HEADS), 4)
    state = {
        key: value for key, value in qmodel.state_dict().items() if not key.startswith(("input_", "in_proj_weight_"))
    }
    qmodel.load_state_dict(state)
    with pytest.raises(RuntimeError, match="in_proj_weight' is unset"):
        qmodel.eval()(x, x, x)


def test_a_float_attention_keeps_its_output_projection() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return nn.MultiheadAttention.forward(self, *args, **kwargs)

    x = torch.randn(LENGTH, EMBED)
    model = nn.ModuleDict({"attn": Own(EMBED, HEADS), "head": nn.Linear(EMBED, EMBED)})
    with pytest.warns(UserWarning, match=r"attn \(Own, 768\), attn\.out_proj .* stay float"):
        qmodel = qgnn.quantize_model(model)
    by_type = qgnn.quantize_model(
        nn.ModuleList([nn.MultiheadAttention(EMBED, HEADS), nn.Linear(4, 4)]), include=nn.Linear
    )
    for converted in (qmodel, by_type):
        assert not any("out_proj" in name for name in qgnn.quantizers(converted))
    text = str(qgnn.summary(qmodel))
    assert "attn (Own, 768 weights): its forward is its own" in text
    assert "attn.out_proj (NonDynamicallyQuantizableLinear, 256 weights): read by the attention around it" in text
    run = lambda model, x: model["head"](model["attn"](x, x, x)[0])  # noqa: E731
    qgnn.calibrate(qmodel, [x], forward=run)
    packed = qgnn.pack_model(qmodel.eval())
    torch.testing.assert_close(run(packed, x), run(qmodel, x))


# What is around attention #############################################################################################


def encoders() -> dict[str, nn.Module]:
    options: dict[str, Any] = {"batch_first": True, "dropout": 0.0}
    return {
        "layer": nn.TransformerEncoderLayer(EMBED, HEADS, 32, **options),
        "norm first": nn.TransformerEncoderLayer(EMBED, HEADS, 32, norm_first=True, activation="gelu", **options),
        "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 32, **options), 2),
        "decoder": nn.TransformerDecoderLayer(EMBED, HEADS, 32, **options),
    }


@pytest.mark.parametrize("include", [None, nn.Linear])
@pytest.mark.parametrize("name", encoders())
def test_fast_paths_are_not_taken(name: str, include: Any) -> None:
    """Eval without gradients computes what it does with gradients, which always runs the layers inside."""
    model, x = encoders()[name].eval(), torch.randn(BATCH, LENGTH, EMBED)
    args = (x, x) if name == "decoder" else (x,)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 4, include=include), [args]).eval()
    assert all(q.is_set for q in qgnn.quantizers(qmodel).values())
    for other in (qmodel, copy.deepcopy(qmodel)):
        calls: list[str] = []
        for site in qgnn.quantizers(other).values():
            site.forward = _noting(site, calls)  # type: ignore[method-assign]
        expected = other(*args)
        with torch.no_grad():
            calls.clear()
            actual = other(*args)
        assert len(calls) >= len(qgnn.quantizers(other))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for site in qgnn.quantizers(qmodel).values():
        del site.forward
    if name == "encoder":  # a padding mask makes nested tensors for the fast path
        with torch.no_grad():
            padded = qmodel(x, src_key_padding_mask=PADDING)
        expected = qmodel(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(padded[~PADDING], expected[~PADDING], rtol=1e-5, atol=1e-5)
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        torch.testing.assert_close(packed(*args), qmodel(*args), rtol=1e-5, atol=1e-5)
    restored = qgnn.restore_model(qmodel)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(restored(*args), model(*args))
        off = qgnn.quantize_model(model, 32, include=include)
        assert torch.equal(off(*args), model(*args))


@pytest.mark.parametrize(
    ("options", "padding", "dropped"),
    [
        ({}, PADDING, True),
        ({"norm": nn.LayerNorm(EMBED)}, PADDING, True),
        ({"norm": nn.LayerNorm(EMBED)}, torch.where(PADDING, -torch.inf, 0.0), True),
        ({"enable_nested_tensor": False}, PADDING, False),
        ({}, PADDING.flip(1), False),
        ({"mask_check": False}, PADDING, True),
    ],
)
def test_padding_is_dropped_where_the_float_encoder_drops_it(
    options: dict[str, Any], padding: Tensor, dropped: bool
) -> None:
    """Without gradients torch makes nested tensors of padded sequences: means over all places tell them apart."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, **options).eval(), torch.randn(BATCH, LENGTH, EMBED)
    if model.norm is not None:
        nn.init.normal_(model.norm.bias)  # type: ignore[arg-type]
    run = lambda m, x: m(x, src_key_padding_mask=padding)  # noqa: E731
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [x], forward=run).eval()
    packed, blank = qgnn.pack_model(qmodel), padding != 0
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, actual = run(model, x).detach(), run(qmodel, x).detach()
            assert float((actual - expected).norm() / expected.norm()) < 0.05
            assert torch.equal(expected[blank], actual[blank]) == (dropped and not grad)
            torch.testing.assert_close(run(packed, x), actual, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(qmodel.train(), x)[blank], actual[blank]) is not dropped


def _noting(site: QLRQuantizer, calls: list[str]) -> Any:
    forward = site.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(site.site)
        return forward(*args, **kwargs)

    return noting


def test_many_types_are_not_multiplied_past_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = HeteroDictLinear({"a": 4, "b": 4}, 3)
    x = {"a": torch.randn(5, 4), "b": torch.randn(6, 4)}
    qlayer: Any = qgnn.calibrate(qgnn.quantize_model(layer, 8), [(x,)]).eval()
    monkeypatch.setattr("torch_geometric.typing.WITH_GMM", True)
    monkeypatch.setattr("torch_geometric.backend.use_segment_matmul", True)
    assert torch.equal(qlayer(x)["b"], qlayer.lins["b"](x["b"]))
    packed: Any = qgnn.pack_model(qlayer)
    assert torch.equal(packed(x)["a"], qlayer(x)["a"])
    assert type(qgnn.restore_model(qlayer)) is HeteroDictLinear


@pytest.mark.parametrize("kind", ["GPSConv", "SetTransformer"])
def test_attention_inside_layers_of_pyg(kind: str) -> None:
    x, edge_index = torch.randn(NODES, EMBED), graph()
    if kind == "GPSConv":
        model: nn.Module = GPSConv(EMBED, GINConv(nn.Linear(EMBED, EMBED)), heads=HEADS)
        args: tuple[Any, ...] = (x, edge_index)
    else:
        model, args = SetTransformerAggregation(EMBED, heads=HEADS), (x, torch.arange(NODES) // 10)
    model.eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [args]).eval()
    assert all(q.is_set for name, q in qgnn.quantizers(qmodel).items() if "gap" not in name)
    with torch.no_grad():
        expected, actual = model(*args), qmodel(*args)
        assert float((actual - expected).norm() / expected.norm()) < 0.1
        torch.testing.assert_close(qgnn.pack_model(qmodel)(*args), actual, rtol=1e-5, atol=1e-5)


class Projected(nn.MultiheadAttention):
    """An attention with a forward of its own, and a map beside those of torch's that it calls."""

    def __init__(self, width: int) -> None:
        super().__init__(EMBED, HEADS)
        self.map = nn.Linear(width, EMBED)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        x = self.map(x)
        return nn.MultiheadAttention.forward(self, x, x, x)[0]


@torch.no_grad()
def test_what_a_float_attention_calls_is_converted() -> None:
    x, run = torch.randn(LENGTH, 6), lambda model, x: model(x)
    model = nn.Sequential(Projected(6), nn.Linear(EMBED, EMBED)).eval()
    with pytest.warns(UserWarning, match="stay float"):
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [x], forward=run).eval()
    assert [row.name for row in qgnn.summary(qmodel).layers] == ["0.map", "1"]
    text = str(qgnn.summary(qmodel))
    assert "0.out_proj (NonDynamicallyQuantizableLinear, 256 weights): read by the attention" in text
    packed = qgnn.pack_model(qmodel)
    assert [row.reason for row in qgnn.summary(packed).layers] == [None, None]
    assert torch.equal(packed(x), qmodel(x))
    assert not torch.equal(qmodel[0](x), model[0](x))
    torch.testing.assert_close(qmodel(x), model(x), rtol=0, atol=0.05 * model(x).abs().max().item())


def test_a_refusal_names_no_map_that_is_never_called() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return nn.MultiheadAttention.forward(self, *args, **kwargs)

    with pytest.raises(ValueError, match="Nothing to convert") as refused:
        qgnn.quantize_model(Own(EMBED, HEADS))
    assert str(refused.value).endswith(
        "It has no Linear, MultiheadAttention or MessagePassing layer, only Own (a MultiheadAttention that computes "
        "something else); register your own layer type with qgnn_plugin.register_layer"
    )
