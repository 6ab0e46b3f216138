"""Neighbour sampling over CSR, compiled by numba, behind PyG's ``BaseSampler``.

PyG's ``NeighborLoader`` needs ``pyg-lib`` or ``torch-sparse``. Where neither is installed,
:func:`neighbor_loader` runs PyG's ``NodeLoader`` on the sampler of this module.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch_geometric.typing
from torch import Tensor
from torch.utils.data import Sampler
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader, NodeLoader
from torch_geometric.sampler import BaseSampler, NodeSamplerInput, SamplerOutput

from qgnn_plugin.data import _sampling

ALL = -1
_NONE = np.empty(0, dtype=np.int64)


class CSRNeighborSampler(BaseSampler):
    """Uniform neighbour sampling without replacement, as ``GraphSAGE`` training needs it.

    Hop ``h`` draws up to ``num_neighbors[h]`` in-edges of every node that hop ``h - 1`` found (the
    first: of every seed). The subgraph is directional as PyG's: edges run from a sampled neighbour
    to the node it was sampled for, nodes appear once, and the seeds come first in the given order
    (a seed given twice appears twice, each with a neighbourhood of its own). Parallel edges count
    separately.

    A batch is a function of the graph, ``seed``, ``epoch`` and the seed nodes, in order: it depends
    neither on the number of workers, nor on the batches before it, nor on any global generator.

    Args:
        data: Homogeneous graph with ``edge_index`` int64 ``[2, E]``.
        num_neighbors: In-edges to draw per node in each hop; -1 for all of them.
        seed: Any integer of 64 bits.

    Raises:
        TypeError: ``data`` is not a homogeneous ``Data``.
        ValueError: ``edge_index`` or ``num_neighbors`` malformed.
    """

    def __init__(self, data: Data, num_neighbors: Sequence[int], seed: int = 0) -> None:
        if not isinstance(data, Data):
            raise TypeError(f"expected a homogeneous 'Data' (got {type(data).__name__})")
        self._counts = np.array(num_neighbors, dtype=np.int64)
        if self._counts.ndim != 1 or not self._counts.size or self._counts.min() < ALL:
            raise ValueError(
                f"expected 'num_neighbors' to hold one count per hop, -1 for all neighbours "
                f"(got {num_neighbors})"
            )
        edge_index = data.edge_index
        if not isinstance(edge_index, Tensor) or edge_index.dim() != 2 or len(edge_index) != 2:
            got = list(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index)
            raise ValueError(f"expected 'data.edge_index' of shape [2, E] (got {got})")
        self.num_nodes = int(data.num_nodes or 0)
        if edge_index.numel() and not (
            0 <= int(edge_index.min()) <= int(edge_index.max()) < self.num_nodes
        ):
            raise ValueError(
                f"expected 'data.edge_index' to hold nodes 0..{self.num_nodes - 1} "
                f"(got {int(edge_index.min())}..{int(edge_index.max())})"
            )
        self.seed = int(seed)
        row, col = edge_index.cpu().long()
        self._edge = torch.argsort(col, stable=True)
        self._row = row[self._edge]
        self._colptr = torch.zeros(self.num_nodes + 1, dtype=torch.long)
        torch.cumsum(torch.bincount(col, minlength=self.num_nodes), 0, out=self._colptr[1:])
        self._epoch = torch.zeros((), dtype=torch.long)

    @property
    def epoch(self) -> int:
        """Selects the draw: the same batch has other neighbours in another epoch."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def share_memory(self) -> "CSRNeighborSampler":
        """Moves the graph and the epoch to shared memory, so that worker processes see both."""
        for tensor in (self._edge, self._row, self._colptr, self._epoch):
            tensor.share_memory_()
        return self

    def key(self, nodes: np.ndarray = _NONE) -> np.uint64:
        """The random key of a batch, given its seed nodes (without them: of the epoch)."""
        seed, epoch = (np.uint64(value % 2**64) for value in (self.seed, self.epoch))
        return np.uint64(_sampling.batch_key(seed, epoch, nodes))

    def sample_from_nodes(self, index: NodeSamplerInput, **kwargs: Any) -> SamplerOutput:
        """Samples the neighbourhood of ``index.node``.

        Raises:
            ValueError: A timestamp is given (not supported), or a seed is not a node.
        """
        if index.time is not None:
            raise ValueError("expected no timestamps: temporal sampling needs 'pyg-lib'")
        seeds = index.node.cpu().long()
        if seeds.numel() and not 0 <= int(seeds.min()) <= int(seeds.max()) < self.num_nodes:
            raise ValueError(
                f"expected seed nodes in 0..{self.num_nodes - 1} "
                f"(got {int(seeds.min())}..{int(seeds.max())})"
            )
        nodes, source, target, slot, hop_nodes, hop_edges = _sampling.sample(
            self._colptr.numpy(),
            self._row.numpy(),
            seeds.numpy(),
            self._counts,
            self.key(seeds.numpy()),
        )
        return SamplerOutput(
            node=torch.from_numpy(nodes),
            row=torch.from_numpy(source),
            col=torch.from_numpy(target),
            edge=self._edge[torch.from_numpy(slot)],
            num_sampled_nodes=hop_nodes.tolist(),
            num_sampled_edges=hop_edges.tolist(),
            metadata=(index.input_id, index.time),
        )

    def sample_from_edges(self, index: Any, neg_sampling: Any = None) -> SamplerOutput:
        """Not supported: link-level sampling needs ``pyg-lib`` or ``torch-sparse``."""
        raise TypeError("expected node-level sampling: link-level sampling needs 'pyg-lib'")


