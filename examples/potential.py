"""An interatomic potential: energies of atoms, and forces as their gradients, in 8 bits.

    python -m examples.potential                                   # clusters of two kinds of atoms, pair energies
    python -m examples.potential --dataset aspirin --root data     # a molecule of PyG's MD17

The loss is on forces, so training differentiates twice: through the gradient of the energy, in float and converted. The
packed model computes energies; it has no gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.datasets import MD17
from torch_geometric.loader import DataLoader
from torch_geometric.nn import MLP, MessagePassing, global_add_pool

import qgnn_plugin as qgnn
from examples.common import parser, report, train

CUTOFF = 5.0


class ContinuousFilter(MessagePassing):
    """A sum over neighbours, weighted by a filter of their distance (SchNet, Schütt et al., 2017)."""

    def __init__(self, hidden: int, radial: int) -> None:
        super().__init__(aggr="add")
        self.filter = MLP([radial, hidden, hidden], act="silu", norm=None)
        self.send, self.receive = nn.Linear(hidden, hidden), MLP([hidden, hidden, hidden], act="silu", norm=None)

    def forward(self, h: Tensor, edge_index: Tensor, basis: Tensor, fade: Tensor) -> Tensor:
        return h + self.receive(self.propagate(edge_index, x=self.send(h), weight=self.filter(basis) * fade))

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        return x_j * weight


class Potential(nn.Module):
    """Energies [B] of atoms ``z`` [N] at ``pos`` [N, 3]: one share for each atom."""

    def __init__(self, kinds: int, hidden: int = 32, radial: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(kinds, hidden)
        self.convs = nn.ModuleList(ContinuousFilter(hidden, radial) for _ in range(layers))
        self.share = MLP([hidden, hidden, 1], act="silu", norm=None)
        self.register_buffer("centers", torch.linspace(0, CUTOFF, radial))

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor, batch_size: int) -> Tensor:
        near = (torch.cdist(pos.detach(), pos.detach()) < CUTOFF) & (batch.unsqueeze(1) == batch)
        edge_index = near.fill_diagonal_(False).nonzero().t()
        distance = (pos[edge_index[0]] - pos[edge_index[1]]).norm(dim=1, keepdim=True)
        basis = torch.exp(-4 * (distance - self.centers) ** 2)
        h, fade = self.embed(z), 0.5 * (1 + torch.cos(torch.pi * distance / CUTOFF))
        for conv in self.convs:
            h = conv(h, edge_index, basis, fade)
        return global_add_pool(self.share(h), batch, batch_size).squeeze(1)


def generated(count: int = 240, atoms: int = 8) -> list[Data]:
    """Jolted clusters with Morse energies, of a depth and width for each pair of kinds, and their forces."""
    depth, width = torch.tensor([[1.0, 0.6], [0.6, 0.3]]), torch.tensor([[1.5, 1.8], [1.8, 2.1]])
    corners = torch.cartesian_prod(*[torch.arange(2.0)] * 3)[:atoms] * 1.7
    upper = torch.ones(atoms, atoms).triu(1) > 0
    clusters = []
    for _ in range(count):
        z, pos = torch.randint(2, (atoms,)), (corners + 0.15 * torch.randn(atoms, 3)).requires_grad_()
        pair = tuple(z[index] for index in upper.nonzero().t())
        apart = width[pair] - (pos.unsqueeze(1) - pos)[upper].norm(dim=1)
        energy = (depth[pair] * ((1 - apart.exp()) ** 2 - 1)).sum()
        force = -torch.autograd.grad(energy, pos)[0]
        clusters.append(Data(z=z, pos=pos.detach(), energy=energy.detach().view(1), force=force))
    return clusters


def predict(model: nn.Module, batch: Any) -> Tensor:
    return model(batch.z, batch.pos, batch.batch, batch.num_graphs)


def forces(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Energies [B], and minus their gradient [N, 3]."""
    batch.pos.requires_grad_()
    energy = predict(model, batch)
    return energy, -torch.autograd.grad(energy.sum(), batch.pos, create_graph=model.training)[0]


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, epochs=40, dataset="a molecule of MD17", bits=8).parse_args(argv)
    torch.manual_seed(args.seed)
    data = generated() if args.dataset == "generated" else list(MD17(args.root, args.dataset)[:2000])
    mean = torch.cat([d.energy for d in data]).mean()
    data = [Data(z=d.z, pos=d.pos, energy=d.energy - mean, force=d.force) for d in data]
    batches = DataLoader(data[len(data) // 4 :], batch_size=16, shuffle=True)
    test = list(DataLoader(data[: len(data) // 4], batch_size=32))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        energy, force = forces(model, batch)
        return nn.functional.mse_loss(energy, batch.energy) + nn.functional.mse_loss(force, batch.force)

    def score(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            energy = torch.cat([predict(model, batch) - batch.energy for batch in test]).abs().mean().item()
        asked = [] if qgnn.is_packed(model) else test
        force = torch.cat([torch.empty(0, 3), *(forces(model, b)[1] - b.force for b in asked)])
        return {"energy MAE": energy, "force MAE": force.abs().mean().item()}  # of nothing: nan

    model = train(Potential(int(max(d.z.max() for d in data)) + 1), batches, loss, epochs=args.epochs, lr=0.01)

    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=args.bits), batches, method="ranges", forward=predict)
    train(qmodel, batches, loss, epochs=args.epochs // 2, lr=0.003)
    packed = qgnn.pack_model(qmodel)

    print(report({"float": model, f"INT{args.bits}": qmodel, "packed": packed}, score))


if __name__ == "__main__":
    main()
