"""Weights whose codes oscillate are held in the middle of a level; others are not touched."""

import itertools

import pytest
import torch
from test_recipe import SHORT, _data
from torch_geometric.nn import GCN, FiLMConv, Linear, RGCNConv

import qgnn_plugin as qgnn
from qgnn_plugin.freezing import OscillationFreezing
from qgnn_plugin.matching import weight_sites
from qgnn_plugin.recipe import Recipe, Stage, fit_quantized


class Weight:
    """A linear layer of two bits, whose weights are put where a test wants them, in steps above the lower end."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = qgnn.quantize_model(torch.nn.Sequential(Linear(4, 2, bias=False)), 2)
        qgnn.calibrate(self.layer, (torch.randn(8, 4),), method="ranges")
        (self.site,) = weight_sites(self.layer)
        self.weight = self.layer[0].weight

    def steps(self) -> torch.Tensor:
        scale, lower = self.site.quantizer.range()
        return (self.weight.detach() - lower.detach().unsqueeze(1)) / scale.detach().unsqueeze(1)

    @torch.no_grad()
    def put(self, steps: torch.Tensor) -> None:
        scale, lower = self.site.quantizer.range()
        self.weight.copy_(steps * scale.unsqueeze(1) + lower.unsqueeze(1))


def test_what_oscillates_is_held_at_the_code_that_it_has_most() -> None:
    """One weight is at code 1 once in three steps and at 2 else, always near the threshold; one rises, others
    stay."""
    weight = Weight()
    weight.put(torch.full((2, 4), 1.51))
    freezing = OscillationFreezing(weight.layer, 60)
    for step in range(60):
        if freezing.frozen():
            break
        steps = torch.full((2, 4), 1.6)
        steps[0, 0] = 1.49 if step % 3 == 0 else 1.51
        steps[1, 1] = min(3.0, 1.6 + step / 4)
        weight.put(steps)
        freezing.step()
    assert freezing.frozen() == 1
    assert weight.steps()[0, 0] == pytest.approx(weight.site.codes()[0, 0].item(), abs=1e-5)
    assert weight.site.codes()[0, 0] == 2
    others = torch.ones(2, 4, dtype=torch.bool)
    others[0, 0] = False
    torch.testing.assert_close(weight.steps()[others], steps[others])
    # What is held goes with its range, wherever the optimizer would have it.
    code = weight.site.codes()[0, 0].item()
    with torch.no_grad():
        weight.site.quantizer.log_scale += 0.3
    weight.put(steps + 1)
    freezing.step()
    assert weight.steps()[0, 0] == pytest.approx(code, abs=1e-5)
    torch.testing.assert_close(weight.steps()[others], steps[others] + 1)


def test_a_code_that_goes_one_way_does_not_oscillate() -> None:
    weight = Weight()
    weight.put(torch.zeros(2, 4))
    freezing = OscillationFreezing(weight.layer, 40)
    for step in range(40):
        weight.put(torch.full((2, 4), step / 10))
        freezing.step()
    assert freezing.frozen() == 0


class Net(torch.nn.Module):
    """Weights that layers arrange in their own ways before they are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.conv, self.film = Linear(3, 4), RGCNConv(4, 5, 2), FiLMConv(5, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, edge_type: torch.Tensor) -> torch.Tensor:
        return self.film(self.conv(self.lin(x), edge_index, edge_type), edge_index)


def test_weights_that_are_arranged_can_be_held() -> None:
    torch.manual_seed(0)
    args = (torch.randn(9, 3), torch.randint(9, (2, 30)), torch.arange(30) % 2)
    qmodel = qgnn.quantize_model(Net(), 2)
    qgnn.calibrate(qmodel, [args], forward=lambda model, batch: model(*batch), method="ranges")
    sites = [site.site for site in OscillationFreezing(qmodel, 10)._sites]
    assert {site.layer._qualified_name for site in sites} >= {"lin", "conv"}
    for site in sites:
        wanted = (site.codes() + 1) % 4
        where = torch.rand(wanted.shape) < 0.5
        expected = torch.where(where, wanted, site.codes())
        site.hold(wanted, where)
        assert torch.equal(site.codes(), expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_two_bits_freeze_what_oscillates(bits: int) -> None:
    """Late in training no code of theirs turns back more than once; of four bits, and without freezing, some do."""

    def turns(freeze: bool) -> int:
        torch.manual_seed(0)
        model, data, seen = GCN(3, 8, 2, 3).eval(), _data(), []
        stage = Stage(80, lr=0.03, evaluate_every=80)
        recipe = Recipe(SHORT.float_stage, stage, matching_steps=0, retry=0, freeze=freeze)
        fit_quantized(
            model, data, bits, recipe=recipe,
            on_epoch=lambda q, *_: seen.append(torch.cat([s.codes().detach().flatten() for s in weight_sites(q)])),
        )  # fmt: skip
        changes = [[sign for sign in signs if sign] for signs in torch.stack(seen[50:]).diff(dim=0).sign().t().tolist()]
        return max(sum(a != b for a, b in itertools.pairwise(c)) for c in changes)

    assert turns(False) > 1
    assert turns(True) == (turns(False) if bits == 4 else 1)
