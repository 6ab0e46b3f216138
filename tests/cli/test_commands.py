"""Every command runs, writes what it says, and answers with the exit code that it documents."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.analysis.history import History
from qgnn_plugin.cli import commands, main
from qgnn_plugin.cli.loading import expect_writable
from qgnn_plugin.cli.parser import COMMANDS
from qgnn_plugin.data import load_dataset

Run = Callable[..., tuple[int, str, str]]


def arguments(name: str, graph: Path, trained: Path, out: Path) -> list[object]:
    """A short run of every command."""
    floats, converted = trained / "checkpoints" / "GCN-float.pt", trained / "checkpoints" / "GCN-4bit.pt"
    data = ["--dataset", graph]
    return {
        "train": ["--hidden", 8, "--epochs", 2, "--bits", 8, 2, *data],
        "quantize": [floats, "--bits", 2, "--out", out / "q.safetensors", *data],
        "pack": [converted, "--out", out / "p.safetensors"],
        "evaluate": [trained / "GCN-4bit.safetensors", *data],
        "bench": [floats, "--seconds", 0.01, "--bits", 4, *data],
        "inspect": [trained / "GCN-4bit.safetensors"],
        "report": [converted, "--out", out / "r.html", "--history", trained / "logs" / "GCN-4bit.csv", *data],
        "suggest": [floats, "--max_bytes", 4000, "--out", out / "s.yaml", *data],
    }[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs(name: str, run: Run, graph: Path, trained: Path, tmp_path: Path) -> None:
    code, out, err = run(name, *arguments(name, graph, trained, tmp_path))
    assert code == 0, err
    assert out


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(name: str, run: Run) -> None:
    code, out, _ = run(*([name] if name else []), "--help")
    assert code == 0
    assert "usage: qgnn" in out
    if name:
        assert "--config" in out
        assert COMMANDS[name].help.split()[0] in out
    else:
        assert all(command in out for command in COMMANDS)
        assert "Exit codes: 0 done; 1" in out


@pytest.mark.parametrize("module", ["qgnn_plugin", "qgnn_plugin.cli"])
@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["inspect", "no-such.safetensors"], 1), (["no-such"], 2)])
def test_python_m(
    module: str, argv: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m`` is the command, with its exit codes."""
    monkeypatch.setattr(sys, "argv", ["-m", *argv])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert exited.value.code == code
    assert "qgnn" in "".join(capsys.readouterr())


def test_train_writes_packed_models_that_need_nothing_else(trained: Path, graph: Path, run: Run) -> None:
    """The file is of the size that the table says, and the command line reads it without being told the model."""
    path = trained / "GCN-4bit.safetensors"
    data = load_dataset(str(graph))
    packed = qgnn.load_packed(path, GCN(12, 8, 2, 3))
    assert path.stat().st_size < 2 * qgnn.packed_bytes(packed).packed + 5000
    code, out, _ = run("evaluate", path, "--dataset", graph)
    assert code == 0
    found = packed(data.x, data.edge_index).argmax(1)[data.test_mask] == data.y[data.test_mask]
    assert f"test: {float(found.float().mean()):.4f}" in out
    # What is packed is what was trained.
    state = torch.load(trained / "checkpoints" / "GCN-4bit.pt", weights_only=True)["state_dict"]
    qmodel = qgnn.quantize_like(GCN(12, 8, 2, 3), state)
    qmodel.load_state_dict(state)
    assert torch.equal(qgnn.pack_model(qmodel)(data.x, data.edge_index), packed(data.x, data.edge_index))


def test_train_logs_ranges_of_every_epoch(trained: Path) -> None:
    history = History.load(trained / "logs" / "GCN-4bit.csv")
    low = history.with_prefix("qgnn/low/")
    assert set(low) == set(history.with_prefix("qgnn/high/"))
    assert low["convs.0.message"].steps == [1, 2, 3, 4]
    assert set(history.with_prefix("qgnn/lambda/")) == {"convs.0", "convs.1"}


def test_a_run_can_be_repeated_from_its_configuration(trained: Path, run: Run, tmp_path: Path) -> None:
    code, *_ = run("train", "--config", trained / "train.yaml", "--out", tmp_path)
    assert code == 0
    first, second = (folder / "checkpoints" / "GCN-4bit.pt" for folder in (trained, tmp_path))
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (first, second)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_post_training_is_calibration(trained: Path, graph: Path, run: Run, tmp_path: Path) -> None:
    floats = trained / "checkpoints" / "GCN-float.pt"
    assert run("quantize", floats, "--bits", 8, "--dataset", graph, "--out", tmp_path / "q.safetensors")[0] == 0
    data = load_dataset(str(graph))
    model = GCN(12, 8, 2, 3)
    model.load_state_dict(torch.load(floats, weights_only=True)["state_dict"])
    expected = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(model, bits=8), data))
    packed = qgnn.load_packed(tmp_path / "q.safetensors", model)
    assert torch.equal(packed(data.x, data.edge_index), expected(data.x, data.edge_index))


