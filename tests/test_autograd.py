"""What models do with gradients: second derivatives, states written in place, reversible blocks, checkpoints."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import CONVS, NODES, OUT, WIDTH, features, graph, quantized, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import (
    APPNP,
    GCNConv,
    GINConv,
    GraphConv,
    GroupAddRev,
    LGConv,
    MessagePassing,
    SAGEConv,
    SGConv,
    SimpleConv,
)

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.convs.attention import attention_numerators
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.spmm import segment_sum, spmm
from qgnn_plugin.quantizers.functional import quantize_codes

# Second derivatives ##################################################################################


def second(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Gradients of a function of the gradients of ``f``."""
    inputs = tuple(v.detach().clone().requires_grad_() for v in inputs)
    grads = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
    loss = sum((g * g.detach().cos()).square().sum() for g in grads)
    return [
        torch.zeros_like(v) if g is None else g
        for v, g in zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True)
    ]


@pytest.mark.parametrize("shape", [(), (WIDTH,), (NODES, 1)])
def test_codes_have_the_second_derivatives_of_their_surrogate(shape: tuple[int, ...]) -> None:
    x = features().double()
    scale, lower = torch.full(shape, 0.3, dtype=torch.float64), torch.full(shape, -1.0, dtype=torch.float64)

    def surrogate(x: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
        v = ((x - lower) / scale).clamp(0, 7)
        return v + ((v + 0.5).floor().clamp(0, 7) - v).detach()

    def energy(codes: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, scale, lower: (codes(x, scale, lower) * scale + lower).tanh().square().sum()

    actual = second(energy(lambda *args: quantize_codes(*args, 7)), x, scale, lower)
    for ours, theirs in zip(actual, second(energy(surrogate), x, scale, lower), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sums_are_differentiable_twice() -> None:
    edge_index = torch.randint(5, (2, 9))
    plan = GraphPlan.from_edges(edge_index[0], edge_index[1], 5, 5)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: spmm(plan, x, w), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x: spmm(plan, x.square()), (x,))
    assert torch.autograd.gradgradcheck(lambda w: segment_sum(plan, w.square()), (weight,))


def test_attention_has_the_second_derivatives_of_a_softmax() -> None:
    edge_index = graph()
    plan = GraphPlan.from_edges(edge_index[0], edge_index[1], NODES, NODES)
    logits = -torch.rand(plan.num_edges, 2, dtype=torch.float64)
    target = torch.randn(plan.num_edges, 2, dtype=torch.float64)

    def energy(ratio: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda logits: (ratio(logits) * target).tanh().sum()

    def codes(logits: Tensor) -> Tensor:
        numerator, total = attention_numerators(logits, plan, 4)
        return numerator / total[plan.dst]

    def reference(logits: Tensor) -> Tensor:
        softmax = logits.exp() / segment_sum(plan, logits.exp())[plan.dst]
        return softmax + (codes(logits) - softmax).detach()

    torch.testing.assert_close(second(energy(codes), logits), second(energy(reference), logits))


def force_loss(model: nn.Module, x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """A loss on the gradient of an energy, and the gradients of the weights."""
    x = x.clone().requires_grad_()
    (forces,) = torch.autograd.grad(model(x, *args).tanh().sum(), x, create_graph=True)
    weights = [p for name, p in model.named_parameters() if "quantizer" not in name]
    grads = torch.autograd.grad(forces.square().sum(), weights, allow_unused=True) if weights else []
    return forces, [g for g in grads if g is not None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in CONVS if "max" not in name])
def test_losses_on_forces(name: str, training: bool) -> None:
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    conv = CONVS[name]().eval()
    # One range that covers all there is: values that a row's own range cuts off have no gradient, by definition.
    qconv = quantized(conv, x, edge_index, config=qgnn.QuantConfig(bits=8, granularity="tensor"))
    if training:
        qconv.train()
        for module in qconv.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
    forces, grads = force_loss(qconv, x, edge_index)
    expected, reference = force_loss(conv, x, edge_index)
    assert relative(forces, expected) < 0.15
    for ours, theirs in zip(grads, reference, strict=True):
        assert relative(ours, theirs) < 0.4  # those outside of a range have none


def test_second_derivatives_of_packed_models_and_packed_activations_are_refused() -> None:
    x, edge_index = features().requires_grad_(), graph()
    qconv = quantized(GCNConv(WIDTH, OUT), x.detach(), edge_index)
    with pytest.raises(RuntimeError, match=r"through the packed '' .* of the quantized model"):
        qgnn.pack_model(qconv)(x, edge_index)
    with torch.no_grad():
        qgnn.pack_model(qconv)(x, edge_index)
    with qgnn.compressed_activations():
        energy = qconv.train()(x, edge_index).sum()
    (forces,) = torch.autograd.grad(energy, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"outside of qgnn_plugin.compressed_activations\(\)"):
        forces.square().sum().backward()


# In place ############################################################################################


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_a_result_may_be_written_to(name: str, training: bool) -> None:
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    qconv = quantized(CONVS[name](), x, edge_index, bits=4).train(training)
    for module in qconv.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    grads = []
    for write in (False, True):
        qconv.zero_grad()
        leaf = x.clone().requires_grad_()
        out = qconv(leaf, edge_index)
        if write:
            out += 1
            out[:3] = 0
            out.relu_()
        else:
            out = (out + 1).index_fill(0, torch.arange(3), 0).relu()
        out.square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in qconv.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *grads))


# Layers that keep nothing of what they add, so that a float model may go on in the same tensor.
SUMS: dict[str, Callable[[], nn.Module]] = {
    "SimpleConv": SimpleConv,
    "GraphConv without a map": lambda: SimpleConv(aggr="mean", combine_root="sum"),
    "GINConv": lambda: GINConv(nn.Identity()),
    "LGConv": LGConv,
    "LGConv not normalized": lambda: LGConv(normalize=False),
    "APPNP": lambda: APPNP(2, 0.1),
    "SGConv wider": lambda: SGConv(WIDTH, WIDTH + 4, K=2),
    "SAGEConv wider": lambda: SAGEConv(WIDTH, WIDTH + 4, root_weight=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SUMS)
def test_states_may_be_written_to(name: str, training: bool) -> None:
    torch.manual_seed(0)
    x, edge_index, conv = features(), graph(), SUMS[name]()

    def run(model: nn.Module, copies: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        state = leaf * 1
        out = model(state.clone() if copies else state, edge_index)
        state[:10] = out[10:20, :WIDTH]
        (state.sum() + out.square().sum()).backward()
        model_grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [leaf.grad, *model_grads]

    run(conv, copies=False)  # as the float model can
    qconv = quantized(conv, x, edge_index, bits=4).train(training)
    torch.testing.assert_close(run(qconv, copies=False), run(qconv, copies=True))


# Memory ##############################################################################################


class Block(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(x.relu(), edge_index)


REVERSIBLE: dict[str, Callable[[], nn.Module]] = {
    "GCNConv": lambda: GCNConv(8, 8),
    "SAGEConv": lambda: SAGEConv(8, 8),
    "GINConv": lambda: GINConv(nn.Linear(8, 8)),
    "GraphConv": lambda: GraphConv(8, 8),
    "APPNP": lambda: APPNP(2, 0.1),
}


@pytest.mark.parametrize("name", REVERSIBLE)
def test_reversible_blocks(name: str) -> None:
    """They free their input, and what they return once that is no longer needed."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, OUT)
            self.blocks = nn.ModuleList(GroupAddRev(Block(REVERSIBLE[name]()), num_groups=2) for _ in range(2))

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x, edge_index)
            return self.last(x)

    torch.manual_seed(0)
    x, edge_index, model = features(), graph(), Model()
    qmodel = quantized(model, x, edge_index)
    with torch.no_grad():
        assert relative(qmodel(x, edge_index), model(x, edge_index)) < 0.05
        assert torch.equal(qgnn.pack_model(qmodel)(x, edge_index), qmodel(x, edge_index))
    qmodel.train()(x, edge_index).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qmodel.first.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "GINConv", "SAGEConv", "APPNP", "TAGConv"])
def test_checkpoints(name: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    qconv = quantized(CONVS[name](), x, edge_index, bits=4).train()
    grads = []
    for run in (qconv, lambda *args: checkpoint(qconv, *args, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        run(leaf, edge_index).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_functional_calls() -> None:
    x, edge_index = features(), graph()
    qconv = quantized(GCNConv(WIDTH, OUT), x, edge_index, bits=4)
    doubled = {name: 2 * p.detach() if name == "bias" else p.detach() for name, p in qconv.named_parameters()}
    out = torch.func.functional_call(qconv, doubled, (x, edge_index))
    torch.testing.assert_close(out, qconv(x, edge_index) + qconv.bias)


@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "GATv2Conv", "SAGEConv", "GINConv", "APPNP", "SGConv"])
def test_gradients_by_functional_transforms(name: str) -> None:
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    qconv = quantized(CONVS[name](), x, edge_index, bits=4)
    weights = {n: p.detach() for n, p in qconv.named_parameters() if "quantizer" not in n}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(qconv, weights, (x, edge_index)).square().sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(weights, x)
    leaf = x.clone().requires_grad_()
    qconv(leaf, edge_index).square().sum().backward()
    torch.testing.assert_close(grad_x, leaf.grad)
    for n, grad in grads.items():
        torch.testing.assert_close(grad, qconv.get_parameter(n).grad)


# Features that are no floats #########################################################################


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bits", [32, 8])
def test_integer_features_before_a_cast(dtype: torch.dtype, bits: int) -> None:
    x, edge_index = torch.randint(5, (NODES, WIDTH), dtype=dtype), graph()
    model = GINConv(nn.Sequential(Cast(), nn.Linear(WIDTH, OUT)))
    expected = model(x, edge_index)
    qmodel = quantized(model, x, edge_index, bits=bits)
    assert relative(qmodel(x, edge_index), expected) < 0.03
    with torch.no_grad():
        torch.testing.assert_close(qgnn.pack_model(qmodel)(x, edge_index), qmodel(x, edge_index))
    qmodel.train()(x, edge_index).sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_features_of_other_types_in_propagations(dtype: torch.dtype) -> None:
    x, edge_index = (2 * torch.rand(NODES, WIDTH)).to(dtype), graph()
    conv = LGConv(normalize=False)
    expected = conv(x, edge_index)
    for bits in (32, 8):
        qconv = qgnn.quantize_model(conv, config=QuantConfig(bits=bits)).train()
        assert relative(qconv(x, edge_index), expected) < 0.05
        if bits == 32:
            assert torch.equal(qconv.eval()(x, edge_index), expected)


class Potential(MessagePassing):
    """Forces of an interatomic potential: distances of positions through filters."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.embed, self.filter, self.energy = nn.Embedding(9, 16), nn.Linear(1, 16), nn.Linear(16, 1)

    def forward(self, z: Tensor, pos: Tensor, edge_index: Tensor) -> Tensor:
        distance = (pos[edge_index[0]] - pos[edge_index[1]]).norm(dim=-1, keepdim=True)
        return self.energy(self.propagate(edge_index, x=self.embed(z), w=self.filter(-distance)).tanh()).sum()

    def message(self, x_j: Tensor, w: Tensor) -> Tensor:
        return x_j * w


def test_a_potential_trains_on_its_forces() -> None:
    torch.manual_seed(0)
    z, pos, edge_index = torch.randint(9, (12,)), torch.randn(12, 3), torch.randint(12, (2, 30))
    edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    qmodel = qgnn.quantize_model(Potential(), bits=8).train()
    where = pos.clone().requires_grad_()
    forces = torch.autograd.grad(qmodel(z, where, edge_index), where, create_graph=True)[0]
    forces.square().mean().backward()
    assert qmodel.filter.weight.grad.abs().sum() > 0
