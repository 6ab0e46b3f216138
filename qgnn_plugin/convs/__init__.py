"""Convolutions, told once each: what a layer makes of codes, whether its sites are trainable or frozen.

Importing this package enters every one of them into the registries.  Nothing below it does; the package itself does, so
that a layer is known whatever is imported first.
"""

from .appnp import PackedPropagation, QuantizedAPPNP, QuantizedSMPropagation
from .attention import PackedGATConv, PackedGATv2Conv, QuantizedGATConv, QuantizedGATv2Conv
from .base import Convolution, Frozen, Mapped, Trainable, trainable
from .deep import PackedDeepGCNConv
from .gcn import PackedGCNConv, QuantizedGCNConv
from .gin import PackedGINConv, QuantizedGINConv
from .hops import (
    PackedLGConv,
    PackedSGConv,
    PackedSSGConv,
    PackedTAGConv,
    QuantizedLGConv,
    QuantizedSGConv,
    QuantizedSSGConv,
    QuantizedTAGConv,
)
from .sage import PackedSAGEConv, QuantizedSAGEConv

__all__ = [
    "Convolution",
    "Frozen",
    "Mapped",
    "PackedDeepGCNConv",
    "PackedGATConv",
    "PackedGATv2Conv",
    "PackedGCNConv",
    "PackedGINConv",
    "PackedLGConv",
    "PackedPropagation",
    "PackedSAGEConv",
    "PackedSGConv",
    "PackedSSGConv",
    "PackedTAGConv",
    "QuantizedAPPNP",
    "QuantizedGATConv",
    "QuantizedGATv2Conv",
    "QuantizedGCNConv",
    "QuantizedGINConv",
    "QuantizedLGConv",
    "QuantizedSAGEConv",
    "QuantizedSGConv",
    "QuantizedSMPropagation",
    "QuantizedSSGConv",
    "QuantizedTAGConv",
    "Trainable",
    "trainable",
]
