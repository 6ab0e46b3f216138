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


class QuantizedMeanConv(extension.QuantizedConv):
    """Converted: what neighbours send is quantized once per node and summed as integers."""

    @classmethod
    def attach(cls, layer: MeanConv, sites: extension.SiteFactory) -> None:
        layer.message_quantizer = sites.message("message", layer.lin.out_channels)
        extension.attach_constraint(layer, sites.config.smp, sites.device)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        samples = extension.Samples.of(self, x)
        graph = _graph(self, edge_index, samples)
        z = samples.rows(self.lin(x))
        out = extension.aggregate_sum(self.message_quantizer(z), graph.plan, graph.weight, exact=not self.training)
        return samples.shaped(self._smooth(z, out * graph.target, graph.apply, graph.plan.num_edges, averaged=True))


class PackedMeanConv(extension.PackedConv):
    """Packed: the map hands over codes, the kernel sums them; no float of size N x F is written in between."""

    @extension.inference
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        samples = extension.Samples.of(self, x)
        graph = _graph(self, edge_index, samples)
        sent = self.lin.packed_to(self.lin.quantize(samples.rows(x)), self.message_quantizer, self.lin.bias)
        z = None
        if sent is None or self._smp is not None:  # no kernel writes that range, or a correction needs floats
            z = samples.rows(self.lin(x))
            sent = self.message_quantizer(z)
        if self._smp is None:
            return samples.shaped(self.deferred(self.aggregation(sent, graph)))
        return samples.shaped(self._smooth(z, self.aggregated(sent, graph), graph.apply, graph.plan.num_edges))


def _graph(layer: MeanConv, edge_index: Tensor, samples: extension.Samples) -> extension.NormalizedGraph:
    size = (samples.num_nodes, samples.num_nodes)
    return extension.mean_graph(edge_index, size, layer.flow, copies=samples.copies)


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
