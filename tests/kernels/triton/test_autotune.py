"""The search for launch configurations, with made-up times: what it chooses, and the table it writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import next_power_of_two
from qgnn_plugin.kernels.triton import launch
from qgnn_plugin.kernels.triton.autotune import (
    BUCKETS,
    SEARCH,
    _runs,
    entry,
    main,
    power_law_plan,
    tune,
    write_table,
)
from qgnn_plugin.kernels.triton.launch import CONFIGS_ENV, Config, config_for, load_table, word_tile

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", SEARCH)
def test_every_setting_can_be_launched(kernel: str) -> None:
    for setting, values in SEARCH[kernel].items():
        assert len(set(values)) == len(values) > 1
        for value in values:
            config = replace(Config(), **{setting: value})
            for words in (1, 3, 4, 17, 64):
                rows, width = word_tile(config, words)
                assert 1 <= rows <= launch.MAX_ROWS
                assert width == min(next_power_of_two(words), config.tile_words)


def test_the_table_holds_what_is_searched() -> None:
    """No kernel of the shipped table is left out of the search, and none is searched in vain."""
    shipped = load_table()["default"]
    assert set(SEARCH) == set(shipped)
    plan = power_law_plan(12, 40, CPU)
    with use_backend("interpret"):
        assert {name for name, run in _runs(plan, 2) if run() is not None} == set(SEARCH)


def test_settings_are_changed_for_as_long_as_that_helps() -> None:
    timed: list[Config] = []
    wanted = {"num_warps": 2, "words_per_thread": 2, "tile_words": 16, "unroll": 1, "max_registers": 96}

    def timer(run: object) -> float:
        config = config_for("aggregate_max", CPU, 16)
        timed.append(config)
        if config.num_warps == 8:
            raise OutOfResources(1, 0, "threads")
        return 1.0 + sum(getattr(config, name) != value for name, value in wanted.items())

    start = config_for("aggregate_max", CPU, 16)
    least, best = tune("aggregate_max", start, lambda: None, timer)
    assert least == 1.0
    assert {name: getattr(best, name) for name in wanted} == wanted
    assert best.segment == start.segment  # no gain in that
    assert timed[0] == start
    assert config_for("aggregate_max", CPU, 16) == start  # nothing stays overridden
    assert len(timed) < 40
    written = entry("aggregate_max", 16, best)
    assert Config(**{k: v for k, v in written.items() if k != "max_words"}) == best


def test_a_card_that_can_launch_nothing() -> None:
    def timer(run: object) -> float:
        raise OutOfResources(1, 0, "shared memory")

    with pytest.raises(RuntimeError, match="can launch"):
        tune("linear", Config(), lambda: None, timer)


def test_a_table_is_found_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"default": {"elementwise": [{"max_words": words, "num_warps": 2} for words in BUCKETS]}}
    path = tmp_path / "configs.json"
    write_table(path, {**load_table(), **mine})
    monkeypatch.setenv(CONFIGS_ENV, str(path))
    assert config_for("elementwise", CPU, 9) == Config(num_warps=2)
    before = path.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_table(path, {"default": object()})
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert set(json.loads(before)) == {"version", "architectures"}


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output", str(tmp_path / "configs.json")]) == 1
    assert "Expected a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
