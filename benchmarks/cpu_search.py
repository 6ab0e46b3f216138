"""Time and recall of nearest-neighbour queries: packed embeddings against faiss, at equal bytes."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qgnn_plugin import PackedEmbeddings

from .cpu_recall import recall
from .cpu_report import Target, table
from .timing import interleaved, set_threads

ROWS = 1_000_000
FEATURES = 64
CENTERS = 2_000
NEIGHBOURS = 10
TRAINED_ON = 100_000  # rows that a product quantizer of faiss is trained on
BATCHES = {1: 5, 64: 3}  # queries of a call, and rounds
BITS = (2, 4, 8)

NOTES = f"""\
{ROWS:,} rows of {FEATURES} features of unit length around {CENTERS:,} centers, non-negative as after a ReLU; queries
are further points around the same centers.  Time of a call with 1 and with 64 queries on one thread, medians of
interleaved rounds; recall@{NEIGHBOURS} of 256 queries against float64 products.  `PackedEmbeddings.topk` returns
exactly the largest products with the packed rows.  faiss (where it is installed): `IndexFlatIP` on float32; `IndexPQ`,
8 bits a part, in as many parts as a packed row of 2 and of 4 bits has bytes of codes; `IndexPQFastScan`, 4 bits a part,
in the bytes of 2 bits; `IndexRaBitQ`, a bit for each feature.
"""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"rows": ROWS, "features": FEATURES, "neighbours": NEIGHBOURS}


def _points(count: int, centers: Tensor, generator: torch.Generator) -> Tensor:
    of = torch.randint(centers.size(0), (count,), generator=generator)
    noise = torch.randn(count, FEATURES, generator=generator)
    return torch.nn.functional.normalize((centers[of] + 0.6 * noise).relu())


def _faiss_sides(x: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], float]]:
    """Searches of faiss, and the bytes of a row; none where it is not installed."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        return {}
    faiss.omp_set_num_threads(1)
    product = faiss.METRIC_INNER_PRODUCT
    indices = {
        "faiss flat, float32": (faiss.IndexFlatIP(FEATURES), 4 * FEATURES),
        "faiss PQ": (faiss.IndexPQ(FEATURES, FEATURES // 4, 8, product), FEATURES // 4),
        "faiss PQ, twice the parts": (faiss.IndexPQ(FEATURES, FEATURES // 2, 8, product), FEATURES // 2),
        "faiss PQ, 4 bits, fast scan": (faiss.IndexPQFastScan(FEATURES, FEATURES // 2, 4, product), FEATURES // 4),
        "faiss RaBitQ": (faiss.IndexRaBitQ(FEATURES, product), FEATURES // 8 + 8),
    }
    for index, _ in indices.values():
        index.train(x[:TRAINED_ON].numpy())
        index.add(x.numpy())
    return {
        name: ((lambda query, index=index: torch.from_numpy(index.search(query.numpy(), NEIGHBOURS)[1])), size)
        for name, (index, size) in indices.items()
    }


def _packed_sides(x: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], float]]:
    tables = {f"packed, {bits} bits": PackedEmbeddings.from_float(x, bits) for bits in BITS}
    return {
        name: ((lambda query, packed=packed: packed.topk(query, NEIGHBOURS)[1]), packed.nbytes / len(packed))
        for name, packed in tables.items()
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    set_threads(1)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CENTERS, FEATURES, generator=generator)
    x, queries = _points(ROWS, centers, generator), _points(256, centers, generator)
    exact = queries.double() @ x.double().t()
    truth = exact.topk(NEIGHBOURS).indices
    sides = {**_packed_sides(x), **_faiss_sides(x)}
    rows: list[dict[str, Any]] = [
        {"side": name, "bytes per row": size, f"recall@{NEIGHBOURS}": recall(search(queries), truth, exact)}
        for name, (search, size) in sides.items()
    ]
    del exact
    for count, rounds in BATCHES.items():
        calls = {name: functools.partial(search, queries[:count]) for name, (search, _) in sides.items()}
        timings = interleaved(calls, rounds)
        for row in rows:
            row[f"ms, {count} queries" if count > 1 else "ms, one query"] = 1e3 * timings[row["side"]].median
    return {"rows": rows}


def markdown(section: Mapping[str, Any]) -> list[str]:
    rows = section["data"]["rows"]
    return ["## Nearest neighbours", "", NOTES, *table(list(rows[0]), rows)]


def targets(data: Mapping[str, Any]) -> list[Target]:
    return []
