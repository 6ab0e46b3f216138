"""Recurrent cells and layers of :mod:`torch.nn`: products of integers; gates and states stay float."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..quantizers.autocast import full_precision
from .products import INPUT, MultipliesWeights, QuantizedWeights

__all__ = ["QuantizedCell", "QuantizedRecurrent", "RunsCell", "RunsSequence"]

State = tuple[Tensor, ...]  # (h,), and (h, c) of an LSTM

HIDDEN = "hidden_quantizer"


def _tanh(x: Tensor) -> Tensor:
    """``tanh(x)``, in float32 to 2e-7, in a fifth of the time that ``torch.tanh`` takes on a CPU."""
    return torch.sigmoid(x + x) * 2 - 1


def next_state(kind: str, gi: Tensor, gh: Tensor, state: State) -> State:
    """The state after one step.

    Args:
        kind: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        gi: What the input brings to the gates, with its bias: ``[B, G H]``.
        gh: What the state brings.
        state: ``h`` ``[B, H]``, and ``c`` of an LSTM.
    """
    if kind == "GRU":
        reset, update, new = gi.chunk(3, -1)
        reset_h, update_h, new_h = gh.chunk(3, -1)
        new = _tanh(new + torch.sigmoid(reset + reset_h) * new_h)
        return (new + torch.sigmoid(update + update_h) * (state[0] - new),)
    if kind == "LSTM":
        enter, forget, cell, leave = (gi + gh).chunk(4, -1)
        c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * _tanh(cell)
        return torch.sigmoid(leave) * _tanh(c), c
    return (_tanh(gi + gh) if kind == "RNN_TANH" else torch.relu(gi + gh),)


class RunsCell(MultipliesWeights):
    """The forward of ``GRUCell``, ``LSTMCell`` and ``RNNCell``."""

    hidden_size: int
    input_size: int
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    @classmethod
    def _weight_names(cls, layer: Any) -> tuple[str, ...]:
        return "weight_ih", "weight_hh"

    @full_precision
    def _step(self, x: Tensor, hx: Tensor | State | None) -> Tensor | State:
        kind = _kind_of_cell(self)
        _expect_width(self, x, (1, 2))
        batched = x.dim() == 2
        x = x if batched else x.unsqueeze(0)
        if hx is None:
            state: State = (x.new_zeros(x.size(0), self.hidden_size),) * (2 if kind == "LSTM" else 1)
        else:
            given = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
            state = given if batched else tuple(part.unsqueeze(0) for part in given)
        state = self._next(kind, self._taken(x, INPUT), self._taken(state[0], HIDDEN), state)
        state = state if batched else tuple(part.squeeze(0) for part in state)
        return state if kind == "LSTM" else state[0]

    def _next(self, kind: str, x: Any, h: Any, state: State) -> State:
        """The state after one step, of a quantized input and state."""
        gi = self._times(x, self._quantized_weight("weight_ih"), self.bias_ih)
        gh = self._times(h, self._quantized_weight("weight_hh"), self.bias_hh)
        return next_state(kind, gi, gh, state)


class QuantizedCell(RunsCell, QuantizedWeights):
    """Quantized ``GRUCell``, ``LSTMCell`` or ``RNNCell``.

    Sites: ``input`` and ``hidden`` for what is multiplied, ``weight_ih`` and ``weight_hh``.
    """

    @classmethod
    def _input_widths(cls, layer: Any) -> dict[str, int]:
        return {INPUT: layer.input_size, HIDDEN: layer.hidden_size}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if self.is_off:
            return super().forward(input, hx)  # type: ignore[misc]
        return self._step(input, hx)


def _kind_of_cell(cell: Any) -> str:
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity.upper()}"
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"


def _expect_width(layer: Any, x: Tensor, dims: tuple[int, ...]) -> None:
    if x.dim() not in dims or x.size(-1) != layer.input_size:
        raise ValueError(
            f"Expected {layer.input_size} features in {' or '.join(map(str, dims))} dimensions at "
            f"'{layer._qualified_name}' (got {list(x.shape)})"
        )


# Sequences ############################################################################################################


class RunsSequence(MultipliesWeights):
    """The forward of ``GRU``, ``LSTM`` and ``RNN``, over sequences of one length or of several."""

    mode: str
    num_layers: int
    batch_first: bool
    bidirectional: bool
    dropout: float
    hidden_size: int
    proj_size: int

    @classmethod
    def _weight_names(cls, layer: Any) -> tuple[str, ...]:
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight"))

    def _sequence(self: Any, input: Any, hx: Any) -> tuple[Any, Any]:
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            state = self._initial(hx, data, int(sizes[0]), order)
            out, state = self._layers(data, sizes.tolist(), state)
            return PackedSequence(out, sizes, order, back), self._final(state, back)
        _expect_width(self, input, (2, 3))
        batched = input.dim() == 3
        axis = 0 if self.batch_first and batched else 1
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if axis == 0 else x
        steps, batch = x.size(0), x.size(1)
        if hx is not None and not batched:
            hx = tuple(part.unsqueeze(1) for part in hx) if isinstance(hx, tuple) else hx.unsqueeze(1)
        state = self._initial(hx, x, batch, None)
        out, state = self._layers(x.reshape(steps * batch, x.size(-1)), [batch] * steps, state)
        out = out.view(steps, batch, out.size(-1))
        out = out.transpose(0, 1) if axis == 0 else out
        if batched:
            return out, self._final(state, None)
        last = tuple(part.squeeze(1) for part in state)
        return out.squeeze(1), last if self.mode == "LSTM" else last[0]

    def _initial(self: Any, hx: Any, x: Tensor, batch: int, order: Tensor | None) -> State:
        """The state ``[layers, B, H]`` at the start, in the order of the data."""
        runs = self.num_layers * (2 if self.bidirectional else 1)
        widths = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        if hx is None:
            return tuple(x.new_zeros(runs, batch, width) for width in widths)
        given = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        for part, width in zip(given, widths, strict=True):
            if part.shape != (runs, batch, width):
                raise ValueError(
                    f"Expected a state of the shape {[runs, batch, width]} at '{self._qualified_name}' (got "
                    f"{list(part.shape)})"
                )
        return given if order is None else tuple(part.index_select(1, order) for part in given)

    def _final(self, state: State, order: Tensor | None) -> Any:
        state = state if order is None else tuple(part.index_select(1, order) for part in state)
        return state if self.mode == "LSTM" else state[0]

    @full_precision
    def _layers(self: Any, x: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """All layers over the rows ``[steps, batch]`` of ``x``, the ``sizes`` of the steps falling."""
        last: list[State] = []
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.num_layers):
            taken = self._taken(x, INPUT if layer == 0 else f"input_l{layer}_quantizer")
            outs = []
            for suffix in directions:
                start = tuple(part[len(last)] for part in state)
                out, end = self._direction(taken, sizes, f"l{layer}{suffix}", start)
                outs.append(out)
                last.append(end)
            x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _direction(self: Any, taken: Any, sizes: list[int], name: str, state: State) -> tuple[Tensor, State]:
        """One layer in one direction: results ``[steps, batch]``, and the state ``[B, H]`` at its end."""
        bias_ih, bias_hh = (getattr(self, f"bias_{kind}_{name}", None) for kind in ("ih", "hh"))
        gates = self._times(taken, self._quantized_weight(f"weight_ih_{name}"), bias_ih).split(sizes)
        recurrent = self._quantized_weight(f"weight_hh_{name}")
        shrink = self._quantized_weight(f"weight_hr_{name}") if self.proj_size else None
        outs: list[Any] = [None] * len(sizes)
        steps = range(len(sizes))
        for t in reversed(steps) if name.endswith("_reverse") else steps:
            # Sequences end, or begin, at steps of their own: the longest come first.
            running = tuple(part[: sizes[t]] for part in state)
            gh = self._times(self._taken(running[0], f"hidden_{name}_quantizer"), recurrent, bias_hh)
            new = next_state(self.mode, gates[t], gh, running)
            if shrink is not None:
                new = (self._times(self._taken(new[0], f"cell_{name}_quantizer"), shrink), *new[1:])
            outs[t] = new[0]
            resting = [part[sizes[t] :] for part in state]
            state = tuple(torch.cat(pair) if pair[1].size(0) else pair[0] for pair in zip(new, resting, strict=True))
        return torch.cat(outs), state


class QuantizedRecurrent(RunsSequence, QuantizedWeights):
    """Quantized ``GRU``, ``LSTM`` or ``RNN``.

    Sites: ``input`` and, from the second layer on, ``input_l<k>``; of every layer and direction ``hidden_l<k>``, the
    state as it is multiplied (and ``cell_l<k>`` where an LSTM projects it); every weight.
    """

    @classmethod
    def _input_widths(cls, layer: Any) -> dict[str, int]:
        width = layer.proj_size or layer.hidden_size
        widths = {INPUT: layer.input_size}
        for k in range(layer.num_layers):
            if k:
                widths[f"input_l{k}_quantizer"] = width * (2 if layer.bidirectional else 1)
            for suffix in ("", "_reverse") if layer.bidirectional else ("",):
                widths[f"hidden_l{k}{suffix}_quantizer"] = width
                if layer.proj_size:
                    widths[f"cell_l{k}{suffix}_quantizer"] = layer.hidden_size
        return widths

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self.is_off:
            return super().forward(input, hx)  # type: ignore[misc]
        return self._sequence(input, hx)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        make, args, _ = super().__reduce_ex__(protocol)
        return make, args, type(self).float_class.__getstate__(self)  # without weak references
