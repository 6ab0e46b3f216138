"""Trains a GCN in float, converts it, trains it in 8, 4 and 2 bits, and prints one table.

python -m examples.demo                              # Cora, which comes with the package
python -m examples.demo --dataset PubMed --root data # any data set of PyG
"""

import argparse
import logging
import tempfile
import time
import warnings

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar
from torch import nn
from torch_geometric.nn import GCN
from tqdm import tqdm

import qgnn_plugin as qgnn
from qgnn_plugin.data import load_dataset, to_sparse_features
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier,
    NodeDataModule,
    QuantizedNodeClassifier,
)
from qgnn_plugin.summaries import model_bytes
from qgnn_plugin.tables import table

HEADER = ("model", "test accuracy", "val accuracy", "bits", "model bytes", "smaller", "seconds")


class EpochBar(ProgressBar):
    """One bar per training run: an epoch of full-batch training is a single step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = tqdm(total=trainer.max_epochs, desc=f"{self.name:5}", unit="epoch", leave=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        shown = {name: f"{metrics[name]:.3f}" for name in ("train_loss", "val_acc")}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()


def fit(
    name: str, model: nn.Module, datamodule: NodeDataModule, epochs: int, **options: object
) -> tuple[float, float, float]:
    """Trains ``model`` in place to its best validation epoch.

    Returns:
        Test accuracy, validation accuracy, seconds.
    """
    start = time.perf_counter()
    module = QuantizedNodeClassifier(model, **options)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val_acc", mode="max", save_weights_only=True)
        multiplier = [DifferentialMultiplier()] if qgnn.is_quantized(model) else []
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=[*multiplier, best, EpochBar(name)],
            logger=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule)
        (metrics,) = trainer.test(module, datamodule, ckpt_path="best", verbose=False)
    return metrics["test_acc"], float(best.best_model_score), time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="demo", help="name of a PyG data set")
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=200, help="in float; half in low bits")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and random splits")
    args = parser.parse_args(argv)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    pl.seed_everything(args.seed)
    data = load_dataset(args.dataset, args.root, seed=args.seed)
    classes = int(data.y.max()) + 1
    print(f"{args.dataset}: {data.num_nodes:,} nodes, {data.num_edges:,} edges, {classes} classes")

    model = GCN(data.num_features, args.hidden, num_layers=2, out_channels=classes, dropout=0.5)
    size = model_bytes(model)
    test, val, seconds = fit("FP32", model, NodeDataModule(data), args.epochs)
    rows = [("FP32", f"{test:.1%}", f"{val:.1%}", "32", f"{size:,}", "1.0x", f"{seconds:.0f}")]

    # Converted models take bag-of-words features as a sparse matrix, which is faster.
    datamodule = NodeDataModule(to_sparse_features(data))
    for bits in (8, 4, 2):
        name = f"INT{bits}"
        qmodel = qgnn.quantize_model(model, bits=bits)
        epochs = max(1, args.epochs // 2)  # It starts from the trained weights.
        test, val, seconds = fit(name, qmodel, datamodule, epochs, teacher=model)
        packed = model_bytes(qmodel)
        cells = (f"{test:.1%}", f"{val:.1%}", f"{bits}", f"{packed:,}", f"{size / packed:.1f}x")
        rows.append((name, *cells, f"{seconds:.0f}"))

    print(table(HEADER, rows, right=True))


if __name__ == "__main__":
    main()
