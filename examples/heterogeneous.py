"""Several types of nodes and edges: a GraphSAGE made heterogeneous by PyG's `to_hetero`, in 4 bits.

    python -m examples.heterogeneous                                # papers, authors and venues, made up
    python -m examples.heterogeneous --dataset DBLP --root data     # or IMDB
"""

from typing import Any

import torch
import torch_geometric.transforms as T
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.nn import SAGEConv, to_hetero

import qgnn_plugin as qgnn
from examples.common import parser, report, train


class Net(nn.Module):
    """Two convolutions, written as if all nodes were of one type."""

    def __init__(self, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = SAGEConv((-1, -1), hidden), SAGEConv((-1, -1), out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv2(self.conv1(x, edge_index).relu(), edge_index)


def generated(papers: int = 600, authors: int = 300, venues: int = 12, classes: int = 4) -> HeteroData:
    """Authors and venues mostly keep to one subject; a paper's words say little about its own."""
    subject = {"paper": papers, "author": authors, "venue": venues}
    subject = {name: torch.randint(classes, (count,)) for name, count in subject.items()}
    data = HeteroData()
    for name, noise in (("paper", 2.0), ("author", 1.0), ("venue", 0.5)):
        centers = torch.randn(classes, 16)
        data[name].x = centers[subject[name]] + noise * torch.randn(len(subject[name]), 16)

    def link(other: str, each: int) -> Tensor:
        near = (subject["paper"].unsqueeze(1) == subject[other]).float() + 0.03
        chosen = near.multinomial(each)
        return torch.stack([torch.arange(papers).repeat_interleave(each), chosen.flatten()])

    data["paper", "written_by", "author"].edge_index = link("author", 3)
    data["paper", "appears_in", "venue"].edge_index = link("venue", 1)
    data["paper"].y = subject["paper"]
    return T.RandomNodeSplit(num_val=0, num_test=papers // 2)(T.ToUndirected()(data))


def load(name: str, root: str) -> tuple[HeteroData, str]:
    """A graph, and the type of its nodes with labels; types without features have an identity instead."""
    if name == "generated":
        data = generated()
    else:
        import torch_geometric.datasets

        data = getattr(torch_geometric.datasets, name)(root)[0]
    for kind in data.node_types:
        if "x" not in data[kind]:
            data[kind].x = torch.eye(data[kind].num_nodes)
    return data, next(kind for kind in data.node_types if "y" in data[kind])


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, epochs=60, dataset="a heterogeneous data set (DBLP, IMDB)").parse_args(argv)
    torch.manual_seed(args.seed)
    data, target = load(args.dataset, args.root)
    nodes = data[target]

    def loss(model: Any, batch: HeteroData) -> Tensor:
        out = model(batch.x_dict, batch.edge_index_dict)[target]
        return nn.functional.cross_entropy(out[nodes.train_mask], nodes.y[nodes.train_mask])

    @torch.no_grad()
    def score(model: Any) -> dict[str, float]:
        found = model(data.x_dict, data.edge_index_dict)[target].argmax(1)
        return {"test accuracy": (found == nodes.y)[nodes.test_mask].float().mean().item()}

    model = to_hetero(Net(32, int(nodes.y.max()) + 1), data.metadata())
    with torch.no_grad():  # the widths of its layers come from the first batch
        model(data.x_dict, data.edge_index_dict)
    train(model, [data], loss, epochs=args.epochs, lr=0.01)

    qmodel = qgnn.quantize_model(model, bits=args.bits)
    qgnn.calibrate(qmodel, (data.x_dict, data.edge_index_dict), method="ranges")
    train(qmodel, [data], loss, epochs=args.epochs // 2, lr=0.003)
    packed = qgnn.pack_model(qmodel)

    print(report({"float": model, f"INT{args.bits}": qmodel, "packed": packed}, score))


if __name__ == "__main__":
    main()
