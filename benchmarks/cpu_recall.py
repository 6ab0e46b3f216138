"""Recall of packed embeddings against float ones, and the time of a query against that of faiss."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from qgnn_plugin import PackedEmbeddings
from qgnn_plugin.data import load_dataset, to_sparse_features
from qgnn_plugin.denormals import flushed_denormals
from qgnn_plugin.recipe import fit_float

from .cpu_report import Target, table
from .models import build_model
from .timing import set_threads

MODEL = "GCN-64"
BITS = (2, 4, 8)
GRANULARITIES: tuple[Literal["rotated", "node", "tensor"], ...] = ("rotated", "node", "tensor")
NEIGHBOURS = 10
QUERIES = 1_000
SPARSE_BELOW = 0.5
TIE = 1e-6  # relative

NOTES = f"""\
Embeddings are the hidden layer (after ReLU) of a trained {MODEL}, in float32.  Truth: the {NEIGHBOURS} nodes with the
largest float64 dot product with a query node, itself left out; recall is the share of them that `PackedEmbeddings.topk`
finds, over {QUERIES:,} random query nodes (all, if there are fewer).  `packed queries` are rows of the packed table,
`float queries` the float rows, as a new node would come.  With `cosine`, embeddings are scaled to unit length before
they are packed; without, a few nodes with long embeddings are everyone's neighbours.  `range` is the `granularity` of
`from_float`: rotated to the directions in which embeddings vary (the default of all but small tables), one range per
node, or one for the whole table.  A node whose product is that of the last true neighbour to 1e-6 is one: a tie is no
miss.  `different neighbours` counts the nodes that are
in any of the true lists.
"""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"datasets": args.datasets, "queries": QUERIES, "neighbours": NEIGHBOURS}


def embeddings(dataset: str, root: str) -> Tensor:
    """``[N, 64]`` float32: the hidden layer of a model trained on ``dataset``."""
    data = to_sparse_features(load_dataset(dataset, root), max_density=SPARSE_BELOW)
    torch.manual_seed(0)
    model: Any = build_model(MODEL, data.x.size(1), int(data.y.max()) + 1)
    fit_float(model, data)
    with torch.no_grad():
        return model.conv1(data.x, data.edge_index).relu()


def _without(index: Tensor, own: Tensor, k: int) -> Tensor:
    """The first ``k`` of each row of ``index`` ``[M, k + 1]`` that are not ``own`` ``[M]``."""
    # A stable sort of "is own" brings the others forward in their order.
    order = (index == own.unsqueeze(1)).to(torch.int8).sort(dim=1, stable=True).indices
    return index.gather(1, order)[:, :k]


def recall(found: Tensor, truth: Tensor, products: Tensor) -> float:
    """Share of ``found`` ``[M, k]`` whose products ``[M, N]`` reach the least of ``truth``, ties included."""
    least = products.gather(1, truth).amin(1, keepdim=True)
    return float((products.gather(1, found) >= least - TIE * least.abs()).double().mean())


def similarity_rows(x: Tensor, queries: int = QUERIES) -> list[dict[str, Any]]:
    """Recall and bytes at every width and granularity, by dot products of embeddings ``[N, F]``."""
    own = torch.randperm(x.size(0), generator=torch.Generator().manual_seed(0))[:queries]
    exact = x[own].double() @ x.double().t()
    truth = _without(exact.topk(NEIGHBOURS + 1).indices, own, NEIGHBOURS)
    rows = []
    for bits, granularity in itertools.product(BITS, GRANULARITIES):
        packed = PackedEmbeddings.from_float(x, bits, granularity=granularity)
        asked = {"packed queries": packed[own], "float queries": x[own]}
        found = {kind: packed.topk(query, NEIGHBOURS + 1)[1] for kind, query in asked.items()}
        scores = {kind: recall(_without(index, own, NEIGHBOURS), truth, exact) for kind, index in found.items()}
        size = 4 * x.numel()
        rows.append(
            {"bits": bits, "range": granularity, **{f"recall@{NEIGHBOURS}, {kind}": v for kind, v in scores.items()},
             "bytes": packed.nbytes, "float bytes": size, "float over packed": size / packed.nbytes,
             "different neighbours": truth.unique().numel()}
        )  # fmt: skip
    return rows


def dataset_rows(dataset: str, x: Tensor) -> list[dict[str, Any]]:
    """The rows of one data set for embeddings as they are, and for those of unit length."""
    similarities = {"dot product": x, "cosine": torch.nn.functional.normalize(x)}
    return [
        {"data set": dataset, "similarity": name, **row}
        for name, values in similarities.items()
        for row in similarity_rows(values)
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    set_threads(max(args.threads))
    with flushed_denormals():  # Adam with weight decay makes them
        rows = [row for dataset in args.datasets for row in dataset_rows(dataset, embeddings(dataset, args.root))]
    return {"rows": rows}


def markdown(section: Mapping[str, Any]) -> list[str]:
    rows = section["data"]["rows"]
    return ["## Packed embeddings", "", NOTES, *table(list(rows[0]), rows)]


def targets(data: Mapping[str, Any]) -> list[Target]:
    return []
