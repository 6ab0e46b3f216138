"""Widths under a budget: what is chosen, that it is within the budget, and that what is measured is the real model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from graphs import power_law
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GCN, GCNConv

import qgnn_plugin as qgnn
from qgnn_plugin.analysis.sensitivity import WIDTHS, Budget, _path, _Search, suggest_bits
from qgnn_plugin.conversion.converted import quantizers

NODES = 80


def _data() -> Data:
    x = torch.randn(NODES, 12)
    mask = torch.arange(NODES) % 2 == 0
    return Data(x=x, edge_index=power_law(NODES, 400).edge_index, y=torch.arange(NODES) % 3, val_mask=mask)


class Branches(nn.Module):
    """Two branches, of which one hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.strong, self.weak = GCNConv(12, 3), GCNConv(12, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return 5 * self.strong(x, edge_index) + 1e-4 * self.weak(x, edge_index)


def test_what_hardly_matters_gets_narrow_first() -> None:
    data, model = _data(), Branches()
    everything = suggest_bits(model, data, budget=10**9)
    # All but the branch that matters at 2 bits: room for that one at 8.
    weak = {name for name in everything.chosen.widths if name.startswith("weak")}
    limit = everything.uniform[8].bytes - 1
    widths = suggest_bits(model, data, budget=limit).chosen.widths
    assert min(widths[name] for name in widths if name not in weak) == 8
    assert {widths[name] for name in weak} != {8}


def test_bytes_stay_within_the_budget() -> None:
    data, model = _data(), GCN(12, 16, 2, 3)
    all_of_it = suggest_bits(model, data, budget=10**9)
    ends = all_of_it.uniform
    assert set(all_of_it.chosen.widths.values()) == {8}
    limit = (ends[2].bytes + ends[8].bytes) // 2
    found = suggest_bits(model, data, budget=limit)
    assert found.meets_budget
    assert found.chosen.bytes <= limit
    better = [choice for choice in found.frontier if choice.bytes <= limit and choice.loss < found.chosen.loss]
    assert not better  # nothing that was measured and fits loses less
    nothing = suggest_bits(model, data, budget=ends[2].bytes - 1)
    assert not nothing.meets_budget
    assert nothing.chosen.bytes == ends[2].bytes


def test_accuracy_stays_within_the_budget() -> None:
    data, model = _data(), GCN(12, 16, 2, 3)
    free = suggest_bits(model, data, budget=Budget(drop=1.0))
    assert free.meets_budget
    assert free.chosen.bytes == free.uniform[2].bytes
    strict = suggest_bits(model, data, budget=Budget(drop=0.02))
    assert strict.meets_budget == (strict.chosen.accuracy >= strict.float_accuracy - 0.02)
    assert strict.chosen.bytes >= free.chosen.bytes


def test_time_is_measured_on_the_packed_model() -> None:
    found = suggest_bits(GCN(12, 8, 2, 3), _data(), budget=Budget(seconds=1000))
    assert found.meets_budget
    assert found.measured_seconds is not None
    assert 0 < found.measured_seconds < 1000


@pytest.mark.parametrize("options", [{}, {"granularity": "row", "message_levels": "half"}])
def test_what_is_measured_is_the_calibrated_model(options: dict[str, str]) -> None:
    """Ranges that are put together from models of one width are those that calibration finds for the mixture."""
    data, model = _data(), GCN(12, 16, 2, 3).eval()
    search = _Search(model, data, qgnn.QuantConfig(**options), Budget(bytes=0), progress=False)
    widths = tuple(WIDTHS[i % 3] for i in range(len(search.sites)))
    mixed = search._mixed(widths)
    calibrated = qgnn.calibrate(
        qgnn.quantize_model(model, config=search._config(widths)), data, method="ranges"
    ).eval()
    assert torch.equal(mixed(data.x, data.edge_index), calibrated(data.x, data.edge_index))
    wanted = {site.name: width for site, width in zip(search.sites, widths, strict=True)}
    assert {name.removesuffix("_quantizer"): q.bits for name, q in quantizers(calibrated).items()} == wanted


def test_bytes_are_those_of_packed_words() -> None:
    data, model = _data(), GCN(12, 20, 2, 3).eval()
    search = _Search(model, data, qgnn.QuantConfig(), Budget(bytes=0), progress=False)
    sizes = {site.name: site for site in search.sites}
    for bits in WIDTHS:
        packed = qgnn.pack_model(search.ranges[bits])
        for i in (0, 1):
            words = packed.state_dict()[f"convs.{i}.lin.words"]
            assert sizes[f"convs.{i}.lin.weight"].bytes(bits) == words.numel() * 4
        assert sizes["convs.0.message"].bytes(bits) == NODES * 4 * -(-20 * bits // 32)


def test_exact_inputs_are_left_out_and_the_model_alone() -> None:
    data, model = _data(), GCN(12, 8, 2, 3)
    data.x = (data.x > 0).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = suggest_bits(model, data, budget=10**9).chosen.widths
    assert not qgnn.is_quantized(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "convs.0.lin.input" not in names
    assert "convs.1.lin.input" in names


def test_paths_are_optimal_where_losses_add_up() -> None:
    """Against all choices: none that costs as little as a point of the path loses less."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 50, (4,), generator=generator).tolist()
        losses = [[0.0, *sorted(torch.rand(2, generator=generator).tolist())] for _ in sizes]
        costs = [[8.0 * size, 4.0 * size, 2.0 * size] for size in sizes]
        path = _path(losses, costs)
        assert path[0] == (8,) * 4
        assert path[-1] == (2,) * 4

        def total(table: list[list[float]], widths: tuple[int, ...]) -> float:
            return sum(row[WIDTHS.index(width)] for row, width in zip(table, widths, strict=True))

        for point in path:
            for other in itertools.product(WIDTHS, repeat=4):
                if total(costs, other) <= total(costs, point):
                    assert total(losses, other) >= total(losses, point) - 1e-12


def test_saved_and_drawn(tmp_path: Path) -> None:
    data, model = _data(), GCN(12, 16, 2, 3)
    # Widths that were chosen before are no part of the question.
    config = qgnn.QuantConfig(weight_bits=2, overrides={"convs.0": {"granularity": "node", "message_bits": 2}})
    found = suggest_bits(model, data, budget=4000, config=config)
    found.save(tmp_path / "c.yaml")
    read = qgnn.QuantConfig.from_dict(yaml.safe_load((tmp_path / "c.yaml").read_text()))
    assert read == found.config
    assert read.for_layer("convs.0").granularity == "node"
    qmodel = qgnn.quantize_model(model, config=read)
    bits = {name.removesuffix("_quantizer"): q.bits for name, q in quantizers(qmodel).items()}
    assert {name: bits[name] for name in found.chosen.widths} == dict(found.chosen.widths)
    found.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "loss at 2" in str(found)


@pytest.mark.parametrize("wrong", [{}, {"bytes": 1, "drop": 0.1}, {"bytes": -1}, {"seconds": float("nan")}])
def test_budgets_are_one_number(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"(a|one) budget"):
        Budget(**wrong)  # type: ignore[arg-type]


def test_converted_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a float model .*restore_model"):
        suggest_bits(qgnn.quantize_model(GCN(12, 8, 2, 3)), _data(), budget=1)
