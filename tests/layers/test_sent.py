"""What generic layers send: shapes and use decide what is quantized; positions stay; results of any kind."""

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from core.support import NODES, OUT, WIDTH, features, graph, quantized, relative
from torch import Tensor, nn
from torch_geometric.nn import EdgeConv, MessagePassing, PointGNNConv, PointNetConv, PointTransformerConv, PPFConv

import qgnn_plugin as qgnn


class Sends(MessagePassing):
    """Features beside one number per node."""

    def __init__(self) -> None:
        super().__init__(aggr="max")
        self.lin = nn.Linear(WIDTH, OUT)


class SendsX(Sends):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=self.lin(x), weight=x.new_ones(x.size(0), 1))

    def message(self, x_j: Tensor, weight_j: Tensor) -> Tensor:
        return x_j * weight_j


class SendsScore(Sends):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, score=self.lin(x), weight=x.new_ones(x.size(0), 1))

    def message(self, score_j: Tensor, weight_j: Tensor) -> Tensor:
        return score_j * weight_j


class SendsNorm(Sends):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, norm=self.lin(x), weight=x.new_ones(x.size(0), 1))

    def message(self, norm_j: Tensor, weight_j: Tensor) -> Tensor:
        return norm_j * weight_j


@pytest.mark.parametrize("cls", [SendsX, SendsScore, SendsNorm])
def test_features_are_quantized_whatever_their_name(cls: type[Sends], tmp_path: Path) -> None:
    x, edge_index = features(), graph()
    conv, name = cls(), cls.__name__.removeprefix("Sends").lower()
    for bits in (2, 4):
        qconv = quantized(conv, x, edge_index, config=qgnn.QuantConfig(bits=bits, granularity="tensor"))
        assert qconv(x, edge_index).unique().numel() <= 2**bits + 1
        assert f"message.{name}" in {q.site for _, q in qconv.own_quantizers()}
        assert qconv.float_arguments == {"weight": "one number per node"}
    qgnn.quantize_model(conv, 4).train()(x, edge_index).sum().backward()
    packed = qgnn.pack_model(qconv)
    qgnn.save_packed(packed, path := tmp_path / "model.safetensors")
    assert torch.equal(qgnn.load_packed(path, conv)(x, edge_index), packed(x, edge_index))


class Heads(MessagePassing):
    """Attention logits per head beside the features, and types that are no floats."""

    heads = 3

    def __init__(self) -> None:
        super().__init__(aggr="add", node_dim=0)
        self.lin, self.att = nn.Linear(WIDTH, 3 * OUT), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        kind = torch.arange(x.size(0)) % 3
        return self.propagate(edge_index, z=self.lin(x).view(-1, 3, OUT), logit=self.att(x), kind=kind)

    def message(self, z_j: Tensor, logit_j: Tensor, kind_j: Tensor) -> Tensor:
        return (z_j * logit_j.sigmoid().unsqueeze(-1) * kind_j.view(-1, 1, 1)).flatten(1)


def test_scalars_of_heads_and_integers_stay() -> None:
    x, edge_index = features(), graph()
    conv = Heads()
    qconv = quantized(conv, x, edge_index)
    assert relative(qconv(x, edge_index), conv(x, edge_index)) < 0.03
    assert qconv.float_arguments == {"logit": "one number per head", "kind": "of the type int64"}
    assert {name for name, q in qgnn.quantizers(qconv).items() if "argument" in name and q.is_set} == {
        "argument_quantizers.z"
    }


class Results(MessagePassing):
    """An aggregation, or an update, that returns more than nodes."""

    def __init__(self, kind: str) -> None:
        super().__init__(aggr="sum")
        self.kind, self.lin = kind, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.propagate(edge_index, x=self.lin(x))

    def message(self, x_j: Tensor) -> Tensor:
        return x_j

    def aggregate(self, inputs: Tensor, index: Tensor, ptr: Optional[Tensor] = None,  # noqa: UP045
                  dim_size: Optional[int] = None) -> Any:  # noqa: UP045
        nodes = super().aggregate(inputs, index, ptr, dim_size)
        return (nodes, inputs) if self.kind == "aggregate" else nodes

    def update(self, inputs: Any) -> Any:
        return {"list": lambda: [inputs], "dict": lambda: {"out": inputs}}.get(self.kind, lambda: inputs)()


