"""Penalties over all parameters: conversion adds ranges to these, which is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from core.support import OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

import qgnn_plugin as qgnn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(WIDTH, WIDTH), nn.Linear(WIDTH, OUT)
        self.init_weights()

    def init_weights(self) -> None:
        for p in self.parameters():
            torch.sum(p)  # what is set at first is set before there are ranges

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(self.conv(x, edge_index)).to(next(self.parameters()).device)

    def size(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def gradient_norm(self) -> Tensor:
        return torch.stack([p.grad.norm() for _, p in self.named_parameters() if p.grad is not None]).norm()


class Summed(Net):
    def penalty(self) -> Tensor:
        return sum(p.square().sum() for p in self.parameters())


class Looped(Net):
    def penalty(self) -> Tensor:
        total = torch.zeros(())
        for name, p in list(self.named_parameters()):
            if "bias" not in name:
                total = total + torch.linalg.vector_norm(p.detach())
        return total


def power(module: nn.Module) -> Tensor:
    return sum((p**2).sum() for p in module.parameters())


class Handed(Net):
    def penalty(self) -> Tensor:
        return power(self.head)


@pytest.mark.parametrize("cls", [Summed, Looped, Handed])
def test_what_sums_over_parameters_is_told(cls: type[Net]) -> None:
    with pytest.warns(UserWarning, match=r"parameters\(\)\)?' in (power|\w+\.penalty) computes.*range_parameters"):
        qmodel = qgnn.quantize_model(cls(), bits=8)
    model, ranges = qgnn.restore_model(qmodel), {id(p) for p in qgnn.range_parameters(qmodel)}
    assert ranges
    left = [p for p in qmodel.parameters() if id(p) not in ranges]
    assert all(torch.equal(p, q) for p, q in zip(left, model.parameters(), strict=True))  # the way out


def test_what_asks_about_parameters_is_no_penalty() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qgnn.calibrate(qgnn.quantize_model(Net(), bits=8), (features(), graph()))
