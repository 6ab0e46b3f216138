"""Shapes from points: edge convolutions on neighbours in feature space (DGCNN), in 4 bits.

    python -m examples.point_cloud                                    # spheres, cubes, cylinders and tori
    python -m examples.point_cloud --dataset ModelNet10 --root data

Neighbours are found anew by each layer, from what the layer before it made of the points. PyG's `DynamicEdgeConv` does
that with torch-cluster or pyg-lib; here the search is a few lines, and the convolution is PyG's `EdgeConv`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import MLP, EdgeConv, global_max_pool

import qgnn_plugin as qgnn
from examples.common import parser, report, train

POINTS = 64


def neighbours(x: Tensor, points: int, k: int) -> Tensor:
    """Edges [2, N k] to each row of ``x`` [N, F] from the nearest of its own cloud of ``points`` rows."""
    clouds = x.detach().view(-1, points, x.size(1))
    found = torch.cdist(clouds, clouds).topk(k + 1, largest=False).indices[:, :, 1:]
    found = found + torch.arange(0, x.size(0), points).view(-1, 1, 1)
    return torch.stack([found.flatten(), torch.arange(x.size(0)).repeat_interleave(k)])


class Net(nn.Module):
    """Two edge convolutions, the maximum over each cloud, an MLP."""

    def __init__(self, out_channels: int, hidden: int = 32, k: int = 8) -> None:
        super().__init__()
        self.k = k
        self.conv1 = EdgeConv(MLP([2 * 3, hidden, hidden]), aggr="max")
        self.conv2 = EdgeConv(MLP([2 * hidden, 2 * hidden]), aggr="max")
        self.head = MLP([3 * hidden, 2 * hidden, out_channels], dropout=0.3)

    def forward(self, pos: Tensor, batch: Tensor, batch_size: int) -> Tensor:
        points = pos.size(0) // batch_size
        first = self.conv1(pos, neighbours(pos, points, self.k))
        second = self.conv2(first, neighbours(first, points, self.k))
        return self.head(global_max_pool(torch.cat([first, second], dim=1), batch, batch_size))


def generated(count: int = 320) -> list[Data]:
    """Noisy points on the surface of a sphere, a cube, a cylinder or a torus, turned and stretched."""
    clouds = []
    for k in range(count):
        u, v = 2 * math.pi * torch.rand(POINTS), torch.rand(POINTS) * 2 - 1
        circle = torch.stack([u.cos(), u.sin()], dim=1)
        if k % 4 == 0:
            pos = torch.cat([circle * (1 - v**2).sqrt().unsqueeze(1), v.unsqueeze(1)], dim=1)
        elif k % 4 == 1:
            pos = torch.rand(POINTS, 3) * 2 - 1
            side = torch.randint(3, (POINTS,))
            pos[torch.arange(POINTS), side] = pos[torch.arange(POINTS), side].sign()
        elif k % 4 == 2:
            pos = torch.cat([circle, v.unsqueeze(1)], dim=1)
        else:
            w = math.pi * v
            pos = torch.cat([circle * (1 + 0.4 * w.cos()).unsqueeze(1), 0.4 * w.sin().unsqueeze(1)], dim=1)
        turn = torch.linalg.qr(torch.randn(3, 3)).Q
        pos = pos * (0.8 + 0.4 * torch.rand(3)) @ turn + 0.02 * torch.randn(POINTS, 3)
        clouds.append(Data(pos=pos, y=torch.tensor([k % 4])))
    return clouds


def load(name: str, root: str) -> tuple[list[Data], list[Data]]:
    """Clouds to train on, and to test on."""
    if name == "generated":
        clouds = generated()
        return clouds[: 3 * len(clouds) // 4], clouds[3 * len(clouds) // 4 :]
    import torch_geometric.transforms as T
    from torch_geometric.datasets import ModelNet

    options: Any = {"pre_transform": T.NormalizeScale(), "transform": T.SamplePoints(256)}
    return tuple(list(ModelNet(root, name.removeprefix("ModelNet"), train, **options)) for train in (True, False))


def predict(model: nn.Module, batch: Any) -> Tensor:
    return model(batch.pos, batch.batch, batch.num_graphs)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(predict(model, batch), batch.y)


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, epochs=20, dataset="ModelNet10 or ModelNet40").parse_args(argv)
    torch.manual_seed(args.seed)
    clouds, held = load(args.dataset, args.root)
    batches = DataLoader(clouds, batch_size=16, shuffle=True, drop_last=True)
    test = list(DataLoader(held, batch_size=16))

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        return {"test accuracy": torch.cat([predict(model, b).argmax(1) == b.y for b in test]).float().mean().item()}

    model = Net(int(max(data.y for data in clouds)) + 1)
    train(model, batches, loss, epochs=args.epochs, lr=0.005)

    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=args.bits), batches, method="ranges", forward=predict)
    train(qmodel, batches, loss, epochs=args.epochs // 2, lr=0.002)
    packed = qgnn.pack_model(qmodel)

    print(report({"float": model, f"INT{args.bits}": qmodel, "packed": packed}, score))


if __name__ == "__main__":
    main()
