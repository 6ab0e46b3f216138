"""Two layers of each convolution that is compiled in the tests."""

from collections.abc import Callable

from torch import Tensor, nn
from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv

NODES, FEATURES, CLASSES = 40, 24, 8

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "GCN": GCNConv,
    "SAGE": SAGEConv,
    "GAT": lambda a, b: GATConv(a, b // 4, heads=4),
    "GATv2": lambda a, b: GATv2Conv(a, b // 4, heads=4),
    "GIN": lambda a, b: GINConv(nn.Linear(a, b)),
}


class Model(nn.Module):
    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(FEATURES, 32), make(32, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)
