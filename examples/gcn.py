"""A two-layer GCN in 4 bits, trained full-batch on one graph.

    python -m examples.gcn                                        # Cora, as `make demo` fetches it
    python -m examples.gcn --dataset PubMed --root data --bits 2  # any data set of PyG

Three steps: train the float model as always; convert it with one line; train the result the same
way, from the float weights, with the float model as teacher.
"""

import argparse
import tempfile

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.data import load_dataset
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier,
    NodeDataModule,
    QuantizedNodeClassifier,
)


def fit(model: nn.Module, datamodule: NodeDataModule, epochs: int, **options: object) -> float:
    """Trains ``model`` in place to its best validation epoch; returns its test accuracy."""
    module = QuantizedNodeClassifier(model, **options)
    callbacks = [DifferentialMultiplier()] if qgnn.is_quantized(model) else []
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

    model = GCN(data.num_features, 64, num_layers=2, out_channels=classes, dropout=0.5)
    float_accuracy = fit(model, datamodule, args.epochs)

    qmodel = qgnn.quantize_model(model, bits=args.bits)
    accuracy = fit(qmodel, datamodule, args.epochs, teacher=model)

    print(qgnn.summary(qmodel))
    print(f"test accuracy: {float_accuracy:.3f} in float, {accuracy:.3f} in {args.bits} bits")


if __name__ == "__main__":
    main()
