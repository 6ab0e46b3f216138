"""GraphSAGE in 4 bits, trained on neighbour-sampled mini-batches.

    python -m examples.graphsage                                        # Cora, as in `make demo`
    python -m examples.graphsage --dataset Flickr --root data --bits 2  # any data set of PyG

Every node is a seed once per epoch: training nodes give labels, all of them soft labels of the
float model. Validation and test take all neighbours, so their figures are exact.
"""

import argparse
import tempfile

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from torch_geometric.nn import GraphSAGE

import qgnn_plugin as qgnn
from qgnn_plugin.data import load_dataset
from qgnn_plugin.lightning_modules import DifferentialMultiplier, QuantizedNodeClassifier, SampledNodeDataModule


def fit(module: pl.LightningModule, datamodule: SampledNodeDataModule, epochs: int) -> float:
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
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--num-neighbors", type=int, nargs=2, default=(10, 10), help="per hop")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pl.seed_everything(args.seed)
    data = load_dataset(args.dataset, args.root, seed=args.seed)
    neighbors = list(args.num_neighbors)
    classes = int(data.y.max()) + 1

    model = GraphSAGE(data.num_features, 64, num_layers=2, out_channels=classes, dropout=0.5)
    labelled = SampledNodeDataModule(data, neighbors)
    float_accuracy = fit(QuantizedNodeClassifier(model), labelled, args.epochs)

    qmodel = qgnn.quantize_model(model, bits=args.bits)
    everything = SampledNodeDataModule(data, neighbors, seeds="all")
    module = QuantizedNodeClassifier(qmodel, teacher=model)
    accuracy = fit(module, everything, args.epochs)

    print(qgnn.summary(qmodel))
    print(f"test accuracy: {float_accuracy:.3f} in float, {accuracy:.3f} in {args.bits} bits")


if __name__ == "__main__":
    main()
