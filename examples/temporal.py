"""A temporal network (TGN): who meets whom next, with the memory of nodes in packed rows.

    python -m examples.temporal                                     # two crowds whose members change sides
    python -m examples.temporal --dataset Wikipedia --root data     # or another of PyG's JODIEDataset

The memory of all nodes is the largest tensor of such a model, and no weight: `pack_rows` keeps it in 8 bits, read and
written row by row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import TemporalData
from torch_geometric.datasets import JODIEDataset
from torch_geometric.loader import TemporalDataLoader
from torch_geometric.nn import TGNMemory, TransformerConv
from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator, LastNeighborLoader

import qgnn_plugin as qgnn
from examples.common import parser, report, train


class Net(nn.Module):
    """Memory, attention over the last interactions of each node, a score for each pair."""

    def __init__(self, num_nodes: int, features: int, width: int = 32, time: int = 16) -> None:
        super().__init__()
        message = IdentityMessage(features, width, time)
        self.memory = TGNMemory(num_nodes, features, width, time, message, LastAggregator())
        self.conv = TransformerConv(width, width // 2, heads=2, edge_dim=features + time)
        self.score = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, nodes: Tensor, edge_index: Tensor, t: Tensor, msg: Tensor, src: Tensor, dst: Tensor) -> Tensor:
        """Scores of pairs, given as positions in ``nodes``, with edges of the time ``t`` and the content ``msg``."""
        z, last = self.memory(nodes)
        passed = self.memory.time_enc((last[edge_index[0]] - t).to(z.dtype))
        z = self.conv(z, edge_index, torch.cat([passed, msg], dim=-1))
        return self.score(torch.cat([z[src], z[dst]], dim=-1)).squeeze(1)


def generated(nodes: int = 120, events: int = 3000) -> TemporalData:
    """Two sides, whose members change over and meet their own; as half of the others are, 0.75 is the best accuracy."""
    side = torch.arange(nodes) % 2
    src, dst, msg = [], [], []
    for _ in range(events):
        side[torch.rand(nodes) < 1e-3] ^= 1
        one = int(torch.randint(nodes // 2, ()))
        same = (side[nodes // 2 :] == side[one]).nonzero().flatten() + nodes // 2
        src.append(one)
        dst.append(int(same[torch.randint(len(same), ())]))
        msg.append(torch.randn(4) + 2.0 * side[one] - 1)
    return TemporalData(torch.tensor(src), torch.tensor(dst), torch.arange(events), torch.stack(msg))


class Run:
    """``before`` from the start of time, with ``model`` remembering each batch after it was asked about it."""

    def __init__(self, data: TemporalData, model: Any, before: TemporalData) -> None:
        self.data, self.model, self.before = data, model, before
        self.places = torch.empty(data.num_nodes, dtype=torch.long)
        self.neighbours = LastNeighborLoader(data.num_nodes, size=8)

    def __iter__(self) -> Any:
        self.model.memory.reset_state()
        self.neighbours.reset_state()
        yield from self.batches(self.before)

    def batches(self, part: TemporalData) -> Any:
        """Arguments of the model: the true pairs of ``part``, then as many with another second node."""
        candidates = self.data.dst.unique()
        for batch in TemporalDataLoader(part, batch_size=100):
            other = candidates[torch.randint(len(candidates), batch.dst.shape)]
            nodes, edge_index, events = self.neighbours(torch.cat([batch.src, batch.dst, other]).unique())
            self.places[nodes] = torch.arange(len(nodes))
            src, dst, other = (self.places[index] for index in (batch.src, batch.dst, other))
            pairs = src.repeat(2), torch.cat([dst, other])
            yield nodes, edge_index, self.data.t[events], self.data.msg[events], *pairs
            self.model.memory.update_state(batch.src, batch.dst, batch.t, batch.msg)
            self.model.memory.detach()
            self.neighbours.insert(batch.src, batch.dst)


def loss(model: nn.Module, batch: Any) -> Tensor:
    true, other = model(*batch).view(2, -1)
    return nn.functional.softplus(torch.stack([-true, other])).mean()


@torch.no_grad()
def score(run: Run, after: TemporalData) -> dict[str, float]:
    """How often the true pair of ``after`` is put before the other one; the memory has seen what was before."""
    torch.manual_seed(1)  # the same pairs for every model
    for _ in run:
        pass
    true, other = torch.cat([run.model(*batch).view(2, -1) for batch in run.batches(after)], dim=1)
    return {"test accuracy": (true > other).float().mean().item(), "memory bytes": run.model.memory.memory.nbytes}


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, epochs=6, dataset="a JODIEDataset (Wikipedia, Reddit, MOOC, LastFM)").parse_args(argv)
    torch.manual_seed(args.seed)
    data = generated() if args.dataset == "generated" else JODIEDataset(args.root, args.dataset)[0]
    before, after, _ = data.train_val_test_split(val_ratio=0.2, test_ratio=0.0)

    model = Net(data.num_nodes, data.msg.size(1))
    train(model, Run(data, model, before), loss, epochs=args.epochs, lr=0.003)

    qmodel = qgnn.quantize_model(model, bits=args.bits)
    qgnn.calibrate(qmodel, Run(data, qmodel, before), method="ranges")
    train(qmodel, Run(data, qmodel, before), loss, epochs=args.epochs // 2, lr=0.001)
    packed = qgnn.pack_model(qmodel)
    qgnn.pack_rows(packed.memory, "memory", bits=8)

    models = {"float": model, f"INT{args.bits}": qmodel, "packed": packed}
    print(report(models, lambda model: score(Run(data, model, before), after)))


if __name__ == "__main__":
    main()
