"""The demo graph, which comes with the package."""

import hashlib

import torch

from qgnn_plugin.data import load_dataset, load_demo_cora

# Of x, edge_index, y and the three masks: figures of the demo are comparable between machines and versions.
SHA256 = "bf0cdbfbedd5de02a6780761693ec9c9ed0145addf31a499d70eca2314cda530"


def test_real_graph() -> None:
    data = load_demo_cora()
    assert data.x.shape == (2708, 1433)
    assert data.x.dtype == torch.float32
    assert data.x.unique().tolist() == [0.0, 1.0]
    assert data.edge_index.shape == (2, 10556)  # As PyG's Planetoid: 5,278 pairs, both directions.
    assert data.is_undirected()
    assert data.is_coalesced()
    assert data.y.bincount().tolist() == [818, 180, 217, 426, 351, 418, 298]
    assert data.y[data.train_mask].bincount().tolist() == [20] * 7
    assert int(data.val_mask.sum()) == 500
    assert int(data.test_mask.sum()) == 1000
    sizes = data.train_mask.int() + data.val_mask.int() + data.test_mask.int()
    assert int(sizes.max()) == 1


def test_every_bit_is_fixed() -> None:
    data = load_dataset("Demo")
    digest = hashlib.sha256()
    for name in ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask"):
        digest.update(data[name].numpy().tobytes())
    assert digest.hexdigest() == SHA256
