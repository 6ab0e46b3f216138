"""The CSR neighbour sampler against its definition, and behind PyG's ``NodeLoader``."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import numba
import pytest
import pytorch_lightning as pl
import torch
from graphs import GRAPHS, HUB_NEIGHBORS, Graph, duplicate_edges, erdos_renyi, power_law, star
from torch import Tensor
from torch.utils.data import DistributedSampler
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import NodeLoader
from torch_geometric.nn import GraphSAGE
from torch_geometric.sampler import NodeSamplerInput, SamplerOutput
from torch_geometric.utils import k_hop_subgraph

from qgnn_plugin.data import CSRNeighborSampler, neighbor_loader
from qgnn_plugin.lightning_modules import QuantizedNodeClassifier


def _data(graph: Graph) -> Data:
    return Data(
        x=torch.arange(graph.num_nodes, dtype=torch.float).view(-1, 1),
        edge_index=graph.edge_index,
        edge_attr=torch.arange(graph.num_edges),
        num_nodes=graph.num_nodes,
    )


def _sample(sampler: CSRNeighborSampler, seeds: Iterable[int], epoch: int = 0) -> SamplerOutput:
    sampler.epoch = epoch
    node = torch.tensor(list(seeds), dtype=torch.long)
    return sampler.sample_from_nodes(NodeSamplerInput(input_id=None, node=node))


def _fields(out: SamplerOutput) -> list[Tensor]:
    return [out.node, out.row, out.col, out.edge]


def _equal(a: SamplerOutput, b: SamplerOutput) -> bool:
    return all(
        x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(_fields(a), _fields(b), strict=True)
    )


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "no_nodes"])
@pytest.mark.parametrize("counts", [[1], [3, 2], [2, 0, 2], [-1, 4], [50, 50]])
def test_structure(name: str, counts: list[int]) -> None:
    graph = GRAPHS[name]()
    seeds = [min(4, graph.num_nodes - 1), 0, 2]
    out = _sample(CSRNeighborSampler(_data(graph), counts, seed=1), seeds)

    assert out.node[:3].tolist() == seeds
    assert len(out.node.unique()) == len(out.node)
    # Edges exist, and edge ids name them.
    assert torch.equal(
        torch.stack([out.node[out.row], out.node[out.col]]), graph.edge_index[:, out.edge]
    )
    assert len(out.edge.unique()) == len(out.edge)
    # The counts add up, hop by hop, and every node expands once, in the order of the nodes.
    assert sum(out.num_sampled_nodes) == len(out.node)
    assert sum(out.num_sampled_edges) == len(out.edge)
    assert out.col.tolist() == sorted(out.col.tolist())
    in_degree = torch.bincount(graph.edge_index[1], minlength=graph.num_nodes)
    taken = torch.bincount(out.col, minlength=len(out.node))
    begin, edges = 0, 0
    for hop, count in enumerate(counts):
        end = begin + out.num_sampled_nodes[hop]
        degree = in_degree[out.node[begin:end]]
        expected = degree if count < 0 else degree.clamp(max=count)
        assert torch.equal(taken[begin:end], expected)
        edges += int(expected.sum())
        begin = end
    assert edges == len(out.edge)
    # A node of hop h + 1 is the source of an edge into hop h.
    assert set(out.row.tolist()) | {0, 1, 2} == set(range(len(out.node)))


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "no_nodes"])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_all_neighbours_give_the_in_neighbourhood(name: str, hops: int) -> None:
    graph = GRAPHS[name]()
    seeds = torch.tensor([0, graph.num_nodes - 1])
    out = _sample(CSRNeighborSampler(_data(graph), [-1] * hops), seeds.tolist())
    nodes, _, _, _ = k_hop_subgraph(
        seeds, hops, graph.edge_index, num_nodes=graph.num_nodes, flow="source_to_target"
    )
    assert sorted(out.node.tolist()) == sorted(nodes.tolist())
    inner, _, _, _ = k_hop_subgraph(
        seeds, hops - 1, graph.edge_index, num_nodes=graph.num_nodes, flow="source_to_target"
    )
    expected = torch.isin(graph.edge_index[1], inner).nonzero().view(-1)
    assert sorted(out.edge.tolist()) == expected.tolist()


@pytest.mark.parametrize(("leaves", "count"), [(30, 3), (30, 12), (30, 29), (200, 5), (200, 60)])
def test_uniform_without_replacement(leaves: int, count: int) -> None:
    """Chi-square over leaves and over pairs of a star, for both ways of drawing."""
    sampler = CSRNeighborSampler(_data(star(leaves)), [count], seed=11)
    draws = 3000
    chosen = torch.zeros(draws, leaves)
    for epoch in range(draws):
        out = _sample(sampler, [0], epoch)
        chosen[epoch, out.node[1:] - 1] = 1.0
    assert bool((chosen.sum(1) == count).all())

    p = count / leaves
    expected, observed = draws * p, chosen.sum(0)
    # Sampling without replacement shrinks the variance by (1 - p), up to leaves / (leaves - 1).
    chi2 = ((observed - expected) ** 2 / (expected * (1 - p))).sum() * (leaves - 1) / leaves
    freedom = leaves - 1
    assert abs(float(chi2) - freedom) < 4 * (2 * freedom) ** 0.5

    together = (chosen.T @ chosen)[tuple(torch.triu_indices(leaves, leaves, 1))]
    p2 = p * (count - 1) / (leaves - 1)
    z = (together - draws * p2) / (draws * p2 * (1 - p2)) ** 0.5
    assert float(z.abs().max()) < 6
    assert float(z.mean().abs()) < 0.01  # Exactly 0: the number of pairs is fixed.
    # Pairs with a common leaf are correlated: at worst as few degrees of freedom as leaves.
    assert float(z.std()) == pytest.approx(1.0, abs=4 / (2 * freedom) ** 0.5)


def test_streams_of_nodes_are_independent() -> None:
    """Two hubs with the same leaves do not draw the same ones."""
    leaves = torch.arange(2, 202)
    edge_index = torch.cat(
        [torch.stack([leaves, torch.full_like(leaves, hub)]) for hub in (0, 1)], 1
    )
    sampler = CSRNeighborSampler(Data(edge_index=edge_index, num_nodes=202), [10], seed=0)
    common = 0
    for epoch in range(400):
        out = _sample(sampler, [0, 1], epoch)
        first, second = (set(out.node[out.row[out.col == hub]].tolist()) for hub in (0, 1))
        common += len(first & second)
    assert common / 400 == pytest.approx(10 * 10 / 200, abs=0.15)  # Standard error 0.034.


def test_large_hub() -> None:
    sampler = CSRNeighborSampler(_data(star()), [5000], seed=2)
    out = _sample(sampler, [0])
    assert len(out.edge.unique()) == 5000
    assert int(out.node.max()) <= HUB_NEIGHBORS
    assert abs(float(out.node[1:].float().mean()) - HUB_NEIGHBORS / 2) < 150


def test_draw_depends_on_seed_epoch_and_batch_alone() -> None:
    data = _data(power_law())
    seeds = list(range(20))
    first = CSRNeighborSampler(data, [3, 3], seed=5)
    expected = _sample(first, seeds, epoch=2)
    _sample(first, [9], epoch=2)
    torch.manual_seed(99)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert _equal(_sample(first, seeds, epoch=2), expected)
    finally:
        numba.set_num_threads(threads)
    other = pickle.loads(pickle.dumps(CSRNeighborSampler(data, [3, 3], seed=5)))
    assert _equal(_sample(other, seeds, epoch=2), expected)
    assert not _equal(_sample(first, seeds, epoch=3), expected)
    assert not _equal(_sample(first, seeds[::-1], epoch=2), expected)
    assert not _equal(_sample(CSRNeighborSampler(data, [3, 3], seed=6), seeds, epoch=2), expected)
    negative = CSRNeighborSampler(data, [3, 3], seed=-1)
    assert _equal(_sample(negative, seeds), _sample(negative, seeds))


def test_golden_draw() -> None:
    """Draws stay the same between versions and machines."""
    out = _sample(CSRNeighborSampler(_data(erdos_renyi()), [2, 2], seed=3), [7, 11], epoch=1)
    assert out.node.tolist() == [7, 11, 30, 3, 32, 40, 44, 38, 12, 13]
    assert out.edge.tolist() == [72, 257, 6, 177, 73, 24, 201, 281, 150, 87]


def test_repeated_seed_keeps_its_place() -> None:
    graph = erdos_renyi()
    out = _sample(CSRNeighborSampler(_data(graph), [-1]), [5, 5, 6])
    assert out.node[:3].tolist() == [5, 5, 6]
    degree = int((graph.edge_index[1] == 5).sum())
    assert (out.col == 0).sum() == (out.col == 1).sum() == degree
    assert sorted(out.edge[out.col == 0].tolist()) == sorted(out.edge[out.col == 1].tolist())


def test_no_seeds_and_no_nodes() -> None:
    out = _sample(CSRNeighborSampler(_data(erdos_renyi()), [2, 2]), [])
    assert [len(field) for field in _fields(out)] == [0, 0, 0, 0]
    assert out.num_sampled_nodes == [0, 0, 0]
    assert out.num_sampled_edges == [0, 0]
    out = _sample(CSRNeighborSampler(_data(GRAPHS["no_nodes"]()), [2]), [])
    assert len(out.node) == 0


def test_parallel_edges_count_separately() -> None:
    graph = duplicate_edges()
    target = int(graph.edge_index[1, 0])
    out = _sample(CSRNeighborSampler(_data(graph), [-1]), [target])
    assert len(out.edge) == int((graph.edge_index[1] == target).sum())
    assert len(out.node) < len(out.edge) + 1


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"num_neighbors": []}, ValueError, "one count per hop"),
        ({"num_neighbors": [3, -2]}, ValueError, r"one count per hop.*got \[3, -2\]"),
        ({"data": HeteroData()}, TypeError, "got HeteroData"),
        ({"data": Data(x=torch.ones(3, 1))}, ValueError, r"'data.edge_index' of shape \[2, E\]"),
        (
            {"data": Data(edge_index=torch.tensor([[0], [3]]), num_nodes=3)},
            ValueError,
            r"nodes 0\.\.2 \(got 0\.\.3\)",
        ),
        (
            {"data": Data(edge_index=torch.tensor([[0], [-1]]), num_nodes=3)},
            ValueError,
            r"nodes 0\.\.2 \(got -1\.\.0\)",
        ),
    ],
)
def test_malformed_arguments(kwargs: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        CSRNeighborSampler(**{"data": _data(erdos_renyi()), "num_neighbors": [2]} | kwargs)


def test_malformed_requests() -> None:
    sampler = CSRNeighborSampler(_data(erdos_renyi()), [2])
    with pytest.raises(ValueError, match=r"seed nodes in 0\.\.59 \(got 3\.\.60\)"):
        _sample(sampler, [3, 60])
    time = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="no timestamps"):
        sampler.sample_from_nodes(NodeSamplerInput(input_id=None, node=time, time=time))
    with pytest.raises(TypeError, match="link-level"):
        sampler.sample_from_edges(None)


def test_node_loader() -> None:
    graph = erdos_renyi()
    data = _data(graph)
    mask = torch.arange(60) % 2 == 0
    loader = NodeLoader(
        data, CSRNeighborSampler(data, [3, 2]), input_nodes=mask, batch_size=8, shuffle=True
    )
    seen = []
    for batch in loader:
        seeds = batch.n_id[: batch.batch_size]
        seen += seeds.tolist()
        assert torch.equal(batch.input_id, seeds)
        assert torch.equal(batch.x.view(-1).long(), batch.n_id)
        assert torch.equal(batch.n_id[batch.edge_index], graph.edge_index[:, batch.e_id])
        assert torch.equal(batch.edge_attr, batch.e_id)
        assert int(batch.edge_index[1].max()) < sum(batch.num_sampled_nodes[:2])
    assert sorted(seen) == mask.nonzero().view(-1).tolist()
    assert batch.batch_size == 30 % 8


def _epochs(num_epochs: int = 3, **kwargs: object) -> list[list[Tensor]]:
    loader = neighbor_loader(_data(power_law()), [4, 2], batch_size=16, shuffle=True, **kwargs)
    assert len(loader) == 13
    return [[batch.e_id for batch in loader] for _ in range(num_epochs)]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


needs_own_sampler = pytest.mark.skipif(
    type(neighbor_loader(_data(erdos_renyi()), [1])).__name__ == "NeighborLoader",
    reason="pyg-lib or torch-sparse is installed: neighbours follow the global generator",
)


@needs_own_sampler
def test_loader_repeats_with_its_seed() -> None:
    first, again, other = _epochs(seed=1), _epochs(seed=1), _epochs(seed=2)
    for a, b, c in zip(first, again, other, strict=True):
        assert _same(a, b)
        assert not _same(a, c)
    assert not _same(first[0], first[1])
    assert not _same(first[1], first[2])


@needs_own_sampler
@pytest.mark.parametrize("persistent_workers", [False, True])
def test_loader_is_the_same_with_workers(persistent_workers: bool) -> None:
    alone = _epochs(seed=1)
    workers = _epochs(seed=1, num_workers=2, persistent_workers=persistent_workers)
    for a, b in zip(alone, workers, strict=True):
        assert _same(a, b)


@needs_own_sampler
def test_set_epoch_resumes_in_the_middle() -> None:
    """What Lightning calls when a run goes on from a checkpoint."""
    expected = _epochs(seed=1, num_epochs=4)
    loader = neighbor_loader(_data(power_law()), [4, 2], batch_size=16, shuffle=True, seed=1)
    loader.sampler.set_epoch(2)
    assert _same([batch.e_id for batch in loader], expected[2])
    assert _same([batch.e_id for batch in loader], expected[3])
    loader.sampler.set_epoch(2)
    assert _same([batch.e_id for batch in loader], expected[2])


@needs_own_sampler
def test_lightning_resumes_sampled_training(tmp_path: Path) -> None:
    """Interrupted after an epoch and resumed, the weights are bitwise those of two in a row."""
    graph = power_law()
    data = Data(
        x=torch.randn(200, 8, generator=torch.Generator().manual_seed(1)),
        edge_index=graph.edge_index,
        y=torch.arange(200) % 3,
    )

    def fit(epochs: int, resume: Path | None = None) -> dict[str, Tensor]:
        pl.seed_everything(0, verbose=False)
        model = GraphSAGE(8, 16, num_layers=2, out_channels=3, dropout=0.5)
        module = QuantizedNodeClassifier(model, schedule=None)
        loader = neighbor_loader(data, [4, 2], batch_size=64, shuffle=True, seed=3)
        trainer = pl.Trainer(
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model.state_dict()

    expected = fit(2)
    fit(1)
    resumed = fit(2, resume=tmp_path / "1.ckpt")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@needs_own_sampler
def test_loader_on_several_devices() -> None:
    """Lightning builds the loader anew with a sampler of its own: each rank gets its share."""
    from pytorch_lightning.trainer.states import RunningStage
    from pytorch_lightning.utilities.data import _update_dataloader

    loader = neighbor_loader(_data(power_law()), [4, 2], batch_size=16, shuffle=True, seed=1)
    seen = []
    for rank in range(2):
        share = DistributedSampler(range(200), num_replicas=2, rank=rank)
        mine = _update_dataloader(loader, share, mode=RunningStage.TRAINING)
        for batch in mine:
            seen += batch.n_id[: batch.batch_size].tolist()
    assert sorted(seen) == list(range(200))


def test_loader_input_nodes() -> None:
    data = _data(erdos_renyi())
    mask = torch.zeros(60, dtype=torch.bool)
    mask[[3, 5, 8]] = True
    by_mask = [b.n_id[:1] for b in neighbor_loader(data, [2], mask)]
    by_index = [b.n_id[:1] for b in neighbor_loader(data, [2], torch.tensor([3, 5, 8]))]
    assert torch.cat(by_mask).tolist() == torch.cat(by_index).tolist() == [3, 5, 8]
    everything = neighbor_loader(data, [2], batch_size=60)
    assert next(iter(everything)).batch_size == 60


def test_loader_needs_dense_features() -> None:
    data = _data(erdos_renyi())
    data.x = data.x.to_sparse_csr()
    with pytest.raises(
        ValueError, match=r"dense 'data.x' to take rows from \(got torch.sparse_csr"
    ):
        neighbor_loader(data, [2])
