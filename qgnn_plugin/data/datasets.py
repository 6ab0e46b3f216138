"""Node-classification data sets of PyTorch Geometric by name, each with one set of masks."""

import copy
import difflib
import inspect
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric import datasets as pyg_datasets
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from qgnn_plugin.data.cora import load_demo_cora
from qgnn_plugin.data.splits import NodeSplit, random_split

DEMO = "demo"
FIELDS = [Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]  # what a saved Data consists of

# Short names of graphs that share a class of torch_geometric.datasets: the class, and its `name` argument.  Any other
# class is found by its own name.
DATASETS: dict[str, tuple[str, str]] = {
    **{name: ("Planetoid", name) for name in ("Cora", "CiteSeer", "PubMed")},
    **{name: ("Amazon", name) for name in ("Photo", "Computers")},
    **{name: ("Coauthor", name) for name in ("CS", "Physics")},
    "CoraFull": ("CitationFull", "Cora"),
    "CoraML": ("CitationFull", "Cora_ML"),
    "CiteSeerFull": ("CitationFull", "CiteSeer"),
    "PubMedFull": ("CitationFull", "PubMed"),
    "DBLP": ("CitationFull", "DBLP"),
    **{
        name: ("HeterophilousGraphDataset", name)
        for name in ("Roman-empire", "Amazon-ratings", "Minesweeper", "Tolokers", "Questions")
    },
    **{name: ("WebKB", name) for name in ("Cornell", "Texas", "Wisconsin")},
    **{name: ("WikipediaNetwork", name.lower()) for name in ("Chameleon", "Squirrel")},
    **{f"Twitch{name}": ("Twitch", name) for name in ("DE", "EN", "ES", "FR", "PT", "RU")},
    **{f"Airports{name}": ("Airports", name) for name in ("USA", "Brazil", "Europe")},
}


def load_dataset(
    name: str, root: str | Path | None = None, *, split: int = 0, seed: int = 0
) -> Data:
    """Loads one graph through PyG's own data set class, which downloads it where it can.

    A data set with a public split keeps it. Any other gets :func:`random_split` with 20 nodes per
    class for training and 30 for validation, drawn from ``seed``.

    Args:
        name: ``"demo"`` (see :func:`load_demo_cora`), a key of :data:`DATASETS` in any spelling of
            case and punctuation, ``"Class"`` or ``"Class/Name"`` for any other single-graph class of
            :mod:`torch_geometric.datasets`, such as ``"WikiCS"`` or ``"AttributedGraphDataset/Wiki"``;
            or a file of one ``Data`` that ``torch.save`` wrote (``.pt``, ``.pth``).
        root: Folder of the data sets. Both ``root/Class`` and the folder one would hand to the PyG
            class itself work; ``root/Class`` is used for a download. Optional for ``"demo"`` only.
        split: Which of the public splits to use, where there are several.
        seed: Seed of the random split, where there is no public one.

    Returns:
        ``Data`` with ``x`` ``[N, F]``, ``edge_index`` ``[2, E]``, ``y`` int64 ``[N]``, and boolean
        ``train_mask``, ``val_mask``, ``test_mask`` of shape ``[N]``.

    Raises:
        ValueError: Unknown name (with the nearest ones), no ``root``, no such public split, or not
            one graph with one label per node.
        FileNotFoundError: The raw files are missing and cannot be downloaded.
        ImportError: PyG needs a further package to read the raw files.
    """
    if _key(name) == DEMO:
        return load_demo_cora()
    if Path(name).suffix in (".pt", ".pth"):
        return _with_masks(_saved(Path(name)), name, split, seed)
    class_name, argument = _resolve(name)
    if root is None:
        raise ValueError(f"expected 'root', the folder of the data set '{name}' (got None)")
    dataset = _open(class_name, argument, Path(root))
    if len(dataset) != 1 or not isinstance(data := dataset[0], Data):
        raise ValueError(f"expected '{name}' to be one homogeneous graph (got {dataset})")
    return _with_masks(data, name, split, seed)


def to_sparse_features(data: Data, max_density: float = 0.1) -> Data:
    """Returns ``data`` with ``x`` as a sparse CSR tensor where its density is at most the bound.

    A full-batch first layer on bag-of-words features runs several times faster on them. Neighbour
    sampling needs dense features: torch selects no rows from CSR.

    Args:
        data: A graph with dense ``x`` of shape ``[N, F]``. Not modified.
        max_density: Largest share of non-zero entries, in [0, 1].

    Returns:
        A shallow copy with sparse ``x``, or ``data`` itself where ``x`` is sparse already, has no
        entries, or is denser than the bound.

    Raises:
        ValueError: ``max_density`` outside [0, 1], or ``x`` not a matrix.
    """
    if not 0.0 <= max_density <= 1.0:
        raise ValueError(f"expected 'max_density' in [0, 1] (got {max_density})")
    x = data.x
    if not isinstance(x, Tensor) or x.dim() != 2:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected 'data.x' of shape [N, F] (got {got})")
    if x.layout != torch.strided or x.numel() == 0:
        return data
    if int(torch.count_nonzero(x)) > max_density * x.numel():
        return data
    out = copy.copy(data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        out.x = x.to_sparse_csr()
    return out


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _resolve(name: str) -> tuple[str, str | None]:
    """The PyG class and its ``name`` argument for a user's spelling."""
    if "/" in name:
        class_name, argument = name.split("/", 1)
        if inspect.isclass(getattr(pyg_datasets, class_name, None)):
            return class_name, argument or None
        known = list(pyg_datasets.__all__)
        wanted, remedy = class_name, "the classes of torch_geometric.datasets before the '/'"
    else:
        by_key = {_key(known): known for known in DATASETS}
        for key in (_key(name), *(_key(name).removeprefix(p) for p in ("amazon", "coauthor"))):
            if key in by_key:
                return DATASETS[by_key[key]]
        classes = {_key(known): known for known in pyg_datasets.__all__}
        if (found := classes.get(_key(name))) is not None:
            if "name" in inspect.signature(getattr(pyg_datasets, found)).parameters:
                raise ValueError(f"expected '{found}/Name', one of the data sets of '{found}' (got '{name}')")
            return found, None
        known = [DEMO, *DATASETS, *pyg_datasets.__all__]
        wanted = name
        remedy = f"{', '.join([DEMO, *DATASETS])}, or 'Class' or 'Class/Name' for another PyG class"
    spelled = {k.lower(): k for k in known}
    near = difflib.get_close_matches(wanted.lower(), spelled, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(spelled[k]) for k in near)}?" if near else ""
    raise ValueError(f"expected the name of a data set (got '{name}').{hint} Known: {remedy}")