class _EpochSampler(Sampler[int]):
    """Positions of the input nodes, shuffled by (seed, epoch); also carries the epoch to the graph.

    ``set_epoch`` is what Lightning and ``DistributedSampler`` users call before each epoch. Without
    it, every pass over the loader is an epoch of its own.
    """

    def __init__(self, graph: CSRNeighborSampler, size: int, shuffle: bool) -> None:
        self.graph, self.size, self.shuffle = graph, size, shuffle
        self._epoch_is_set = True

    def set_epoch(self, epoch: int) -> None:
        self.graph.epoch = epoch
        self._epoch_is_set = True

    def begin(self) -> None:
        if not self._epoch_is_set:
            self.graph.epoch += 1
        self._epoch_is_set = False

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.size))
        generator = torch.Generator().manual_seed(int(self.graph.key()))
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def __len__(self) -> int:
        return self.size


class _EpochNodeLoader(NodeLoader):
    def __iter__(self) -> Any:
        if isinstance(self.sampler, _EpochSampler):  # Lightning replaces it on several devices.
            self.sampler.begin()
        return super().__iter__()


def neighbor_loader(
    data: Data,
    num_neighbors: Sequence[int],
    input_nodes: Tensor | None = None,
    batch_size: int = 1,
    shuffle: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> NodeLoader:
    """Mini-batches of seed nodes with their sampled neighbourhoods.

    PyG's ``NeighborLoader`` where ``pyg-lib`` or ``torch-sparse`` is installed (``seed`` then fixes
    the order of the seeds, while neighbours follow the global generator), else PyG's ``NodeLoader``
    on :class:`CSRNeighborSampler`. Batches look the same: ``batch.batch_size`` seeds come first,
    ``n_id`` and ``e_id`` give the original nodes and edges.

    Args:
        data: Homogeneous graph with dense features.
        num_neighbors: In-edges to draw per node in each hop; -1 for all of them.
        input_nodes: Seed nodes, an index ``[S]`` or a mask ``[N]`` (default: every node).
        batch_size: Seeds per batch.
        shuffle: Draw a new order of the seeds in each epoch.
        seed: Seed of order and neighbours.
        **kwargs: Further arguments of ``torch.utils.data.DataLoader`` and PyG's ``NodeLoader``.

    Raises:
        ValueError: Sparse ``data.x``, or an argument of :class:`CSRNeighborSampler` malformed.
    """
    x = getattr(data, "x", None)
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise ValueError(f"expected dense 'data.x' to take rows from (got {x.layout})")
    if torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE:
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        return NeighborLoader(
            data, num_neighbors, input_nodes, batch_size=batch_size, shuffle=shuffle, **kwargs
        )
    graph = CSRNeighborSampler(data, num_neighbors, seed)
    if kwargs.get("num_workers", 0) > 0:
        graph.share_memory()
    if input_nodes is None:
        size = graph.num_nodes
    else:
        input_nodes = torch.as_tensor(input_nodes)
        size = int(input_nodes.sum()) if input_nodes.dtype == torch.bool else len(input_nodes)
    kwargs |= {"batch_size": batch_size, "sampler": _EpochSampler(graph, size, shuffle)}
    return _EpochNodeLoader(data, graph, input_nodes, **kwargs)
