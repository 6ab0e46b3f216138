"""The search for launch configurations, with made-up times: what it chooses, and the table it writes."""

import json
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from qgnn_plugin.kernels.triton import launch
from qgnn_plugin.kernels.triton.autotune import BUCKETS, candidates, main, tune, write_table
from qgnn_plugin.kernels.triton.launch import CONFIGS_ENV, Config, config_for, load_table, next_power_of_two, word_tile

CPU = torch.device("cpu")


@pytest.mark.parametrize("words", [1, 3, 4, 17, 64])
def test_candidates_can_be_launched(words: int) -> None:
    found = list(candidates(words))
    assert len(set(found)) == len(found) > 0
    for config in found:
        rows, width = word_tile(config, words)
        assert 1 <= rows <= launch.MAX_ROWS
        assert width == min(next_power_of_two(words), config.tile_words)


def test_the_fastest_candidate_is_chosen_then_its_registers() -> None:
    timed: list[Config] = []

    def timer(run: object) -> float:
        config = config_for("aggregate_max", CPU, 16)
        timed.append(config)
        if config.num_warps == 8:
            raise OutOfResources(1, 0, "threads")
        wanted = {"num_warps": 2, "words_per_thread": 2, "tile_words": 16, "unroll": 4, "max_registers": 96}
        return 1.0 + sum(getattr(config, name) != value for name, value in wanted.items())

    least, best = tune("aggregate_max", 16, lambda: None, timer)
    assert (least, best.num_warps, best.words_per_thread, best.tile_words) == (1.0, 2, 2, 16)
    assert (best.unroll, best.max_registers) == (4, 96)
    assert {c for c in timed if not c.max_registers} == set(candidates(16))
    assert config_for("aggregate_max", CPU, 16) not in timed  # nothing stays overridden


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
