"""The LightningModules: which nodes and labels count, the teacher, schedules and errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader as GraphLoader
from torch_geometric.nn import GCN, GCNConv, global_mean_pool

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import (
    NodeDataModule,
    QuantizedGraphClassifier,
    QuantizedNodeClassifier,
)


def make_gcn(dropout: float = 0.0) -> GCN:
    return GCN(16, 8, num_layers=2, out_channels=3, dropout=dropout)


def first(batches):
    return batches[0]


def seeds(data: Data, count: int) -> Data:
    """``data`` as a neighbour sampler would give it, its first nodes being the seeds."""
    batch = copy.copy(data)
    batch.batch_size = count
    return batch


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.model(*args, **kwargs)


class Pooled(nn.Module):
    """A graph classifier with an ordinary PyG signature."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = GCNConv(16, 8), nn.Linear(8, 2)

    def forward(self, x, edge_index, batch, edge_weight=None, batch_size=None):
        x = self.conv(x, edge_index, edge_weight).relu()
        return self.lin(global_mean_pool(x, batch, batch_size))


class TestWhatCounts:
    def test_accuracies_are_those_of_the_masks(self, sbm, make_trainer):
        module = QuantizedNodeClassifier(qgnn.quantize_model(make_gcn(), bits=8))
        trainer = make_trainer(max_epochs=5)
        trainer.fit(module, datamodule=NodeDataModule(sbm))
        (test,) = trainer.test(module, datamodule=NodeDataModule(sbm), verbose=False)
        right = module.model.eval()(sbm.x, sbm.edge_index).argmax(1) == sbm.y
        assert test["test_acc"] == pytest.approx(float(right[sbm.test_mask].float().mean()))
        val_acc = float(trainer.validate(module, NodeDataModule(sbm), verbose=False)[0]["val_acc"])
        assert val_acc == pytest.approx(float(right[sbm.val_mask].float().mean()))

    @pytest.mark.parametrize("mask", [False, True])
    def test_only_the_seeds_of_a_sampled_batch_count(self, sbm, mask):
        module = QuantizedNodeClassifier(make_gcn())
        batch = seeds(sbm, 30)
        if not mask:
            del batch.train_mask
        logits = module(sbm.x, sbm.edge_index)[:30]
        rows = sbm.train_mask[:30] if mask else slice(None)
        expected = F.cross_entropy(logits[rows], sbm.y[:30][rows])
        torch.testing.assert_close(module.training_step(batch, 0), expected)
        assert module.predict_step(batch, 0).shape == (30, 3)

    def test_a_sampled_batch_without_labelled_seeds_adds_nothing(self, sbm):
        module = QuantizedNodeClassifier(make_gcn())
        sbm.train_mask[:30] = False
        loss = module.training_step(seeds(sbm, 30), 0)
        loss.backward()
        assert loss == 0
        assert all(torch.all(p.grad == 0) for p in module.parameters())

    def test_all_nodes_of_collated_graphs_count(self, make_sbm):
        graphs = [make_sbm(seed) for seed in range(2)]
        for graph in graphs:
            del graph.train_mask, graph.val_mask, graph.test_mask
        batch = Batch.from_data_list(graphs)  # its `batch_size` is the number of graphs
        module = QuantizedNodeClassifier(make_gcn())
        expected = F.cross_entropy(module(batch.x, batch.edge_index), batch.y)
        torch.testing.assert_close(module.training_step(batch, 0), expected)

    def test_mini_batches_train_a_quantized_model(self, make_sbm, make_trainer):
        batches = [seeds(make_sbm(seed), 60) for seed in range(3)]
        module = QuantizedNodeClassifier(qgnn.quantize_model(make_gcn(), bits=4), teacher=make_gcn())
        trainer = make_trainer(max_epochs=10)
        loader = DataLoader(batches, batch_size=1, collate_fn=first, shuffle=True)
        trainer.fit(module, loader, DataLoader(batches, collate_fn=first))
        assert trainer.global_step == 30
        assert trainer.callback_metrics["train_acc"] > 0.5


