"""A number per graph: GINE on molecules with features of bonds, in 4 bits.

    python -m examples.graph_regression                                    # random trees, and a formula of theirs
    python -m examples.graph_regression --dataset ESOL --root data         # any of PyG's MoleculeNet (needs rdkit)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import MLP, GINEConv, global_add_pool

import qgnn_plugin as qgnn
from examples.common import parser, report, train

ATOMS, BONDS = 4, 3


class Net(nn.Module):
    """An embedding of atoms, GINE layers, a sum over the atoms of each molecule, an MLP."""

    def __init__(self, in_channels: int, edge_dim: int, hidden: int, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels, hidden)
        self.convs = nn.ModuleList(
            GINEConv(MLP([hidden, hidden, hidden]), edge_dim=edge_dim) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers))
        self.head = MLP([hidden, hidden, 1], norm=None)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, batch_size: int) -> Tensor:
        h = self.embed(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = h + norm(conv(h, edge_index, edge_attr)).relu()
        return self.head(global_add_pool(h, batch, batch_size)).squeeze(1)


def generated(count: int = 600) -> list[Data]:
    """Random trees of atoms and bonds; the number is a share of each atom, and one of each bond by both its ends."""
    atom, bond = torch.tensor([0.3, -0.2, 0.5, -0.6]), torch.tensor([0.2, -0.1, 0.4])
    polar = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    graphs = []
    for _ in range(count):
        n = int(torch.randint(8, 25, ()))
        kind, child = torch.randint(ATOMS, (n,)), torch.arange(1, n)
        parent = (torch.rand(n - 1) * child).long()
        link = torch.randint(BONDS, (n - 1,))
        y = atom[kind].sum() + (bond[link] * (polar[kind[child]] - polar[kind[parent]]).abs()).sum()
        graphs.append(
            Data(
                x=nn.functional.one_hot(kind, ATOMS).float(),
                edge_index=torch.stack([torch.cat([parent, child]), torch.cat([child, parent])]),
                edge_attr=nn.functional.one_hot(link, BONDS).float().repeat(2, 1),
                y=y.view(1),
            )
        )
    return graphs


def load(name: str, root: str) -> list[Data]:
    if name == "generated":
        return generated()
    from torch_geometric.datasets import MoleculeNet
    from torch_geometric.utils.smiles import e_map, x_map

    def one_hot(codes: Tensor, sizes: list[int]) -> Tensor:
        columns = [nn.functional.one_hot(column, size) for column, size in zip(codes.t(), sizes, strict=True)]
        return torch.cat(columns, dim=1).float()

    atoms, bonds = ([len(values) for values in table.values()] for table in (x_map, e_map))
    graphs = [data for data in MoleculeNet(root, name) if data.num_edges]
    return [
        Data(x=one_hot(d.x, atoms), edge_index=d.edge_index, edge_attr=one_hot(d.edge_attr, bonds), y=d.y[:, 0])
        for d in graphs
    ]


def predict(model: nn.Module, batch: Any) -> Tensor:
    return model(batch.x, batch.edge_index, batch.edge_attr, batch.batch, batch.num_graphs)


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, epochs=40, dataset="a regression of MoleculeNet").parse_args(argv)
    torch.manual_seed(args.seed)
    graphs = load(args.dataset, args.root)
    order = torch.randperm(len(graphs)).tolist()
    held = len(graphs) // 5
    batches = DataLoader([graphs[k] for k in order[held:]], batch_size=32, shuffle=True, drop_last=True)
    test = list(DataLoader([graphs[k] for k in order[:held]], batch_size=64))
    y = torch.cat([graphs[k].y for k in order[held:]])
    mean, scale = y.mean(), y.std()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(predict(model, batch), (batch.y - mean) / scale)

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        errors = torch.cat([predict(model, batch) * scale + mean - batch.y for batch in test])
        return {"test RMSE": errors.square().mean().sqrt().item(), "MAE": errors.abs().mean().item()}

    model = Net(graphs[0].num_features, graphs[0].edge_attr.size(1), 32)
    train(model, batches, loss, epochs=args.epochs, lr=0.01)

    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=args.bits), batches, method="ranges", forward=predict)
    train(qmodel, batches, loss, epochs=args.epochs // 2, lr=0.003)
    packed = qgnn.pack_model(qmodel)

    print(report({"float": model, f"INT{args.bits}": qmodel, "packed": packed}, score))


if __name__ == "__main__":
    main()
