"""The demo graph: read from a wheel, never installed."""

import io
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from qgnn_plugin.data import cora, load_dataset, load_demo_cora

WHEEL = "graphdatascience-2.2-py3-none-any.whl"


def _write_wheel(folder: Path, papers: int = 4) -> None:
    """A wheel of the same layout with a tiny graph."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    ids = [30, 10, 20, 40][:papers]
    nodes = {
        "nodeId": ids,
        "labels": ["Paper"] * papers,
        "subject": [0, 1, 0, 1][:papers],
        "features": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]][:papers],
    }
    citations = {
        "sourceNodeId": [30, 30],
        "targetNodeId": [10, 40],
        "relationshipType": ["CITES"] * 2,
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for member, table in zip(cora._MEMBERS, (nodes, citations), strict=True):
            buffer = io.BytesIO()
            parquet.write_table(pa.table(table), buffer, compression="gzip")
            archive.writestr(member, buffer.getvalue())


def test_real_graph() -> None:
    try:
        data = load_demo_cora()
    except FileNotFoundError:
        pytest.skip("the wheel is fetched by `make test`")
    assert "graphdatascience" not in sys.modules
    assert data.x.shape == (2708, 1433)
    assert data.x.dtype == torch.float32
    assert data.x.unique().tolist() == [0.0, 1.0]
    assert data.edge_index.shape == (2, 10556)  # As PyG's Planetoid: 5,278 pairs, both directions.
    assert data.is_undirected()
    assert data.is_coalesced()
    assert data.y.bincount().tolist() == [818, 180, 217, 426, 351, 418, 298]
    assert data.y[data.train_mask].bincount().tolist() == [20] * 7
    assert int(data.val_mask.sum()) == 500
    assert int(data.test_mask.sum()) == 1000
    sizes = data.train_mask.int() + data.val_mask.int() + data.test_mask.int()
    assert int(sizes.max()) == 1
    # Fixed: figures of the demo are comparable between machines and versions.
    assert data.train_mask.nonzero().view(-1)[:5].tolist() == [1, 2, 29, 30, 40]
    # Citations join papers of one subject four times out of five.
    source, target = data.edge_index
    assert float((data.y[source] == data.y[target]).float().mean()) == pytest.approx(0.81, abs=0.01)
    same = load_dataset("Demo")
    assert torch.equal(same.edge_index, data.edge_index)
    assert torch.equal(same.train_mask, data.train_mask)


def test_ids_map_to_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_wheel(tmp_path)
    for name, value in (("PAPERS", 4), ("WORDS", 3), ("CITATIONS", 2), ("SUBJECTS", 2)):
        monkeypatch.setattr(cora, f"NUM_{name}", value)
    monkeypatch.setattr(cora, "random_split", lambda data, **_: (data.y == 0, data.y == 1, None))
    data = load_demo_cora(tmp_path)
    assert data.edge_index.tolist() == [[0, 0, 1, 3], [1, 3, 0, 0]]
    assert data.x.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    assert data.y.tolist() == [0, 1, 0, 1]


def test_another_graph_is_refused(tmp_path: Path) -> None:
    _write_wheel(tmp_path)
    with pytest.raises(ValueError, match=r"expected \(papers, words.*got \(4, 3, 2, 2\)"):
        load_demo_cora(tmp_path)


def test_missing_wheel_names_the_command(tmp_path: Path) -> None:
    command = f"pip download --no-deps --dest {tmp_path} graphdatascience==2.2"
    with pytest.raises(FileNotFoundError, match=command.replace("+", r"\+")):
        load_demo_cora(tmp_path)


def test_installed_distribution_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    _write_wheel(tmp_path)
    with zipfile.ZipFile(tmp_path / WHEEL) as archive:
        archive.extractall(tmp_path / "site")
    info = tmp_path / "site" / "graphdatascience-2.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graphdatascience\nVersion: 2.2\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ValueError, match="got \\(4, 3, 2, 2\\)"):
        load_demo_cora()


def test_missing_pyarrow_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        load_demo_cora()
