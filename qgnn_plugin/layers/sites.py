"""The quantizers that a layer gets, as its configuration has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config import Granularity, Levels, QuantConfig, Site
from ..quantizers import QLRQuantizer
from ..smp.deep import StackPlace

__all__ = ["Entrance", "SiteFactory"]


@dataclass
class Entrance:
    """Where features enter a model: open until the first site takes them."""

    is_open: bool = True


@dataclass
class SiteFactory:
    """Makes the quantizers of one layer after its configuration."""

    name: str
    config: QuantConfig
    device: torch.device | None
    dtype: torch.dtype | None
    entrance: Entrance = field(default_factory=Entrance)
    configs: Callable[[str], QuantConfig] | None = None  # of inner layers, by name; default this layer's own
    place: StackPlace | None = None  # in a deep stack
    made: set[tuple[str, Site]] = field(default_factory=set)  # sites of layers by name; inner layers add theirs

    def make(
        self,
        site: Site,
        label: str,
        *,
        levels: Levels = "affine",
        granularity: Granularity | None = None,
        channels: int | None = None,
        channel_dim: int = -1,
        row_dims: int = 1,
    ) -> QLRQuantizer:
        """A quantizer for ``site``; ``label`` names it in errors.

        What the model returns has one range where rows would have multiples of one: it is read as one matrix.
        """
        self.made.add((self.name, site))
        granularity = granularity or self.config.granularity
        if (granularity == "channel" and channels is None) or (granularity == "row" and site == "output"):
            granularity = "tensor"
        return QLRQuantizer(
            self.config.bits_for(site),
            levels=levels,
            granularity=granularity,
            channels=channels,
            channel_dim=channel_dim,
            truncation=self.config.truncation,
            learn=self.config.learn_ranges and (site != "input" or self.config.learn_input_ranges),
            row_dims=row_dims,
            site=f"{self.name}.{label}" if self.name else label,
            device=self.device,
            dtype=self.dtype,
        )

    def features(
        self, label: str, channels: int | None = None, *, granularity: Granularity | None = None
    ) -> QLRQuantizer:
        """A quantizer for a layer's input: the model's input for the first layer, an activation afterwards."""
        site: Site = "input" if self.entrance.is_open else "activation"
        self.entrance.is_open = False
        return self.make(site, label, channels=channels, granularity=granularity)

    def weight(self, label: str, weight: Tensor) -> QLRQuantizer:
        """A quantizer for a ``[out, in]`` weight."""
        return self.make(
            "weight",
            label,
            levels=self.config.weight_levels,
            granularity=self.config.weight_granularity,
            channels=weight.size(0),
            channel_dim=0,
        )

    def message(self, label: str, channels: int | None = None, *, row_dims: int = 1) -> QLRQuantizer:
        """A quantizer for what neighbours send; ``row_dims`` as in :class:`QLRQuantizer`."""
        return self.make("message", label, levels=self.config.message_levels, channels=channels, row_dims=row_dims)

    def within(self, child: str) -> SiteFactory:
        """The factory of a child layer."""
        name = f"{self.name}.{child}" if self.name else child
        config = self.config if self.configs is None else self.configs(name)
        return replace(self, name=name, config=config, place=None)