class TestInputs:
    def test_edge_weights_reach_a_model_that_takes_them(self, sbm):
        sbm.edge_weight = torch.rand(sbm.num_edges)
        sbm.edge_attr = torch.rand(sbm.num_edges, 2)
        model = make_gcn()
        args, kwargs = QuantizedNodeClassifier(model).model_inputs(sbm)
        assert args == (sbm.x, sbm.edge_index)
        assert kwargs.keys() == {"edge_weight", "edge_attr"}

        class Plain(nn.Module):
            def forward(self, features, edges):
                return features

        assert QuantizedNodeClassifier(Plain(), 16).model_inputs(sbm)[1] == {}

    def test_another_choice_of_fields_is_an_override(self, sbm):
        class Squared(QuantizedNodeClassifier):
            def model_inputs(self, batch):
                return (batch.x.square(), batch.edge_index), {}

        module = Squared(make_gcn())
        expected = module.model(sbm.x.square(), sbm.edge_index)
        assert torch.equal(module.predict_step(sbm, 0), expected)


class TestTeacher:
    def test_is_neither_saved_nor_trained_nor_counted(self, sbm, make_trainer):
        teacher, model = make_gcn(), qgnn.quantize_model(make_gcn(), bits=4)
        before = copy.deepcopy(teacher.state_dict())
        module = QuantizedNodeClassifier(model, teacher=teacher.train())
        assert module.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
        trainer = make_trainer()
        trainer.fit(module, datamodule=NodeDataModule(sbm))
        trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert trained == {id(p) for p in model.parameters()}
        assert all(p.grad is None for p in teacher.parameters())
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, before[name])

    def test_runs_once_on_a_constant_graph(self, sbm, make_trainer):
        teacher = Counting(make_gcn())
        module = QuantizedNodeClassifier(make_gcn(), teacher=teacher)
        make_trainer(max_epochs=5).fit(module, datamodule=NodeDataModule(sbm))
        assert teacher.calls == 1

    def test_runs_again_on_other_or_modified_inputs(self, sbm, make_sbm):
        teacher = Counting(make_gcn())
        module = QuantizedNodeClassifier(make_gcn(), teacher=teacher)
        module.training_step(sbm, 0)
        module.training_step(sbm, 0)
        assert teacher.calls == 1
        sbm.x.mul_(2)
        module.training_step(sbm, 0)
        assert teacher.calls == 2
        module.training_step(make_sbm(1), 0)
        assert teacher.calls == 3
        for _ in range(2):
            module.training_step(seeds(sbm, 30), 0)
        assert teacher.calls == 5

    def test_loss_is_cross_entropy_plus_weighted_soft_labels(self, sbm):
        teacher, model = make_gcn(), make_gcn()
        module = QuantizedNodeClassifier(model, teacher=teacher, distillation_weight=0.25, temperature=2.0)
        logits, soft = model(sbm.x, sbm.edge_index), teacher.eval()(sbm.x, sbm.edge_index)
        hard = F.cross_entropy(logits[sbm.train_mask], sbm.y[sbm.train_mask])
        cross = -(F.softmax(soft / 2, 1) * F.log_softmax(logits / 2, 1)).sum(1).mean() * 4
        torch.testing.assert_close(module.training_step(sbm, 0), 0.75 * hard + 0.25 * cross)

    def test_that_shares_parameters_is_refused(self):
        model = make_gcn()
        with pytest.raises(ValueError, match="deepcopy"):
            QuantizedNodeClassifier(model, teacher=model)

    def test_labels_outside_the_training_nodes_change_nothing(self, sbm, make_trainer):
        trained = []
        for poisoned in (False, True):
            data = copy.copy(sbm)
            if poisoned:
                data.y = torch.where(data.train_mask, data.y, (data.y + 1) % 3)
            torch.manual_seed(1)
            teacher, model = make_gcn(), make_gcn(dropout=0.5)
            module = QuantizedNodeClassifier(qgnn.quantize_model(model, bits=2), teacher=teacher)
            make_trainer(max_epochs=5).fit(module, datamodule=NodeDataModule(data))
            trained.append(module.state_dict())
        for name, value in trained[0].items():
            assert torch.equal(value, trained[1][name]), name


