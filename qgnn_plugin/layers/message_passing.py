"""Message passing: the base of every converted convolution, and the generic path for any other ``MessagePassing``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantizers import QLRQuantizer
from ..quantizers.autocast import is_autocasting
from ..smp.constraint import SmoothLayer, attach_constraint
from .base import QuantizedLayer, QuantizerDict, SiteFactory
from .graph import gcn_graph

__all__ = ["QuantizedConv", "QuantizedMessagePassing", "require_sum"]

# Arguments of `propagate` that hold per-node scalars of an attention mechanism or a normalization: these stay wider.
LOGIT_ARGUMENTS = frozenset({"alpha", "alpha_l", "alpha_r", "norm", "deg", "score", "index"})


def require_sum(layer: Any, sites: SiteFactory) -> None:
    """Refuse to convert a layer that is a sum over neighbours by definition, and was made with another aggregation.

    Raises:
        ValueError: If it was.
    """
    if layer.aggr not in ("add", "sum"):
        raise ValueError(
            f"Expected the aggregation 'add' in '{sites.name}', a {type(layer).__name__} (got {layer.aggr!r}): its "
            f"quantized form sums over neighbours; exclude the layer"
        )


class QuantizedConv(QuantizedLayer, SmoothLayer):
    """Base of converted ``MessagePassing`` layers: a smoothness constraint around ``propagate``."""

    flow: str
    explain: bool | None
    decomposed_layers: int

    def quantized_propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Tensor:
        """Quantize the node features among ``kwargs``, run the layer's own ``propagate``, smooth its change.

        Becomes ``propagate`` of the concrete class (see :func:`~qgnn_plugin.layers.base.quantized_class`).
        """
        x = kwargs.get("x")
        pair = isinstance(x, (tuple, list))
        bipartite = isinstance(x, (tuple, list)) and x[1] is not x[0]
        kwargs = self.quantized_arguments(kwargs)
        out = self.float_propagate(edge_index, size, **kwargs)
        x = kwargs["x"][0] if pair else kwargs.get("x")
        # x may have been quantized; the constraint is on what the layer does to what it propagates.
        if self.smp is None or bipartite or not isinstance(x, Tensor) or x.shape != out.shape or not self._is_square(x):
            return out
        if not (self.training or self.is_smoothing):
            return out
        graph = gcn_graph(edge_index, None, x.size(0), flow=self.flow, dtype=x.dtype)
        return self.smooth(x, out, graph.apply, graph.plan.num_edges)

    def quantized_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Replace the node features a layer sends by their quantized values; nothing to do by default."""
        return kwargs

    def float_propagate(self, edge_index: Any, size: Any, **kwargs: Any) -> Tensor:
        """The original ``propagate`` of the layer's own class."""
        cls: Any = type(self).float_class
        generated = not self.explain and self.decomposed_layers == 1
        original = cls.propagate if generated else getattr(cls, "_orig_propagate", cls.propagate)
        return original(self, edge_index, size=size, **kwargs)

    def _is_square(self, x: Tensor) -> bool:
        return x.dim() == 2 and getattr(self, "node_dim", -2) in (-2, 0)

    def refuse_explain(self) -> None:
        """Explanation masks act inside PyG's ``propagate``, which a converted layer of this kind does not run."""
        if self.explain:
            raise NotImplementedError(
                f"Expected '{self.layer_name}' not to be in explain mode while quantized; "
                f"explain the plain model: qgnn_plugin.restore_model(model)"
            )


class QuantizedMessagePassing(QuantizedConv):
    """Generic path: every node-feature argument that a layer sends (``*_j``) is quantized once per node.

    Inner linear layers are converted on their own; attention logits, edge features and the aggregation stay wider.
    """

    argument_quantizers: QuantizerDict

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        sent = sorted({name[:-2] for name in layer._user_args if name.endswith("_j")} - LOGIT_ARGUMENTS)
        layer.argument_quantizers = QuantizerDict({name: sites.message(f"message.{name}") for name in sent})
        attach_constraint(layer, sites.config.smp, sites.device)

    def quantized_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        out = dict(kwargs)
        for name, quantizer in self.argument_quantizers.items():
            assert isinstance(quantizer, QLRQuantizer)
            if name in out and quantizer.bits != 32:
                out[name] = _quantize_values(out[name], quantizer)
        return out


def _quantize_values(value: Any, quantizer: QLRQuantizer) -> Any:
    """Quantize a float tensor, or the source half of a bipartite pair; leave anything else alone."""
    if isinstance(value, (tuple, list)):
        return (_quantize_values(value[0], quantizer), *value[1:])
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.layout == torch.strided:
        return quantizer(value.float() if is_autocasting() else value).dequantize()
    return value
