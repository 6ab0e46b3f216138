"""Small graphs that kernels and layers are tested on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HUB_NEIGHBORS = 10_007


class Graph(NamedTuple):
    """``edge_index`` int64 ``[2, E]``, source to target, in no particular order."""

    edge_index: Tensor
    num_nodes: int

    @property
    def num_edges(self) -> int:
        return self.edge_index.size(1)

    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """In-edges by target: ``rowptr`` ``[N + 1]``, sources ``[E]``, edge ids ``[E]``."""
        source, target = self.edge_index
        order = torch.argsort(target, stable=True)
        rowptr = torch.zeros(self.num_nodes + 1, dtype=torch.long)
        torch.cumsum(torch.bincount(target, minlength=self.num_nodes), 0, out=rowptr[1:])
        return rowptr, source[order], order


def erdos_renyi(num_nodes: int = 60, num_edges: int = 300, seed: int = 0) -> Graph:
    """Directed, uniform over ordered pairs: self-loops and parallel edges occur."""
    generator = torch.Generator().manual_seed(seed)
    return Graph(torch.randint(num_nodes, (2, num_edges), generator=generator), num_nodes)


def power_law(num_nodes: int = 200, num_edges: int = 1500, seed: int = 0) -> Graph:
    """In-degrees fall off as a power of the rank (a Zipf law); sources are uniform."""
    generator = torch.Generator().manual_seed(seed)
    weight = 1.0 / torch.arange(1, num_nodes + 1, dtype=torch.double)
    target = torch.multinomial(weight, num_edges, replacement=True, generator=generator)
    source = torch.randint(num_nodes, (num_edges,), generator=generator)
    return Graph(torch.stack([source, target]), num_nodes)


def star(num_leaves: int = HUB_NEIGHBORS) -> Graph:
    """Node 0 receives an edge from every other node and sends none."""
    leaves = torch.arange(1, num_leaves + 1)
    return Graph(torch.stack([leaves, torch.zeros_like(leaves)]), num_leaves + 1)


def isolated_nodes() -> Graph:
    """Nodes without any edge at the start, in the middle and at the end."""
    return Graph(torch.tensor([[1, 2, 5, 5], [2, 1, 1, 6]]), 9)


def self_loops() -> Graph:
    """Every node has a self-loop, one has two; a ring joins them."""
    nodes = torch.arange(7)
    ring = torch.stack([nodes, (nodes + 1) % 7])
    loops = torch.stack([nodes, nodes])
    return Graph(torch.cat([ring, loops, loops[:, 3:4]], dim=1), 7)


def duplicate_edges() -> Graph:
    """Each edge of a small random graph three times, shuffled."""
    graph = erdos_renyi(20, 40, seed=3)
    edge_index = graph.edge_index.repeat(1, 3)
    order = torch.randperm(edge_index.size(1), generator=torch.Generator().manual_seed(3))
    return Graph(edge_index[:, order], graph.num_nodes)


def no_edges() -> Graph:
    return Graph(torch.empty(2, 0, dtype=torch.long), 5)


def no_nodes() -> Graph:
    return Graph(torch.empty(2, 0, dtype=torch.long), 0)


GRAPHS: dict[str, Callable[[], Graph]] = {
    "erdos_renyi": erdos_renyi,
    "power_law": power_law,
    "star": star,
    "isolated_nodes": isolated_nodes,
    "self_loops": self_loops,
    "duplicate_edges": duplicate_edges,
    "no_edges": no_edges,
    "no_nodes": no_nodes,
}
"""By name, for ``pytest.mark.parametrize``. The star is too large for some interpreted kernels."""
