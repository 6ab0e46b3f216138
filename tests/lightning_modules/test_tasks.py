"""Regression, links and sampled mini-batches: what the modules lose, whom they count, what they refuse."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCN, GCNConv, GraphSAGE, global_add_pool
from torch_geometric.transforms import RandomLinkSplit

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import (
    LinkDataModule,
    NodeDataModule,
    QuantizedGraphRegressor,
    QuantizedLinkPredictor,
    QuantizedNodeClassifier,
    QuantizedNodeRegressor,
    SampledNodeDataModule,
)

OPTIONS = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def a_graph(nodes: int = 60, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    block = torch.arange(nodes) % 2
    edges = torch.randint(nodes, (2, 12 * nodes), generator=generator)
    edges = edges[:, block[edges[0]] == block[edges[1]]]  # two communities
    x = torch.randn(nodes, 8, generator=generator) + block[:, None]
    data = Data(x=x, edge_index=torch.cat([edges, edges.flip(0)], dim=1), y=(x.sum(1) / 4).sin())
    order = torch.randperm(nodes, generator=generator)
    for name, part in zip(("train", "val", "test"), order.chunk(3), strict=True):
        data[f"{name}_mask"] = torch.zeros(nodes, dtype=torch.bool).index_fill_(0, part, True)
    return data


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = GCNConv(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor, batch_size: int) -> torch.Tensor:
        return self.lin(global_add_pool(self.conv(x, edge_index).relu(), batch, batch_size))


def fit(module: pl.LightningModule, datamodule: pl.LightningDataModule, epochs: int) -> dict[str, float]:
    trainer = pl.Trainer(max_epochs=epochs, **OPTIONS)
    trainer.fit(module, datamodule)
    return trainer.test(module, datamodule, verbose=False)[0]


class TestRegression:
    def test_a_quantized_model_learns(self) -> None:
        torch.manual_seed(0)
        data = a_graph()
        module = QuantizedNodeRegressor(qgnn.quantize_model(GCN(8, 32, 2, 1), bits=8), lr=0.02)
        spread = float((data.y - data.y[data.train_mask].mean())[data.test_mask].abs().mean())
        metrics = fit(module, NodeDataModule(data), 120)
        assert metrics["test_mae"] < 0.8 * spread
        assert metrics["test_rmse"] >= metrics["test_mae"]

    def test_loss_is_that_of_labels_and_teacher(self) -> None:
        data = a_graph()
        model, teacher = GCN(8, 4, 2, 2), GCN(8, 4, 2, 2)
        data.y = torch.stack([data.y, -data.y], dim=1)
        module = QuantizedNodeRegressor(model, loss="l1", teacher=teacher, distillation_weight=0.25)
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        out, soft, mask = model(data.x, data.edge_index), teacher(data.x, data.edge_index), data.train_mask
        expected = 0.75 * F.l1_loss(out[mask], data.y[mask]) + 0.25 * F.l1_loss(out, soft)
        torch.testing.assert_close(module.training_step(data, 0), expected)

    def test_graphs(self) -> None:
        graphs = [Data(x=torch.randn(n, 8), edge_index=torch.randint(n, (2, 9)), y=torch.randn(1, 2)) for n in (3, 5)]
        batch = Batch.from_data_list(graphs)
        module = QuantizedGraphRegressor(Pooled())
        assert module.predict_step(batch, 0).shape == (2, 2)
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        out = module.predict_step(batch, 0)
        torch.testing.assert_close(module._evaluate(out, batch, "val"), F.mse_loss(out, batch.y))

    def test_classes_are_refused_and_numbers_by_classifiers(self) -> None:
        data = a_graph()
        data.y = torch.zeros(60, dtype=torch.long)
        with pytest.raises(ValueError, match="QuantizedNodeClassifier"):
            QuantizedNodeRegressor(GCN(8, 4, 2, 1)).validation_step(data, 0)
        with pytest.raises(ValueError, match="QuantizedNodeRegressor"):
            QuantizedNodeClassifier(GCN(8, 4, 2, 2)).validation_step(a_graph(), 0)
        with pytest.raises(ValueError, match="QuantizedNodeRegressor"):
            QuantizedNodeClassifier(GCN(8, 4, 2, 1))

    def test_another_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"shape \[60\]"):
            QuantizedNodeRegressor(GCN(8, 4, 2, 3)).validation_step(a_graph(), 0)
        del (data := a_graph()).y
        with pytest.raises(ValueError, match="labels `y`"):
            QuantizedNodeRegressor(GCN(8, 4, 2, 1)).validation_step(data, 0)


class TestLinks:
    def test_a_quantized_encoder_learns_communities(self) -> None:
        torch.manual_seed(0)
        data = a_graph()
        data.x = torch.eye(60)
        splits = RandomLinkSplit(0.1, 0.2, is_undirected=True, add_negative_train_samples=False)(data)
        module = QuantizedLinkPredictor(qgnn.quantize_model(GCN(60, 32, 2, 16), bits=8), lr=0.02)
        assert fit(module, LinkDataModule(*splits), 40)["test_auc"] > 0.6

    def test_negatives_are_drawn_for_training_alone(self) -> None:
        data = a_graph()
        data.edge_label_index = data.edge_index[:, :20]
        seen: list[torch.Tensor] = []

        def decoder(z: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
            seen.append(pairs)
            return (z[pairs[0]] * z[pairs[1]]).sum(1)

        module = QuantizedLinkPredictor(GCN(8, 4, 2, 4), decoder=decoder)
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        module.training_step(data, 0)
        positive, drawn = seen[0][:, :20], seen[0][:, 20:]
        assert positive.equal(data.edge_label_index)
        edges = set(map(tuple, data.edge_index.t().tolist()))
        assert drawn.size(1) > 0
        assert not edges & set(map(tuple, drawn.t().tolist()))
        module.validation_step(data, 0)
        assert seen[1].equal(data.edge_label_index)
        assert "edge_label" not in data

    def test_what_is_no_pair_is_refused(self) -> None:
        module = QuantizedLinkPredictor(GCN(8, 4, 2, 4))
        with pytest.raises(ValueError, match="edge_label_index"):
            module.training_step(a_graph(), 0)
        with pytest.raises(ValueError, match="RandomLinkSplit"):
            LinkDataModule(a_graph())
        data = a_graph()
        data.edge_label_index, data.edge_label = data.edge_index[:, :4], torch.tensor([0, 1, 2, 1])
        with pytest.raises(ValueError, match="0 and 1"):
            module.validation_step(data, 0)


class TestSampled:
    def test_evaluation_is_that_of_the_whole_graph(self) -> None:
        torch.manual_seed(0)
        data = a_graph()
        data.y = torch.arange(60) % 2
        module = QuantizedNodeClassifier(qgnn.quantize_model(GraphSAGE(8, 8, 2, 2), bits=8))
        sampled = SampledNodeDataModule(data, [3, 3], batch_size=7)
        fit(module, sampled, 2)
        trainer = pl.Trainer(**OPTIONS)
        few = trainer.test(module, sampled, verbose=False)[0]["test_acc"]
        assert few == pytest.approx(trainer.test(module, NodeDataModule(data), verbose=False)[0]["test_acc"])

    def test_seeds_are_the_training_nodes_or_all(self) -> None:
        data = a_graph()
        for seeds, expected in (("train", int(data.train_mask.sum())), ("all", 60)):
            loader = SampledNodeDataModule(data, [2, 2], batch_size=8, seeds=seeds).train_dataloader()
            assert sum(batch.batch_size for batch in loader) == expected

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="'train' or 'all'"):
            SampledNodeDataModule(a_graph(), seeds="some")
        bare = copy.copy(a_graph())
        for name in ("train_mask", "val_mask", "test_mask"):
            del bare[name]
        with pytest.raises(ValueError, match="RandomNodeSplit"):
            SampledNodeDataModule(bare)
