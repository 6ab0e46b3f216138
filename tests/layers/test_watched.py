"""Hooks of MessagePassing and masks of explanations act on converted and packed layers as they do on float ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import CONVS, OUT, WIDTH, adjacency, features, graph, quantized, relative
from torch import Tensor, nn
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.nn import (
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    MessagePassing,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
    TransformerConv,
)

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig

LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, make in CONVS.items() if "cached" not in name},
    "GraphConv": lambda: GraphConv(WIDTH, OUT),
    "TransformerConv": lambda: TransformerConv(WIDTH, OUT, heads=2),
}
# What is mapped before it is sent, by kernels, is not while somebody looks: one rounding less.
UNMAPPED = ("SAGEConv", "SGConv", "SSGConv")
STAGES = ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")


class Recorder:
    """What every hook of a layer was given."""

    def __init__(self, layer: Any) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.handles = []
        for stage in STAGES:
            for when in ("forward_pre_hook", "forward_hook"):
                register = getattr(layer, f"register_{stage}_{when}")
                self.handles.append(register(self.hook(f"{stage} {when}")))

    def hook(self, name: str) -> Callable[..., None]:
        return lambda layer, inputs, *out: self.calls.append((name, dict(inputs[-1])))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def shapes(self) -> list[Any]:
        def shape(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return tuple(map(shape, value))
            return tuple(value.shape) if isinstance(value, Tensor) else type(value)

        return [(name, {key: shape(v) for key, v in kwargs.items()}) for name, kwargs in self.calls]


def forms(name: str, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A float layer, and its converted and packed forms at 8 bits."""
    torch.manual_seed(0)
    conv: Any = LAYERS[name]().eval()
    qconv = quantized(conv, *args, **options)
    return conv, {"converted": qconv, "packed": qgnn.pack_model(qconv)}


@pytest.mark.parametrize("fmt", ["edge_index", "csr"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_hooks_see_what_pyg_shows_them(name: str, fmt: str) -> None:
    x, edge_index = features(), adjacency(graph(), fmt)
    conv, models = forms(name, x, edge_index)
    recorder = Recorder(conv)
    conv(x, edge_index)
    expected = recorder.shapes()
    index = next((kwargs["index"] for _, kwargs in recorder.calls if "index" in kwargs), None)
    assert expected or name.startswith("SMP")
    for form, model in models.items():
        before = model(x, edge_index)
        recorder = Recorder(model)
        out = model(x, edge_index)
        assert recorder.shapes() == expected, form
        found = next((kwargs["index"] for _, kwargs in recorder.calls if "index" in kwargs), None)
        assert (found is None) == (index is None)
        assert index is None or torch.equal(found, index), "another order of edges"
        # Without self-loops, the weight of a node that nothing reaches is zero, and not what zero is rounded to.
        loose = name.startswith((*UNMAPPED, "TAGConv", "LGConv"))
        assert relative(out, before) < (0.03 if loose else 1e-3), form
        recorder.remove()
        assert torch.equal(model(x, edge_index), before)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_what_hooks_change_changes_the_result(name: str) -> None:
    """Hooks that are there before conversion: ranges are those of what they leave."""
    x, edge_index = features(), graph()
    conv, _ = forms(name, x, edge_index)
    before = conv(x, edge_index)
    conv.register_message_forward_hook(lambda layer, inputs, out: 2 * out.relu() + 0.1)
    conv.register_propagate_forward_hook(lambda layer, inputs, out: out.clamp(-3, 3))
    expected = conv(x, edge_index)
    assert relative(expected, before) > 0.1
    qconv = quantized(conv, x, edge_index)
    assert relative(qconv(x, edge_index), expected) < 0.05
    assert relative(qgnn.pack_model(qconv)(x, edge_index), qconv(x, edge_index)) < 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_explanation_masks_act(name: str) -> None:
    x, edge_index = features(), graph(self_loops=False)
    conv, models = forms(name, x, edge_index)
    mask = torch.randn(edge_index.size(1))
    with torch.no_grad():
        outs = {}
        for form, model in {"float": conv, **models}.items():
            set_masks(model, mask, edge_index)
            outs[form] = model(x, edge_index)
            clear_masks(model)
        assert relative(outs["float"], conv(x, edge_index)) > 0.05
        assert relative(outs["converted"], outs["float"]) < 0.05
        assert relative(outs["packed"], outs["converted"]) < 1e-3
    # Gradients for the mask, as explainers want them.
    learned = nn.Parameter(mask.clone())
    set_masks(models["converted"], learned, edge_index)
    models["converted"](x, edge_index).square().sum().backward()
    assert learned.grad is not None and learned.grad.abs().sum() > 0  # noqa: PT018
    set_masks(models["packed"], learned, edge_index)
    if not isinstance(models["packed"], qgnn.layers.QuantizedLayer):
        with pytest.raises(RuntimeError, match="Expected no gradient through the packed"):
            models["packed"](x, edge_index)


class Net(nn.Module):
    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(WIDTH, 16), make(16, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


def test_explainer_of_a_converted_model() -> None:
    torch.manual_seed(0)
    x, edge_index = features(), graph(self_loops=False)
    qmodel = quantized(Net(GCNConv), x, edge_index)
    explainer = Explainer(
        qmodel, GNNExplainer(epochs=3), explanation_type="model", node_mask_type="attributes", edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"},
    )  # fmt: skip
    explanation = explainer(x, edge_index, index=5)
    assert explanation.edge_mask.shape == (edge_index.size(1),)
    assert not any(m.explain for m in qmodel.modules() if isinstance(m, MessagePassing))


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GINConv", "GATConv", "GATv2Conv", "APPNP", "SGConv"])
def test_the_correction_acts_while_somebody_looks(name: str) -> None:
    x, edge_index = features(), graph()
    torch.manual_seed(0)
    qconv = qgnn.quantize_model(LAYERS[name](), config=QuantConfig(bits=8, smp=SMPConfig(multiplier=0.5)))
    qgnn.calibrate(qconv, (x, edge_index)).eval()
    with torch.no_grad():
        for model in (qconv, qgnn.pack_model(qconv)):
            before = model(x, edge_index)
            model.register_propagate_forward_hook(lambda *_: None)
            assert relative(model(x, edge_index), before) < (0.03 if name.startswith(UNMAPPED) else 1e-3)


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "SGConv", "GATConv", "APPNP"])
def test_calibration_and_training_while_somebody_looks(name: str) -> None:
    """Every site that layers use once nobody looks has its range by then; at 32 bits hooks change nothing."""
    x, edge_index = features(), graph()
    torch.manual_seed(0)
    conv: Any = LAYERS[name]().eval()
    conv.register_message_forward_hook(lambda *_: None)
    assert torch.equal(qgnn.quantize_model(conv, 32)(x, edge_index), conv(x, edge_index))
    calibrated = qgnn.calibrate(qgnn.quantize_model(conv, 8), (x, edge_index)).eval()
    trained = qgnn.quantize_model(conv, 8).train()
    trained(x, edge_index).sum().backward()
    for qconv in (calibrated, trained.eval()):
        qconv._message_forward_hooks.clear()
        assert relative(qconv(x, edge_index), conv(x, edge_index)) < 0.05


INNER: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "GCNConv": (lambda: GCNConv(WIDTH, OUT), ("lin",)),
    "SAGEConv, narrow": (lambda: SAGEConv(WIDTH, OUT), ("lin_l", "lin_r")),
    "SAGEConv, wide": (lambda: SAGEConv(WIDTH, 2 * WIDTH), ("lin_l", "lin_r")),
    "SAGEConv, max": (lambda: SAGEConv(WIDTH, OUT, aggr="max"), ("lin_l", "lin_r")),
    "GATConv": (lambda: GATConv(WIDTH, OUT, heads=2), ("lin",)),
    "GATv2Conv": (lambda: GATv2Conv(WIDTH, OUT, heads=2), ("lin_l", "lin_r")),
    "GINConv": (lambda: GINConv(nn.Linear(WIDTH, OUT)), ("nn",)),
    "SGConv": (lambda: SGConv(WIDTH, OUT, K=2), ("lin",)),
    "SSGConv": (lambda: SSGConv(WIDTH, OUT, alpha=0.1, K=2), ("lin",)),
    "TAGConv": (lambda: TAGConv(WIDTH, OUT, K=2), ("lins.0", "lins.1")),  # PyG calls the forward of the latter itself
}


