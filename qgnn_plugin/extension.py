"""What a layer type of your own is converted and packed with; ``examples/custom_layer.py`` shows all of it.

Any :class:`~torch_geometric.nn.MessagePassing` is converted without this, by what its nodes send.  A layer type with
arithmetic of its own on codes, and kernels for it, is told once: a mixin on :class:`Convolution` whose ``attach`` makes
the *sites* (quantizers) and whose ``forward`` computes from the codes that these give, by the primitives of
:class:`Convolution`.  Two classes execute it:

* on :class:`Trainable`, under :func:`trainable`, it is the converted layer: a site gives a
  :class:`~qgnn_plugin.QuantizedTensor`, codes and their range, with gradients;
* on :class:`Frozen`, under :func:`inference`, it is the packed layer: a site (:class:`PackedRange`) gives packed codes
  (:class:`PackedTensor`), and results are handed on before their floats are written.

What the primitives do not cover takes a :class:`QuantizedConv` and a :class:`PackedConv` with a ``forward`` each.  All
of them are mixins: the classes that run are made of them and of the layer's own class, so that ``isinstance`` and the
class's name hold.  :func:`register_layer` ties them to the layer type.
"""

from .convs.base import Convolution, Frozen, Mapped, Trainable, trainable
from .graph.adjacency import NormalizedGraph, gcn_graph, mean_graph, plain_graph
from .graph.samples import Samples
from .layers.arithmetic import aggregate_sum
from .layers.base import QuantizedLayer, SiteFactory
from .layers.message_passing import QuantizedConv
from .layers.registry import register_layer as register_conversion
from .packing.layers.base import PackedLayer, register_packed
from .packing.layers.conv import PackedConv
from .packing.layers.guard import inference
from .packing.layers.ranges import PackedRange, PackedTensor
from .smp.constraint import attach_constraint

__all__ = [
    "Convolution",
    "Frozen",
    "Mapped",
    "NormalizedGraph",
    "PackedConv",
    "PackedLayer",
    "PackedRange",
    "PackedTensor",
    "QuantizedConv",
    "QuantizedLayer",
    "Samples",
    "SiteFactory",
    "Trainable",
    "aggregate_sum",
    "attach_constraint",
    "gcn_graph",
    "inference",
    "mean_graph",
    "plain_graph",
    "register_layer",
    "trainable",
]


def register_layer(
    layer_class: type, mixin: type[QuantizedLayer], packed: type[PackedLayer] | None = None
) -> None:
    """Convert layers of ``layer_class`` by ``mixin``, and pack them by ``packed``.

    Subclasses that change nothing the layer computes with follow, and so do those that put something before or after
    ``super().forward``, if it is no ``MessagePassing``; others are converted as any ``MessagePassing``.

    Args:
        layer_class: A ``torch.nn.Module`` class.
        mixin: What converts it.
        packed: What packs the converted layer; without one it runs on dequantized floats, as ``summary`` says.

    Raises:
        TypeError: If one of them is no such class.
    """
    if packed is not None and not (isinstance(packed, type) and issubclass(packed, PackedLayer)):
        raise TypeError(f"Expected a PackedLayer class as 'packed' (got {packed!r})")
    register_conversion(layer_class, mixin)
    if packed is not None:
        register_packed(mixin, packed)