class TestTraining:
    def test_a_model_in_eval_mode_is_trained(self, sbm, make_trainer):
        model = make_gcn().eval()
        module = QuantizedNodeClassifier(model)
        make_trainer(max_epochs=1).fit(module, datamodule=NodeDataModule(sbm))
        assert model.training

    def test_a_partly_frozen_model_keeps_its_modes(self, sbm, make_trainer):
        model = make_gcn()
        model.convs[0].eval()
        module = QuantizedNodeClassifier(model)
        make_trainer(max_epochs=1).fit(module, datamodule=NodeDataModule(sbm))
        assert model.training
        assert not model.convs[0].training

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_cosine_ends_at_the_last_step(self, sbm, make_trainer, accumulate):
        trainer = make_trainer(max_epochs=4, accumulate_grad_batches=accumulate)
        loader = DataLoader([sbm] * 4, batch_size=1, collate_fn=first)
        trainer.fit(QuantizedNodeClassifier(make_gcn()), loader)
        assert trainer.global_step == 16 // accumulate
        for group in trainer.optimizers[0].param_groups:
            assert group["lr"] == pytest.approx(0, abs=1e-9)

    def test_no_schedule_is_a_constant_rate(self, sbm, make_trainer):
        trainer = make_trainer(max_epochs=-1, max_steps=4)
        module = QuantizedNodeClassifier(make_gcn(), lr=0.3, schedule=None)
        trainer.fit(module, datamodule=NodeDataModule(sbm))
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.3

    def test_cosine_without_an_end_is_refused(self, sbm, make_trainer):
        module = QuantizedNodeClassifier(make_gcn())
        with pytest.raises(MisconfigurationException, match="schedule=None"):
            make_trainer(max_epochs=-1).fit(module, datamodule=NodeDataModule(sbm))

    def test_load_from_checkpoint(self, sbm, make_trainer, tmp_path):
        module = QuantizedNodeClassifier(qgnn.quantize_model(make_gcn(), bits=4), lr=0.03)
        trainer = make_trainer()
        trainer.fit(module, datamodule=NodeDataModule(sbm))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        loaded = QuantizedNodeClassifier.load_from_checkpoint(
            tmp_path / "last.ckpt", model=qgnn.quantize_model(make_gcn(), bits=4)
        )
        assert loaded.lr == 0.03
        module.eval(), loaded.eval()
        assert torch.equal(module.predict_step(sbm, 0), loaded.predict_step(sbm, 0))


class TestGraphs:
    def test_trains_on_batches_of_graphs(self, make_sbm, make_trainer):
        graphs = []
        for seed in range(12):
            graph = make_sbm(seed, per_class=5)
            graph.y = torch.tensor([seed % 2])
            graph.x = graph.x + 2.0 * graph.y
            graphs.append(graph)
        model = qgnn.quantize_model(Pooled(), bits=4)
        module = QuantizedGraphClassifier(model, 2, lr=0.05, teacher=Pooled(), distillation_weight=0)
        trainer = make_trainer(max_epochs=30)
        trainer.fit(module, GraphLoader(graphs, batch_size=6, shuffle=True), GraphLoader(graphs))
        assert trainer.callback_metrics["val_acc"] >= 0.9
        batch = Batch.from_data_list(graphs[:3])
        assert module.predict_step(batch, 0).shape == (3, 2)

    def test_node_logits_for_graph_labels_are_refused(self, make_sbm):
        graph = make_sbm()
        graph.y = torch.tensor([1])
        module = QuantizedGraphClassifier(make_gcn())
        with pytest.raises(ValueError, match=r"logits of shape \[1, 3\]"):
            module.training_step(Batch.from_data_list([graph]), 0)


class TestErrors:
    def test_unknown_number_of_classes(self):
        with pytest.raises(ValueError, match="pass num_classes="):
            QuantizedNodeClassifier(nn.Linear(3, 3))

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"distillation_weight": 1.5}, {"schedule": "linear"}])
    def test_options_out_of_range(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            QuantizedNodeClassifier(make_gcn(), **options)

    def test_several_splits(self, sbm):
        sbm.train_mask = sbm.train_mask.unsqueeze(1).repeat(1, 3)
        with pytest.raises(ValueError, match="split=0"):
            QuantizedNodeClassifier(make_gcn()).training_step(sbm, 0)

    def test_labels_of_another_kind(self, sbm):
        sbm.y = torch.rand(sbm.num_nodes, 3)
        with pytest.raises(ValueError, match="integer labels"):
            QuantizedNodeClassifier(make_gcn()).training_step(sbm, 0)