def _open(class_name: str, argument: str | None, root: Path) -> Any:
    cls = getattr(pyg_datasets, class_name)
    if "root" not in inspect.signature(cls).parameters:
        raise ValueError(f"expected a data set kept in files (got '{class_name}')")
    folder = _class_root(root, class_name, argument)
    kwargs: dict[str, Any] = {} if argument is None else {"name": argument}
    if class_name == "WikiCS":
        kwargs["is_undirected"] = True  # PyG's default, which warns unless it is spelled out.
    try:
        return cls(str(folder), **kwargs)
    except ImportError as err:
        raise ImportError(
            f"reading '{class_name}' failed ({err}); pip install 'qgnn_plugin[datasets]'"
        ) from err
    except (AssertionError, KeyError) as err:  # PyG's answer to a `name` it does not know.
        raise ValueError(f"expected a data set of '{class_name}' (got '{argument}')") from err
    except OSError as err:
        raise FileNotFoundError(
            f"expected the raw files of '{class_name}' under {folder} or a connection to download "
            f"them (got {type(err).__name__}: {err})"
        ) from err


def _class_root(root: Path, class_name: str, argument: str | None) -> Path:
    """``root/Class``, unless ``root`` itself is already laid out as the class's own folder."""
    if not (root / class_name).is_dir() and root.is_dir():
        if argument is None and (root / "raw").is_dir():
            return root
        for child in root.iterdir():
            if argument and _key(child.name) == _key(argument) and (child / "raw").is_dir():
                return root
    return root / class_name


def _saved(path: Path) -> Data:
    """The graph in a file; nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a file with a saved Data (got nothing at '{path}')")
    try:
        with torch.serialization.safe_globals(FIELDS):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as err:
        raise ValueError(
            f"expected one Data of tensors, as torch.save(data, path) writes it (got '{path}': "
            f"{' '.join(str(err).split())[:300]})"
        ) from err
    if not isinstance(data, Data):
        raise ValueError(f"expected one homogeneous Data in '{path}' (got {type(data).__name__})")
    return data


def _with_masks(data: Data, name: str, split: int, seed: int) -> Data:
    if not isinstance(data.x, Tensor):
        raise ValueError(f"expected node features 'x' in '{name}' (got {type(data.x).__name__})")
    y = data.y
    numbers = isinstance(y, Tensor) and y.is_floating_point() and y.dim() in (1, 2) and not _is_multi_label(y)
    if not numbers and (not isinstance(y, Tensor) or y.is_floating_point() or y.squeeze(-1).dim() != 1):
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"expected one integer label per node (or floats to predict, not all of them 0 and 1) in '{name}' "
            f"(got y: {got})"
        )
    data.y = y.float() if numbers else y.view(-1).long()

    keys = ("train_mask", "val_mask", "test_mask")
    public = {key: data[key] for key in keys if key in data}
    if len(public) < len(keys):
        drawn = _random_parts(data, seed) if numbers else random_split(data, seed=seed, small_classes=True)
        data.update(dict(zip(keys, drawn, strict=True)))
        return data
    splits = max(mask.size(1) if mask.dim() == 2 else 1 for mask in public.values())
    if not 0 <= split < splits:
        raise ValueError(f"expected 'split' in 0..{splits - 1} for '{name}' (got {split})")
    for key, mask in public.items():  # WikiCS has one test set for all of its splits.
        data[key] = (mask if mask.dim() == 1 else mask[:, split].contiguous()).bool()
    return data


def _is_multi_label(y: Tensor) -> bool:
    """Whether floats are several yes-or-no labels per node rather than numbers."""
    return y.dim() == 2 and y.size(1) > 1 and bool(((y == 0) | (y == 1)).all())


def _random_parts(data: Data, seed: int) -> NodeSplit:
    """Of nodes with numbers to predict, three fifths to train, one to validate and one to test."""
    order = torch.randperm(data.y.size(0), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([3 * order.numel() // 5, 4 * order.numel() // 5])
    masks = torch.zeros(3, order.numel(), dtype=torch.bool)
    for mask, part in zip(masks, parts, strict=True):
        mask[part] = True
    return NodeSplit(*masks)
