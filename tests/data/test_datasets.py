"""PyG's data set classes by name, on tiny raw files in their own layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric import datasets as pyg_datasets
from torch_geometric.data import Data

from qgnn_plugin.data import DATASETS, load_dataset, random_split, to_sparse_features

NODES, SPLITS = 120, 3


def _edges() -> np.ndarray:
    return np.stack([np.arange(NODES), (np.arange(NODES) + 1) % NODES], axis=1)


def _masks() -> np.ndarray:
    return np.arange(NODES) % 5 == np.arange(SPLITS)[:, None]


def _write_tolokers(root: Path) -> None:
    folder = root / "tolokers" / "raw"
    folder.mkdir(parents=True)
    np.savez(
        folder / "tolokers.npz",
        node_features=np.eye(NODES, 4, dtype=np.float32),
        node_labels=np.arange(NODES) % 2,
        edges=_edges(),
        train_masks=_masks(),
        val_masks=np.roll(_masks(), 1, axis=1),
        test_masks=np.roll(_masks(), 2, axis=1),
    )


def _write_photo(root: Path) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    folder = root / "Photo" / "raw"
    folder.mkdir(parents=True)
    arrays = {"labels": np.arange(NODES) % 2}
    edges = _edges()
    adj = scipy_sparse.csr_matrix((np.ones(NODES), edges.T), (NODES, NODES))
    for prefix, matrix in (("adj", adj), ("attr", scipy_sparse.eye(NODES, 30).tocsr())):
        arrays |= {f"{prefix}_{k}": getattr(matrix, k) for k in ("data", "indices", "indptr")}
        arrays[f"{prefix}_shape"] = np.array(matrix.shape)
    np.savez(folder / "amazon_electronics_photo.npz", **arrays)


def _write_wikics(root: Path) -> None:
    (root / "raw").mkdir(parents=True)
    content = {
        "features": np.eye(NODES, 4).tolist(),
        "labels": (np.arange(NODES) % 2).tolist(),
        "links": [[(node + 1) % NODES] for node in range(NODES)],
        "train_masks": _masks().tolist(),
        "val_masks": _masks().tolist(),
        "stopping_masks": _masks().tolist(),
        "test_mask": _masks()[0].tolist(),
    }
    (root / "raw" / "data.json").write_text(json.dumps(content))


def test_table_names_classes_of_pyg() -> None:
    missing = [cls for cls, _ in DATASETS.values() if not hasattr(pyg_datasets, cls)]
    assert not missing


@pytest.mark.parametrize("split", range(SPLITS))
def test_public_splits_by_index(tmp_path: Path, split: int) -> None:
    _write_tolokers(tmp_path / "HeterophilousGraphDataset")
    data = load_dataset("Tolokers", tmp_path, split=split)
    assert data.x.shape == (NODES, 4)
    assert data.y.dtype == torch.int64
    assert torch.equal(data.train_mask, torch.from_numpy(_masks()[split]))
    assert torch.equal(data.val_mask, torch.from_numpy(np.roll(_masks()[split], 1)))
    assert torch.equal(data.test_mask, torch.from_numpy(np.roll(_masks()[split], 2)))


def test_no_such_split(tmp_path: Path) -> None:
    _write_tolokers(tmp_path)
    with pytest.raises(ValueError, match=r"'split' in 0\.\.2 for 'tolokers' \(got 3\)"):
        load_dataset("tolokers", tmp_path, split=3)


def test_one_test_set_for_all_splits(tmp_path: Path) -> None:
    _write_wikics(tmp_path / "WikiCS")
    data = load_dataset("wiki-cs", tmp_path, split=2)
    assert torch.equal(data.train_mask, torch.from_numpy(_masks()[2]))
    assert torch.equal(data.test_mask, torch.from_numpy(_masks()[0]))


def test_random_split_where_there_is_none(tmp_path: Path) -> None:
    _write_photo(tmp_path / "Amazon")
    data = load_dataset("Photo", tmp_path, seed=7)
    expected = random_split(data, 20, 30, seed=7)
    for key, mask in expected._asdict().items():
        assert torch.equal(data[key], mask)
    assert not torch.equal(data.train_mask, load_dataset("Photo", tmp_path, seed=8).train_mask)
    for spelling in ("photo", "amazon-photo", "AmazonPhoto", "Amazon/Photo", "Amazon/photo"):
        assert torch.equal(load_dataset(spelling, tmp_path, seed=7).train_mask, data.train_mask)


@pytest.mark.parametrize(
    ("name", "write"),
    [("Photo", _write_photo), ("Tolokers", _write_tolokers), ("WikiCS", _write_wikics)],
)
def test_root_of_the_class_itself(tmp_path: Path, name: str, write: object) -> None:
    write(tmp_path)
    assert load_dataset(name, tmp_path).num_nodes == NODES


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Coar", r"got 'Coar'\)\. Did you mean 'Cora'"),
        ("pubmet", "Did you mean 'PubMed'"),
        ("zzzzz", r"got 'zzzzz'\)\. Known: demo, Cora, CiteSeer"),
        ("Planetoids/Cora", "Did you mean 'Planetoid'"),
        ("KarateClub/x", "a data set kept in files"),
        ("karate-club", "a data set kept in files"),
        ("WikiCz", "Did you mean 'WikiCS'"),
        ("amazon", "expected 'Amazon/Name'"),
        ("Amazon/Phot", "a data set of 'Amazon'"),
    ],
)
def test_unknown_names(tmp_path: Path, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_dataset(name, tmp_path)


def test_root_is_required() -> None:
    with pytest.raises(ValueError, match="expected 'root', the folder of the data set 'Cora'"):
        load_dataset("Cora")


class _Fails:
    error: BaseException = OSError()

    def __init__(self, root: str) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [
        (ConnectionError("no route"), FileNotFoundError, "under .*Actor or a connection"),
        (ModuleNotFoundError("No module named 'scipy'"), ImportError, r"qgnn_plugin\[datasets\]"),
    ],
)
def test_failures_of_pyg_name_the_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: type[Exception],
    match: str,
) -> None:
    monkeypatch.setattr(_Fails, "error", error)
    monkeypatch.setattr(pyg_datasets, "Actor", _Fails)
    with pytest.raises(raised, match=match):
        load_dataset("Actor", tmp_path)


@pytest.mark.parametrize(
    ("graphs", "match"),
    [
        ([Data(x=torch.ones(3, 1), y=torch.ones(3, 2))], "one integer label per node"),
        ([Data(x=torch.ones(3, 1), y=torch.ones(3, 2, 2))], "one integer label per node"),
        ([Data(x=torch.ones(3, 1))], "one integer label per node .*got y: NoneType"),
        ([Data(y=torch.ones(3).long())], "node features 'x'"),
        ([Data(), Data()], "one homogeneous graph"),
    ],
)
def test_other_tasks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[Data], match: str
) -> None:
    monkeypatch.setattr(pyg_datasets, "Actor", lambda root: graphs)
    with pytest.raises(ValueError, match=match):
        load_dataset("Actor", tmp_path)


def test_numbers_to_predict_are_split_at_random(tmp_path: Path) -> None:
    y = torch.randn(50, 2, dtype=torch.float64)
    torch.save(Data(x=torch.ones(50, 1), y=y), tmp_path / "numbers.pt")
    data, again, other = (load_dataset(str(tmp_path / "numbers.pt"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(data.y, y.float())
    masks = torch.stack([data.train_mask, data.val_mask, data.test_mask])
    assert masks.sum(1).tolist() == [30, 10, 10]
    assert bool((masks.sum(0) == 1).all())
    assert torch.equal(data.train_mask, again.train_mask)
    assert not torch.equal(data.train_mask, other.train_mask)


def test_sparse_features() -> None:
    x = torch.zeros(40, 50)
    x[torch.arange(40), torch.arange(40)] = 2.0  # Density 0.02.
    data = Data(x=x, edge_index=torch.zeros(2, 0, dtype=torch.long))
    out = to_sparse_features(data)
    assert out.x.layout == torch.sparse_csr
    assert torch.equal(out.x.to_dense(), x)
    assert data.x is x
    assert out.edge_index is data.edge_index
    assert out.num_nodes == 40
    assert to_sparse_features(out) is out
    assert to_sparse_features(data, max_density=0.02).x.layout == torch.sparse_csr
    assert to_sparse_features(data, max_density=0.019) is data
    empty = Data(x=torch.empty(0, 5))
    assert to_sparse_features(empty) is empty


@pytest.mark.parametrize("bound", [-0.1, 1.1, float("nan")])
def test_sparse_features_bound(bound: float) -> None:
    with pytest.raises(ValueError, match=r"'max_density' in \[0, 1\]"):
        to_sparse_features(Data(x=torch.ones(2, 2)), bound)


@pytest.mark.parametrize("x", [None, torch.ones(3)])
def test_sparse_features_need_a_matrix(x: object) -> None:
    with pytest.raises(ValueError, match=r"'data.x' of shape \[N, F\]"):
        to_sparse_features(Data(x=x))


def test_a_saved_graph(tmp_path: Path) -> None:
    edges = torch.from_numpy(_edges()).t().contiguous()
    data = Data(x=torch.rand(NODES, 4), edge_index=edges, y=torch.arange(NODES) % 2)
    torch.save(data, tmp_path / "mine.pt")
    loaded = load_dataset(str(tmp_path / "mine.pt"), seed=7)
    assert torch.equal(loaded.x, data.x)
    expected = random_split(data, seed=7, small_classes=True)
    for key, mask in expected._asdict().items():
        assert torch.equal(loaded[key], mask)


@pytest.mark.parametrize("content", [{"x": torch.ones(2)}, [Data()], Path("a")])
def test_a_file_of_something_else(tmp_path: Path, content: object) -> None:
    """What is no graph is refused; what would run code is not even built."""
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"expected one (homogeneous )?Data.*mine\.pt"):
        load_dataset(str(tmp_path / "mine.pt"))
    with pytest.raises(FileNotFoundError, match="got nothing"):
        load_dataset(str(tmp_path / "other.pt"))
