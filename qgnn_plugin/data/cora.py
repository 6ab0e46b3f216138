"""Cora from a wheel of the package index: a real graph for demos and tests."""

import io
import zipfile
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import coalesce, to_undirected

from qgnn_plugin.data.splits import random_split

DISTRIBUTION = "graphdatascience"
VERSION = "2.2"
CACHE = ".cache"
SPLIT_SEED = 0
NUM_PAPERS, NUM_WORDS, NUM_CITATIONS, NUM_SUBJECTS = 2708, 1433, 5429, 7

_MEMBERS = (
    "graphdatascience/resources/cora/cora_nodes.parquet.gzip",
    "graphdatascience/resources/cora/cora_rels.parquet.gzip",
)


def load_demo_cora(root: str | Path | None = None) -> Data:
    """Returns Cora as the ``graphdatascience`` 2.2 wheel (Apache-2.0) ships it.

    The wheel is read as a zip file: neither the package nor its dependencies are installed or
    imported. Its citations are those of PyG's ``Planetoid`` Cora, its node order is not, so the
    figures of the public split do not apply: the split here is a fixed seeded one.

    Args:
        root: Folder of the wheel. By default an installed distribution, else ``.cache`` in the
            working directory, else ``.cache`` in the checkout.

    Returns:
        ``Data`` with ``x`` float32 ``[2708, 1433]`` of zeros and ones, ``edge_index`` int64
        ``[2, E]`` (both directions, sorted, no duplicates), ``y`` int64 ``[2708]`` with 7 classes,
        and boolean masks of 20 nodes per class / 500 / 1000.

    Raises:
        FileNotFoundError: Neither is there; the message names the command that fetches it.
        ImportError: ``pyarrow`` is missing.
        ValueError: The files do not hold the graph described above.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as err:
        raise ImportError("reading the demo graph needs pyarrow: pip install pyarrow") from err

    nodes, citations = (parquet.read_table(io.BytesIO(raw)) for raw in _read_members(root))
    ids = torch.tensor(nodes["nodeId"].to_numpy())
    words = torch.tensor(nodes["features"].combine_chunks().flatten().to_numpy())
    source, target = (
        _positions(ids, torch.tensor(citations[name].to_numpy()))
        for name in ("sourceNodeId", "targetNodeId")
    )
    edge_index = coalesce(torch.stack([source, target]), num_nodes=len(ids))
    data = Data(
        x=words.view(len(ids), -1).float(),
        edge_index=to_undirected(edge_index, num_nodes=len(ids)),
        y=torch.tensor(nodes["subject"].to_numpy()),
    )
    got = (*data.x.shape, edge_index.size(1), data.y.unique().numel())
    expected = (NUM_PAPERS, NUM_WORDS, NUM_CITATIONS, NUM_SUBJECTS)
    if got != expected:
        raise ValueError(f"expected (papers, words, citations, subjects) = {expected} (got {got})")
    split = random_split(data, per_class_train=20, num_val=500, num_test=1000, seed=SPLIT_SEED)
    data.train_mask, data.val_mask, data.test_mask = split
    return data


def _positions(ids: Tensor, wanted: Tensor) -> Tensor:
    """Row of each wanted id."""
    ordered, order = ids.sort()
    return order[torch.searchsorted(ordered, wanted)]


def _read_members(root: str | Path | None) -> list[bytes]:
    if root is None and (installed := _installed_members()) is not None:
        return [path.read_bytes() for path in installed]
    folders = [Path.cwd() / CACHE, Path(__file__).parents[2] / CACHE] if root is None else [root]
    for folder in map(Path, folders):
        for wheel in sorted(folder.glob(f"{DISTRIBUTION}-{VERSION}-*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                return [archive.read(member) for member in _MEMBERS]
    raise FileNotFoundError(
        f"expected {DISTRIBUTION}-{VERSION}-*.whl in {folders[0]} (got none); fetch it with: "
        f"pip download --no-deps --dest {folders[0]} {DISTRIBUTION}=={VERSION}"
    )


def _installed_members() -> list[Path] | None:
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(distribution.locate_file(member))) for member in _MEMBERS]
    return paths if all(path.is_file() for path in paths) else None
