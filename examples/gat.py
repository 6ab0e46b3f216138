"""A graph attention network of your own, with the widths of its parts chosen one by one.

    python -m examples.gat                                        # Cora, as `make demo` fetches it
    python -m examples.gat --dataset Photo --root data --bits 2   # any data set of PyG

The model is a plain ``nn.Module`` around PyG's ``GATConv``. The configuration says which width each
kind of tensor gets and may treat layers differently, by name.
"""

import argparse
import tempfile

import pytorch_lightning as pl
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch_geometric.nn import GATConv

import qgnn_plugin as qgnn
from qgnn_plugin.data import load_dataset
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier,
    NodeDataModule,
    QuantizedNodeClassifier,
)


class GAT(nn.Module):
    """Eight heads of eight features, then one head per class (Velickovic et al., ICLR 2018)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = GATConv(in_channels, 8, heads=8, dropout=0.6)
        self.conv2 = GATConv(64, out_channels, heads=1, concat=False, dropout=0.6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.dropout(x, p=0.6, training=self.training)
        x = F.elu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.6, training=self.training)
        return self.conv2(x, edge_index)


def fit(module: pl.LightningModule, datamodule: NodeDataModule, epochs: int) -> float:
    """Trains to the best validation epoch, in place; returns the test accuracy."""
    callbacks = [DifferentialMultiplier()] if qgnn.is_quantized(module) else []
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val_acc", mode="max")
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[*callbacks, best], logger=False)
        trainer.fit(module, datamodule)
        (metrics,) = trainer.test(module, datamodule, ckpt_path="best")
    return metrics["test_acc"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="demo", help="name of a PyG data set")
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--bits", type=int, default=4, choices=(1, 2, 4, 8))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pl.seed_everything(args.seed)
    data = load_dataset(args.dataset, args.root, seed=args.seed)
    datamodule = NodeDataModule(data)
    classes = int(data.y.max()) + 1

    model = GAT(data.num_features, classes)
    module = QuantizedNodeClassifier(model, classes, lr=0.005)
    float_accuracy = fit(module, datamodule, args.epochs)

    config = qgnn.QuantConfig(
        bits=args.bits,
        attention_bits=8,  # Unnormalized attention coefficients.
        overrides={"conv2": {"message_bits": 8}},  # The last messages are the logits.
    )
    qmodel = qgnn.quantize_model(model, config=config)
    module = QuantizedNodeClassifier(qmodel, classes, lr=0.005, teacher=model)
    accuracy = fit(module, datamodule, args.epochs)

    print(qgnn.summary(qmodel))
    print(f"test accuracy: {float_accuracy:.3f} in float, {accuracy:.3f} in {args.bits} bits")


if __name__ == "__main__":
    main()
