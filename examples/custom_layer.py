"""A layer type of one's own with integer arithmetic: converted, trained, packed, saved.

    python -m examples.custom_layer

The layer is the mean over neighbours of a linear map. Nothing but `qgnn_plugin` and `qgnn_plugin.extension` is used:
what is written here is what a package of layers would write.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_geometric.nn import Linear, MessagePassing

import qgnn_plugin as qgnn
from qgnn_plugin import extension
from qgnn_plugin.data import load_dataset


class MeanConv(MessagePassing):
    """The layer: plain PyG, it knows nothing of quantization."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(aggr="mean")
        self.lin = Linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=self.lin(x))


class Mean(extension.Convolution):
    """Its arithmetic on codes, told once: what neighbours send is quantized once per node and summed as integers."""

    @classmethod
    def attach(cls, layer: MeanConv, sites: extension.SiteFactory) -> None:
        layer.message_quantizer = sites.message("message", layer.lin.out_channels)
        extension.attach_constraint(layer, sites.config.smp, sites.device)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        samples = extension.Samples.of(self, x)
        size = (samples.num_nodes, samples.num_nodes)
        graph = extension.mean_graph(edge_index, size, self.flow, copies=samples.copies)
        mapped = extension.Mapped(self.lin, x, samples)
        return samples.shaped(self._convolved_with(graph, self.message_quantizer, mapped))


class QuantizedMeanConv(Mean, extension.Trainable):
    """Converted: codes with gradients."""

    forward = extension.trainable(Mean.forward)


class PackedMeanConv(Mean, extension.Frozen):
    """Packed: the map hands over codes, the kernel sums them; no float of size N x F is written in between."""

    forward = extension.inference(Mean.forward)


extension.register_layer(MeanConv, QuantizedMeanConv, PackedMeanConv)


class Net(nn.Module):
    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.first, self.second = MeanConv(in_channels, hidden), MeanConv(hidden, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


def main(epochs: int = 60) -> float:
    """Trains in 4 bits, packs, saves and loads; returns the packed model's test accuracy."""
    data = load_dataset("demo")
    torch.manual_seed(0)
    model = Net(data.num_features, 32, int(data.y.max()) + 1)
    qmodel = qgnn.quantize_model(model, bits=4)
    optimizer = torch.optim.Adam(qgnn.training.parameter_groups(qmodel, lr=0.01, weight_decay=5e-4))
    for _ in range(epochs):
        qmodel.train()
        optimizer.zero_grad()
        logits = qmodel(data.x, data.edge_index)
        nn.functional.cross_entropy(logits[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
        qgnn.differential_multiplier_step(qmodel)
    packed = qgnn.pack_model(qmodel)
    with tempfile.TemporaryDirectory() as folder:
        qgnn.save_packed(packed, Path(folder) / "mean.safetensors")
        packed = qgnn.load_packed(Path(folder) / "mean.safetensors", model)
    logits = packed(data.x, data.edge_index)
    assert isinstance(packed.first, MeanConv)
    assert logits.equal(qmodel.eval()(data.x, data.edge_index))  # sums of integers: bit for bit
    accuracy = (logits.argmax(1) == data.y)[data.test_mask].float().mean().item()
    print(qgnn.summary(packed))
    print(f"test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