def test_quantize_to_a_checkpoint_and_pack_it(trained: Path, graph: Path, run: Run, tmp_path: Path) -> None:
    floats = trained / "checkpoints" / "GCN-float.pt"
    quant = ("--quant.bits", 8, "--quant.granularity", "channel")
    assert run("quantize", floats, *quant, "--dataset", graph, "--out", tmp_path / "q.pt")[0] == 0
    assert run("pack", tmp_path / "q.pt", "--out", tmp_path / "a.safetensors")[0] == 0
    assert run("quantize", floats, *quant, "--dataset", graph, "--out", tmp_path / "b.safetensors")[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_state_dicts_and_lightning_checkpoints_are_read(graph: Path, run: Run, tmp_path: Path) -> None:
    model = GCN(12, 8, 2, 3)
    state = model.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    lightning = {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(lightning, tmp_path / "lightning.ckpt")
    named = ("--model", "GCN", "--hidden", 8, "--dataset", graph)
    printed = [run("evaluate", tmp_path / name, *named) for name in ("plain.pt", "lightning.ckpt")]
    assert [code for code, *_ in printed] == [0, 0]
    assert printed[0][1] == printed[1][1]
    code, _, err = run("evaluate", tmp_path / "plain.pt", "--dataset", graph)
    assert code == 1
    assert "does not say which model it is of; pass --model" in err


def test_numbers_to_predict(run: Run, tmp_path: Path) -> None:
    """The whole way with float labels: training lowers the error of both, which is what the table and evaluate show."""
    generator = torch.Generator().manual_seed(0)
    x, edges = torch.rand(90, 6, generator=generator), torch.randint(90, (2, 300), generator=generator)
    torch.save(Data(x=x, edge_index=edges, y=4 * x[:, 0] - 2 * x[:, 1]), tmp_path / "numbers.pt")
    data = ("--dataset", tmp_path / "numbers.pt")
    options = ("--model", "GraphSAGE", "--hidden", 8, "--dropout", 0, "--epochs", 100, "--bits", 8)
    code, out, err = run("train", *options, *data, "--out", tmp_path / "models")
    assert code == 0, err
    assert "val -MSE" in out
    y = load_dataset(str(tmp_path / "numbers.pt")).y
    spread = float(y.var())
    for name in ("checkpoints/GraphSAGE-float.pt", "GraphSAGE-8bit.safetensors"):
        code, out, _ = run("evaluate", tmp_path / "models" / name, *data)
        assert code == 0
        assert -spread / 4 < float(out.split("train: ")[1].split()[0]) < 0


def test_missed_targets_exit_with_3(trained: Path, graph: Path, run: Run) -> None:
    path = trained / "GCN-4bit.safetensors"
    assert run("evaluate", path, "--dataset", graph, "--min_accuracy", 0.0)[0] == 0
    perfect = run("evaluate", path, "--dataset", graph, "--min_accuracy", 1.0)
    accuracy = float(perfect[1].split("test: ")[1].split()[0])
    assert perfect[0] == (0 if accuracy == 1 else 3)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (["train", "--layers", 0], "layers"),
        (["train", "--bits", 3], "bits"),
        (["train", "--hidden", -1], "hidden"),
        (["train", "--dropout", 2], "dropout"),
        (["train", "--quant.bits", 3], "one of 1, 2, 4, 8 or 32"),
        (["train", "--nothing"], "nothing"),
        (["quantize", "x.pt"], "out"),
        (["nothing"], "nothing"),
        ([], "subcommand|command"),
    ],
)
def test_wrong_usage_exits_with_2(wrong: list[object], match: str, run: Run) -> None:
    code, _, err = run(*wrong)
    assert code == 2
    assert re.search(match, err)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (["train", "--dataset", "Coar"], "Did you mean 'Cora'"),
        (["train", "--model", "GNC"], "or 'GCN'"),
        (["train", "--model", "no.such.Model"], "import at 'no.such.Model'"),
        (["train", "--model", "torch_geometric.data.Data"], "a class of models"),
        (["train", "--report"], "pass --out"),
        (["inspect", "nothing.safetensors"], "got nothing"),
        (["evaluate", "nothing.pt"], "got nothing"),
        (["pack", "nothing.pt", "--out", "x.bin"], "ends in .safetensors"),
    ],
)
def test_what_is_not_as_expected_exits_with_1(wrong: list[object], match: str, run: Run) -> None:
    code, _, err = run(*wrong)
    assert code == 1
    assert match in err
    assert err.startswith("qgnn: ")


@pytest.mark.parametrize("name", ["train", "quantize", "report", "suggest"])
def test_out_is_checked_before_anything_is_read(
    name: str, run: Run, trained: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that cannot be written is an error at once, not after an hour."""
    (tmp_path / "file").touch()
    suffix = {"quantize": ".pt", "report": ".html", "suggest": ".yaml"}.get(name, "")
    monkeypatch.setattr(commands, "load_data", lambda options: pytest.fail("data were read first"))
    given = [a for a in arguments(name, graph, trained, tmp_path) if a not in ("--out", tmp_path / "r.html")]
    given = [a for a in given if not (isinstance(a, Path) and a.parent == tmp_path)]
    code, _, err = run(name, *given, "--out", tmp_path / "file" / f"x{suffix}")
    assert code == 1
    assert "a folder that files can be written to" in err


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="the name of a file"):
        expect_writable(tmp_path)


def test_interrupted_runs_leave_no_half_written_file(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while a checkpoint is being written."""

    def interrupted(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    out = tmp_path / "out"
    assert main(["train", "--dataset", str(graph), "--epochs", "1", "--bits", "4", "--out", str(out)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"train.yaml"}


def test_print_config_is_a_configuration(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("train", "--hidden", 5, "--quant.bits", 2, "--print_config")
    assert code == 0
    (tmp_path / "c.yaml").write_text(out)
    again = run("train", "--config", tmp_path / "c.yaml", "--print_config")
    assert again == (0, out, "")
    assert "hidden: 5" in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, run: Run) -> None:
    code, out, _ = run("--print_completion", f"shtab-{shell}")
    assert code == 0
    assert "quantize" in out
    assert "hidden" in out
