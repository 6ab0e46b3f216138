"""Parameter groups, distillation, and a plain training loop that recovers accuracy."""

import pytest
import torch
import torch.nn.functional as F
from core.support import OUT, WIDTH, Plain
from torch import nn
from torch_geometric.nn import GCN
from torch_geometric.utils import stochastic_blockmodel_graph

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.training import distillation_loss, parameter_groups


def test_groups_hold_every_trained_parameter_once() -> None:
    qmodel = qgnn.quantize_model(Plain(), 4)
    qmodel.encoder.weight.requires_grad_(False)
    weights, ranges = parameter_groups(qmodel, lr=0.1, weight_decay=0.01, range_lr=0.05)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.01)
    assert (ranges["lr"], ranges["weight_decay"]) == (0.05, 0.0)
    listed = [id(p) for p in (*weights["params"], *ranges["params"])]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in qmodel.parameters() if p.requires_grad}
    assert {id(p) for p in ranges["params"]} == {id(p) for p in qgnn.range_parameters(qmodel)}
    torch.optim.Adam([weights, ranges])


def test_groups_of_plain_frozen_and_full_precision_models() -> None:
    assert len(parameter_groups(Plain(), lr=0.1)) == 1
    frozen = qgnn.quantize_model(Plain(), config=QuantConfig(learn_ranges=False))
    assert len(parameter_groups(frozen, lr=0.1)) == 1
    assert len(parameter_groups(qgnn.quantize_model(Plain(), 32), lr=0.1)) == 1
    assert parameter_groups(qgnn.quantize_model(Plain(), 4), lr=0.1)[1]["lr"] == 0.1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_has_the_gradient_of_the_divergence(temperature: float) -> None:
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    other = student.detach().clone().requires_grad_()
    teacher = torch.randn(6, 4, dtype=torch.float64)
    distillation_loss(student, teacher, temperature=temperature).backward()
    target = (teacher / temperature).softmax(1)
    divergence = F.kl_div((other / temperature).log_softmax(1), target, reduction="batchmean")
    (divergence * temperature**2).backward()
    torch.testing.assert_close(student.grad, other.grad)
    assert distillation_loss(teacher, teacher) == pytest.approx(
        float(-(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean())
    )


def test_distillation_checks_shapes() -> None:
    with pytest.raises(ValueError, match=r"teacher logits of shape \[3, 4\] \(got \[3, 5\]\)"):
        distillation_loss(torch.zeros(3, 4), torch.zeros(3, 5))


@pytest.mark.parametrize("bits", [2, 4])
def test_plain_loop_recovers_accuracy(bits: int) -> None:
    """Communities with noisy features: a float model, its conversion, the ordinary loop."""
    torch.manual_seed(0)
    sizes, classes = [60] * 3, 3
    edge_index = stochastic_blockmodel_graph(sizes, torch.full((3, 3), 0.01) + 0.1 * torch.eye(3))
    y = torch.arange(classes).repeat_interleave(60)
    x = F.one_hot(y, WIDTH).float() + 0.9 * torch.randn(180, WIDTH)
    train = torch.arange(180) % 6 == 0

    def fit(model: nn.Module, steps: int) -> float:
        optimizer = torch.optim.Adam(parameter_groups(model, lr=0.02, weight_decay=1e-3))
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x, edge_index)[train], y[train]).backward()
            optimizer.step()
            qgnn.differential_multiplier_step(model)
        prediction = model.eval()(x, edge_index).argmax(1)
        return float((prediction == y)[~train].float().mean())

    model = GCN(WIDTH, 16, 2, OUT)
    full = fit(model, 40)
    qmodel = qgnn.quantize_model(model, config=QuantConfig.accurate(bits))
    qgnn.calibrate(qmodel, (x, edge_index), method="ranges")
    before = {id(p): p.detach().clone() for p in qgnn.range_parameters(qmodel)}
    low = fit(qmodel, 40)
    assert full > 0.85
    assert low > full - 0.05
    assert any(not torch.equal(before[id(p)], p) for p in qgnn.range_parameters(qmodel))