@pytest.mark.parametrize(
    ("name", "when"), [*((name, "before") for name in INNER), ("SAGEConv, narrow", "after"), ("SGConv", "after")]
)
def test_hooks_of_inner_maps_act(name: str, when: str) -> None:
    """Those of linear maps that convolutions compute in an order of their own; before conversion and after it."""
    x, edge_index = features(), graph()
    make, children = INNER[name]
    for child in children:
        torch.manual_seed(0)
        conv: Any = make().eval()
        plain = conv(x, edge_index).detach()

        def hooked(layer: Any, child: str = child) -> Any:
            lin = layer.get_submodule(child)
            lin.register_forward_pre_hook(lambda _, args: (2 * args[0],))
            lin.register_forward_hook(lambda _, args, result: 1.5 * result + 0.2)
            lin.register_full_backward_hook(lambda _, into, given: (None if into[0] is None else 3 * into[0],))
            return layer

        qconv = quantized(hooked(conv) if when == "before" else conv, x, edge_index)
        packed = qgnn.pack_model(qconv)
        if when == "after":
            hooked(conv), hooked(qconv), hooked(packed)
        entries = [x.clone().requires_grad_() for _ in range(2)]
        expected, found = conv(entries[0], edge_index), qconv(entries[1], edge_index)
        assert (relative(expected, plain) > 0.1) == (child != "lins.1"), child
        if when == "before":  # otherwise values leave the ranges
            assert relative(found, expected) < 0.05, child
            assert relative(packed(x, edge_index), found) < 1e-3, child
            for out in (expected, found):
                out.sum().backward()
            # Values that are clamped, and maxima that tie, have other gradients; without the hook it is 0.67.
            assert relative(entries[1].grad, entries[0].grad) < 0.4, child  # type: ignore[arg-type]
        else:
            assert relative(found, expected) < relative(plain, expected) or child == "lins.1", child
            assert relative(packed(x, edge_index), found) < 1e-3, child
