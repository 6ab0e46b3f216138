"""Write the golden files of the version that runs this: ``PYTHONPATH=.:tests python tests/golden/make.py [folder]``.

Files of a published version are never written again: a change of format adds a folder.
"""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import torch
from golden.models import CLASSES, FEATURES, MODELS, inputs
from torch import nn

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import QuantizedNodeClassifier


def perturbed(model: nn.Module) -> nn.Module:
    """The model with norms and biases away from their defaults."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.2)
    return model


def dump(value: Any, path: Path) -> None:
    """``torch.save``, compressed: archives of small tensors are mostly padding."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue(), 9, mtime=0))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    x, edge_index = inputs()
    expected: dict[str, Any] = {}
    for name, (build, config) in MODELS.items():
        torch.manual_seed(0)
        qmodel = qgnn.quantize_model(perturbed(build()), config=config).eval()
        qgnn.calibrate(qmodel, (x, edge_index), method="ranges")
        packed = qgnn.pack_model(qmodel)
        qgnn.save_packed(packed, folder / f"{name}.safetensors")
        dump(qmodel.state_dict(), folder / f"{name}.state.pt.gz")
        dump(qmodel, folder / f"{name}.model.pt.gz")
        with torch.no_grad():
            expected[name] = qmodel(x, edge_index), packed(x, edge_index)
    for granularity in ("node", "tensor"):
        table = qgnn.PackedEmbeddings.from_float(x, 4, granularity=granularity)
        table.save(folder / f"embeddings_{granularity}.safetensors")
        expected[f"embeddings_{granularity}"] = table.dequantize()
    build, config = MODELS["gcn"]
    torch.manual_seed(0)
    task = QuantizedNodeClassifier(
        qgnn.calibrate(qgnn.quantize_model(build(), config=config).eval(), (x, edge_index), method="ranges"), CLASSES
    ).eval()
    checkpoint = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams),
        "hparams_name": "kwargs",
        "pytorch-lightning_version": "2.5.0",
    }
    dump(checkpoint, folder / "classifier.ckpt.gz")
    with torch.no_grad():
        expected["classifier"] = task(x, edge_index)
    assert x.size(1) == FEATURES
    dump(expected, folder / "expected.pt.gz")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "v1"))
