"""The smoothness constraint never raises, and never changes a result: what cannot be measured is not, and says so."""

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from core.support import NODES, OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import (
    EdgeConv,
    GATConv,
    GCNConv,
    GINConv,
    GraphConv,
    HypergraphConv,
    LGConv,
    MessagePassing,
    SAGEConv,
    SimpleConv,
    TAGConv,
)

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig


class Vectors(MessagePassing):
    """Edge features of several numbers, from a matrix as well."""

    def forward(self, x: Tensor, edge_index: Any, edge_attr: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        return self.propagate(edge_index, x=x, edge_attr=edge_attr)

    def message(self, x_j: Tensor, edge_attr: Optional[Tensor]) -> Tensor:  # noqa: UP045
        assert edge_attr is not None
        return x_j * edge_attr.sum(-1, keepdim=True)


class Real(MessagePassing):
    """A real result of complex features, and the other way round."""

    def __init__(self, back: bool) -> None:
        super().__init__(aggr="sum")
        self.back = back

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def update(self, inputs: Tensor) -> Tensor:
        return torch.complex(inputs, inputs) if self.back else inputs.real


def vector_matrix() -> Tensor:
    edge_index = graph()
    values = torch.rand(edge_index.size(1), 3)
    return torch.sparse_coo_tensor(edge_index.flip(0), values, (NODES, NODES, 3)).coalesce()


def hyperedges() -> Tensor:
    """As many as there are nodes."""
    return torch.stack([torch.randint(NODES, (90,)), torch.randint(NODES, (90,))])


# Name to a layer, its arguments, and whether there is something to measure.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], bool]] = {
    "features": (SimpleConv, lambda: (features(), graph()), True),
    "a matrix of vectors": (Vectors, lambda: (features(), vector_matrix()), False),
    "vectors of edges": (Vectors, lambda: (features(), graph(), torch.rand(graph().size(1), 3)), True),
    "a column of weights": (
        lambda: GraphConv(WIDTH, WIDTH), lambda: (features(), graph(), torch.rand(graph().size(1), 1)), True,
    ),
    "booleans": (SimpleConv, lambda: (features() > 0, graph()), False),
    "integers": (SimpleConv, lambda: (torch.randint(5, (NODES, WIDTH)), graph()), False),
    "complex": (SimpleConv, lambda: (torch.complex(features(), features()), graph()), False),
    "complex to real": (lambda: Real(False), lambda: (torch.complex(features(), features()), graph()), False),
    "real to complex": (lambda: Real(True), lambda: (features(), graph()), False),
    "a vector": (SimpleConv, lambda: (torch.rand(NODES, 1), graph()), True),
    "samples": (SimpleConv, lambda: (torch.rand(3, NODES, WIDTH), graph()), True),
    "double": (SimpleConv, lambda: (features().double(), graph()), True),
    "half": (SimpleConv, lambda: (features().bfloat16(), graph()), True),
    "hyperedges": (lambda: HypergraphConv(WIDTH, WIDTH), lambda: (features(), hyperedges()), False),
    "two sides": (SimpleConv, lambda: ((features(), features()), graph()), False),
    "no edges": (SimpleConv, lambda: (features(), graph()[:, :0]), True),
    "no nodes": (SimpleConv, lambda: (features(0), graph()[:, :0]), True),
    "one feature set twice": (lambda: EdgeConv(nn.Linear(2 * WIDTH, WIDTH)), lambda: (features(), graph()), True),
    "GCNConv without edges": (lambda: GCNConv(WIDTH, WIDTH), lambda: (features(), graph()[:, :0]), True),
    "SAGEConv without edges": (lambda: SAGEConv(WIDTH, WIDTH), lambda: (features(), graph()[:, :0]), True),
    "GINConv without edges": (lambda: GINConv(nn.Identity()), lambda: (features(), graph()[:, :0]), True),
    "GATConv without edges": (
        lambda: GATConv(WIDTH, WIDTH, add_self_loops=False), lambda: (features(), graph()[:, :0]), True,
    ),
    "TAGConv without edges": (lambda: TAGConv(WIDTH, OUT, K=2), lambda: (features(), graph()[:, :0]), True),
    "LGConv of counts": (lambda: LGConv(normalize=False), lambda: (torch.randint(5, (NODES, 3)), graph()), False),
}


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", CASES)
def test_measuring_never_raises_and_never_changes_a_result(name: str, bits: int, multiplier: float) -> None:
    make, arguments, is_measured = CASES[name]
    torch.manual_seed(0)
    conv, args = make(), arguments()
    expected = conv(*args)
    plain = qgnn.quantize_model(conv, config=QuantConfig(bits=bits, smp=None)).train()
    qconv: Any = qgnn.quantize_model(conv, config=QuantConfig(bits=bits, smp=SMPConfig(multiplier=multiplier))).train()
    out = qconv(*args)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    if not is_measured or multiplier == 0:
        assert torch.equal(out, plain(*args))
    if bits == 32 and multiplier == 0:
        assert torch.equal(out, expected)
    is_measured = is_measured and not (name.startswith("GATConv") and bits == 32)
    measured = [m.constraint for m in qconv.modules() if hasattr(m, "constraint_state")]
    assert (measured != [None] * len(measured)) == is_measured
    qgnn.differential_multiplier_step(qconv)


class Wrapping(MessagePassing):
    """Edges of many turns round the same nodes, which only its own ``propagate`` knows to read."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def propagate(self, edge_index: Tensor, size: Any = None, **kwargs: Any) -> Tensor:
        return super().propagate(edge_index % NODES, size=size, **kwargs)


def test_a_correction_that_cannot_act_is_said() -> None:
    """With a multiplier that acts, and edges that are none between the nodes, the result stays, with a warning."""
    args = features(), graph() + 7 * NODES
    model = nn.Sequential(Wrapping())
    results = []
    for smp in (None, SMPConfig(multiplier=0.4)):
        qmodel = qgnn.quantize_model(model, config=QuantConfig(bits=8, smp=smp))
        qgnn.calibrate(qmodel, args, forward=lambda model, batch: model[0](*batch))
        results.append(qmodel.eval())
    with pytest.warns(UserWarning, match=r"correction of '0' does not act.*'smp': None"):
        out = results[1][0](*args)
    assert torch.equal(out, results[0][0](*args))