@pytest.mark.parametrize("kind", ["aggregate", "list", "dict"])
def test_results_of_any_kind(kind: str) -> None:
    x, edge_index = features(), graph()
    conv = Results(kind)

    def tensors(out: Any) -> list[Tensor]:
        return list(out.values() if isinstance(out, dict) else out)

    expected = tensors(conv(x, edge_index))
    assert all(map(torch.equal, tensors(qgnn.quantize_model(conv, 32).train()(x, edge_index)), expected))
    qconv = quantized(conv, x, edge_index)
    for other in (qconv, qgnn.pack_model(qconv)):
        assert all(relative(*pair) < 0.03 for pair in zip(tensors(other(x, edge_index)), expected, strict=True))
    qconv.train()
    tensors(qconv(x, edge_index))[0].sum().backward()
    assert qconv.constraint is None


# Positions ###########################################################################################


def mlp(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, out))


class Equivariant(MessagePassing):
    """Squared distances of coordinates, under a name that does not say so."""

    def __init__(self) -> None:
        super().__init__(aggr="sum")
        self.edge = mlp(2 * WIDTH + 1, OUT)

    def forward(self, x: Tensor, where: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x, where=where)

    def message(self, x_i: Tensor, x_j: Tensor, where_i: Tensor, where_j: Tensor) -> Tensor:
        assert where_i.shape == where_j.shape
        distance = (where_i - where_j.detach()).square().sum(-1, keepdim=True)
        return self.edge(torch.cat([x_i, x_j, distance], -1))


def pointwise(name: str) -> tuple[nn.Module, Any]:
    x, edge_index = features(), graph()
    normal = nn.functional.normalize(torch.randn(NODES, 3), dim=-1)
    return {
        "PointNetConv": (PointNetConv(mlp(WIDTH + 3, OUT)), lambda pos: (x, pos, edge_index)),
        "PointNetConv pair": (
            PointNetConv(mlp(WIDTH + 3, OUT)),
            lambda pos: ((x, x[:20]), (pos, pos[:20]), edge_index % 20),
        ),
        "PPFConv": (PPFConv(mlp(WIDTH + 4, OUT)), lambda pos: (x, pos, normal, edge_index)),
        "PointTransformerConv": (PointTransformerConv(WIDTH, OUT), lambda pos: (x, pos, edge_index)),
        "PointGNNConv": (
            PointGNNConv(mlp(WIDTH, 3), mlp(WIDTH + 3, 16), mlp(16, WIDTH)),
            lambda pos: (x, pos, edge_index),
        ),
        "own": (Equivariant(), lambda pos: (x, pos, edge_index)),
    }[name]


@pytest.mark.parametrize(
    "name", ["PointNetConv", "PointNetConv pair", "PPFConv", "PointTransformerConv", "PointGNNConv", "own"]
)
def test_a_shift_of_all_coordinates_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    conv, arguments = pointwise(name)
    position = torch.randn(NODES, 3)
    here, there = arguments(position), arguments(position + 1000)
    for bits in (4, 8):
        qconv = quantized(conv.eval(), *here, bits=bits)
        for model in (qconv, qgnn.pack_model(qconv)):
            # A difference of shifted coordinates rounds, and may then fall to the other side of half a step.
            assert relative(model(*there), model(*here)) < (0.002 if bits == 8 else 0.02)
    assert "only its differences matter" in qconv.float_arguments.values()
    assert "sends: only its differences matter" in str(qgnn.summary(qconv))
    assert "sends: only its differences matter" in str(qgnn.summary(qgnn.pack_model(qconv)))
    assert relative(quantized(conv, *here)(*here), conv(*here)) < 0.03


def test_both_ends_of_an_edge_take_the_same_values() -> None:
    """EdgeConv sends a pair of one tensor."""
    x, edge_index = features(), graph()
    config = qgnn.QuantConfig(bits=2, granularity="tensor")
    qconv, seen = quantized(EdgeConv(mlp(2 * WIDTH, OUT)), x, edge_index, config=config), []
    qconv.register_message_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    qconv(x, edge_index)
    assert seen[0]["x_i"].unique().numel() <= 4
    assert set(seen[0]["x_i"].unique().tolist()) == set(seen[0]["x_j"].unique().tolist())
