"""Classes of whole graphs: a GIN on batches, in 4 bits.

    python -m examples.graph_classification                               # which random process made a graph?
    python -m examples.graph_classification --dataset MUTAG --root data   # any classification of PyG's TUDataset
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, MLP, global_add_pool
from torch_geometric.utils import barabasi_albert_graph, degree, erdos_renyi_graph, grid, to_undirected

import qgnn_plugin as qgnn
from examples.common import parser, report, train

DEGREES = 8  # larger ones count as this


class Net(nn.Module):
    """GIN layers, a sum over the nodes of each graph, an MLP."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.gnn = GIN(in_channels, hidden, num_layers=3, norm="batch_norm", jk="cat")
        self.head = MLP([hidden, hidden, out_channels], dropout=0.3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, batch_size: int | None = None) -> Tensor:
        return self.head(global_add_pool(self.gnn(x, edge_index), batch, batch_size))


def generated(count: int = 300) -> list[Data]:
    """Graphs of about the same number of nodes and edges: independent edges, preferred hubs, or a torn grid."""
    graphs = []
    for k in range(count):
        n, kind = int(torch.randint(16, 37, ())), k % 3
        if kind == 0:
            edge_index = erdos_renyi_graph(n, 4 / n)
        elif kind == 1:
            edge_index = barabasi_albert_graph(n, 2)
        else:
            (edge_index, _), n = grid(4, n // 4), 4 * (n // 4)
            keep = (edge_index[0] < edge_index[1]) & (torch.rand(edge_index.size(1)) < 0.8)
            edge_index = to_undirected(edge_index[:, keep], num_nodes=n)
        graphs.append(Data(edge_index=edge_index, num_nodes=n, y=torch.tensor([kind])))
    return graphs


def load(name: str, root: str) -> list[Data]:
    """Graphs with features; degrees stand in where a data set has none, and where it is ``"generated"``."""
    if name == "generated":
        graphs = generated()
    else:
        from torch_geometric.datasets import TUDataset

        graphs = list(TUDataset(root, name))
    for data in graphs:
        if data.x is None:
            degrees = degree(data.edge_index[0], data.num_nodes, dtype=torch.long).clamp(max=DEGREES)
            data.x = nn.functional.one_hot(degrees, DEGREES + 1).float()
    return graphs


@torch.no_grad()
def score(model: nn.Module, batches: Any) -> dict[str, float]:
    right = [model(b.x, b.edge_index, b.batch, b.num_graphs).argmax(1) == b.y for b in batches]
    return {"test accuracy": torch.cat(right).float().mean().item()}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch.x, batch.edge_index, batch.batch, batch.num_graphs), batch.y)


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, epochs=40, dataset="a classification of TUDataset").parse_args(argv)
    torch.manual_seed(args.seed)
    graphs = load(args.dataset, args.root)
    order = torch.randperm(len(graphs)).tolist()
    held = len(graphs) // 4
    batches = DataLoader([graphs[k] for k in order[held:]], batch_size=32, shuffle=True, drop_last=True)
    test = list(DataLoader([graphs[k] for k in order[:held]], batch_size=64))

    model = Net(graphs[0].num_features, 32, int(max(data.y for data in graphs)) + 1)
    train(model, batches, loss, epochs=args.epochs, lr=0.01)

    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=args.bits), batches, method="ranges")
    train(qmodel, batches, loss, epochs=args.epochs // 2, lr=0.003)
    packed = qgnn.pack_model(qmodel)

    models = {"float": model, f"INT{args.bits}": qmodel, "packed": packed}
    print(report(models, lambda model: score(model, test)))


if __name__ == "__main__":
    main()
