"""Recommendation as link prediction: LightGCN on a bipartite graph of users and items.

    python -m examples.link_prediction
    python -m examples.link_prediction --pairs gowalla.npz  # `train` and `test` [L, 2] of (user, item), and both counts

The table of embeddings is most of such a model. It is packed as well, and what its rows send is summed as integers.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn import LightGCN

import qgnn_plugin as qgnn
from examples.common import parser, report, train

TOP = 20


class Pairs(NamedTuple):
    """Who chose what: pairs [L, 2] of user and item, both counted from zero."""

    train: Tensor
    test: Tensor
    users: int
    items: int

    @property
    def edge_index(self) -> Tensor:
        """[2, 2L]: users first, then items, in both directions."""
        user, item = self.train[:, 0], self.train[:, 1] + self.users
        return torch.stack([torch.cat([user, item]), torch.cat([item, user])])


def generated(users: int = 400, items: int = 300, each: int = 25, tastes: int = 6, seed: int = 0) -> Pairs:
    """Users draw items by taste and by popularity; the last fifth of each user's draws is held out."""
    generator = torch.Generator().manual_seed(seed)
    taste = torch.randn(users, tastes, generator=generator) @ torch.randn(tastes, items, generator=generator)
    popular = 0.5 * torch.randn(items, generator=generator)
    drawn = (taste + popular).softmax(1).multinomial(each, generator=generator)
    rows = torch.arange(users).unsqueeze(1).expand(-1, each)
    pairs = torch.stack([rows, drawn], dim=-1)
    held = each // 5
    return Pairs(pairs[:, held:].reshape(-1, 2), pairs[:, :held].reshape(-1, 2), users, items)


def load(path: str) -> Pairs:
    with np.load(path) as file:
        train, test = (torch.from_numpy(file[name].astype(np.int64)) for name in ("train", "test"))
        return Pairs(train, test, int(file["num_users"]), int(file["num_items"]))


def encode(model: Any, edge_index: Tensor) -> Tensor:
    return model.get_embedding(edge_index)


@torch.no_grad()
def score(model: nn.Module, pairs: Pairs) -> dict[str, float]:
    """Recall and NDCG of the first 20 items that a user has not chosen yet, mean over users with held-out items."""
    z = encode(model, pairs.edge_index)
    recall, gain = [], []
    discount = 1 / torch.arange(2, TOP + 2).log2()
    wanted = torch.bincount(pairs.test[:, 0], minlength=pairs.users)
    for users in torch.arange(pairs.users)[wanted > 0].split(1000):
        place = torch.full((pairs.users,), -1)
        place[users] = torch.arange(len(users))
        scores = z[users] @ z[pairs.users :].t()
        seen, hidden = (p[place[p[:, 0]] >= 0] for p in (pairs.train, pairs.test))
        scores[place[seen[:, 0]], seen[:, 1]] = -torch.inf
        relevant = torch.zeros_like(scores)
        relevant[place[hidden[:, 0]], hidden[:, 1]] = 1
        hits = relevant.gather(1, scores.topk(TOP).indices)
        best = discount.cumsum(0)[wanted[users].clamp(max=TOP) - 1]
        recall.append(hits.sum(1) / wanted[users])
        gain.append((hits * discount).sum(1) / best)
    return {f"recall@{TOP}": torch.cat(recall).mean().item(), f"NDCG@{TOP}": torch.cat(gain).mean().item()}


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, epochs=200)
    arguments.add_argument("--pairs", help="an .npz of pairs; generated ones by default")
    arguments.add_argument("--hidden", type=int, default=64)
    args = arguments.parse_args(argv)

    torch.manual_seed(args.seed)
    pairs = load(args.pairs) if args.pairs else generated(seed=args.seed)
    edge_index, batches = pairs.edge_index, pairs.train.split(8192)

    def loss(model: Any, batch: Tensor) -> Tensor:
        """Bayesian personalized ranking: a chosen item before a random one."""
        z = encode(model, edge_index)
        user, item = batch[:, 0], batch[:, 1] + pairs.users
        other = torch.randint(pairs.items, item.shape) + pairs.users
        margin = (z[user] * (z[item] - z[other])).sum(-1)
        return -nn.functional.logsigmoid(margin).mean() + 1e-4 * model.embedding.weight[user].square().sum(-1).mean()

    model: Any = LightGCN(pairs.users + pairs.items, args.hidden, num_layers=3)
    train(model, batches, loss, epochs=args.epochs, lr=0.01)

    qmodel = qgnn.quantize_model(model, bits=args.bits)
    qgnn.calibrate(qmodel, [(edge_index,)], method="ranges", forward=lambda model, batch: encode(model, *batch))
    train(qmodel, batches, loss, epochs=args.epochs // 2, lr=0.003)
    packed = qgnn.pack_model(qmodel)

    models = {"float": model, f"INT{args.bits}": qmodel, "packed": packed}
    print(report(models, lambda model: score(model, pairs)))


if __name__ == "__main__":
    main()
