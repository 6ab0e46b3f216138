"""Bit widths per site under a budget: the sensitivity of each, the frontier that follows, and a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration import calibrate
from ..config import OFF, QuantConfig
from ..conversion.convert import quantize_model
from ..conversion.converted import is_quantized, quantized_layers, quantizers
from ..inputs import run_model
from ..packing import is_packed, pack_model
from .comparison import median_seconds, score
from .suggestion import WIDTHS, Budget, Choice, Site, Suggestion

__all__ = ["Budget", "Choice", "Suggestion", "suggest_bits"]

WIDEST = WIDTHS[0]
DELAY = 2.0  # seconds until a bar appears
TIMED = 0.5  # seconds to time each packed model
CHOSEN = ("bits", "input_bits", "weight_bits", "activation_bits", "message_bits", "attention_bits")


Widths = tuple[int, ...]  # of every site, in order


def suggest_bits(
    model: nn.Module,
    data: Any,
    *,
    budget: Budget | int,
    config: QuantConfig | None = None,
    progress: bool = False,
) -> Suggestion:
    r"""Propose a width of 8, 4 or 2 bits for every site of a trained float model under a budget.

    Each site alone is set to 4 and to 2 bits, the others to 8, and its loss measured on validation nodes: how far the
    predictions move from the float model's.  From 8 bits everywhere the step that loses least per byte (or second) it
    saves comes first, then the next, down to 2 bits everywhere; every model on this path is measured as a whole.  The
    proposal is the best of those within the budget, and what is left of the budget buys back the most sensitive sites.
    Nothing is trained and no test label read; train the proposal with :func:`qgnn_plugin.recipe.fit_quantized`.

    Attention numerators stay at 8 bits, and inputs of zeros and ones at the one bit that holds them exactly.

    Args:
        model: A trained float model; it is left untouched.
        data: One graph, with ``y`` and ``val_mask`` for the accuracy; without a mask all rows count.
        budget: A :class:`Budget`; a plain number is one of bytes.
        config: Everything else about the conversion; overrides of other fields than widths are kept.
        progress: Show a bar where it takes longer than two seconds.

    Raises:
        ValueError: If ``model`` is converted or packed, or the budget is none.
        TypeError: If ``data`` do not fit ``model``.
    """
    if is_packed(model) or is_quantized(model):
        raise ValueError("Expected a float model (got a converted one); restore it: qgnn_plugin.restore_model(qmodel)")
    budget = budget if isinstance(budget, Budget) else Budget(bytes=budget)
    search = _Search(model.eval(), data, config or QuantConfig(), budget, progress)
    try:
        return search.run()
    finally:
        search.bar.close()


class _Search:
    """One run of :func:`suggest_bits`."""

    def __init__(self, model: nn.Module, data: Any, config: QuantConfig, budget: Budget, progress: bool) -> None:
        self.model, self.data, self.config, self.budget = model, data, _without_widths(config), budget
        self.bar: tqdm[Any] = tqdm(desc="convert", unit="model", delay=DELAY, leave=False, disable=not progress)
        with torch.no_grad():
            self.expected: Tensor = run_model(model, data)
        mask = getattr(data, "val_mask", None)
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 1 else None
        # Ranges are searched on what the unquantized model does, so that they do not depend on other sites' widths.
        self.ranges = {width: self._uniform(width) for width in WIDTHS}
        self.sites = _sites(self.ranges[WIDEST], data)
        if not self.sites:
            raise ValueError("Expected a model with sites to choose widths for (got none that is quantized)")
        self.measured: dict[Widths, Choice] = {}
        self.times = self._times() if budget.seconds is not None else None

    def run(self) -> Suggestion:
        count = len(self.sites)
        self.bar.total = len(WIDTHS) + (len(WIDTHS) - 1) * (2 * count + 1)
        uniform = {width: self.measure((width,) * count) for width in WIDTHS}
        losses = [self._losses(place, uniform[WIDEST].loss) for place in range(count)]
        path = _path(losses, [[self.cost(s, w) for w in WIDTHS] for s in self.sites])
        chosen = self._choose([self.measure(widths) for widths in path])
        widths = tuple(chosen.widths[site.name] for site in self.sites)
        if self.budget.drop is None:
            chosen = self._filled(widths, losses)
            widths = tuple(chosen.widths[site.name] for site in self.sites)
        seconds = self._time(self._mixed(widths)) if self.budget.seconds is not None else None
        sensitivity = {
            site.name: dict(zip(WIDTHS, values, strict=True)) for site, values in zip(self.sites, losses, strict=True)
        }
        return Suggestion(
            self._config(widths),
            chosen,
            sorted(self.measured.values(), key=lambda choice: -choice.bytes),
            uniform,
            self._accuracy(self.expected),
            sensitivity,
            seconds,
            self._within(chosen, seconds),
            self.budget,
        )

    def cost(self, site: Site, width: int) -> float:
        """What a site costs at a width, in what the budget counts."""
        if self.times is None:
            return float(site.bytes(width))
        return self.times[width] * site.bytes(WIDEST) / sum(other.bytes(WIDEST) for other in self.sites)

    def measure(self, widths: Widths) -> Choice:
        """What a model of these widths does."""
        if widths not in self.measured:
            self.bar.set_description("measure", refresh=False)
            with torch.no_grad():
                outputs = run_model(self._mixed(widths), self.data)
            pairs = list(zip(self.sites, widths, strict=True))
            self.measured[widths] = Choice(
                {site.name: width for site, width in pairs},
                sum(site.bytes(width) for site, width in pairs),
                None if self.times is None else sum(self.cost(site, width) for site, width in pairs),
                self._loss(outputs),
                self._accuracy(outputs),
            )
            self.bar.update()
        return self.measured[widths]

    # Choosing #########################################################################################################

    def _losses(self, place: int, least: float) -> list[float]:
        """The loss of a site alone at every width, which does not fall as widths do."""
        found = [least]
        for width in WIDTHS[1:]:
            widths = tuple(width if i == place else WIDEST for i in range(len(self.sites)))
            found.append(max(found[-1], self.measure(widths).loss))
        return found

    def _spent(self, choice: Choice) -> float:
        return float(choice.bytes) if choice.seconds is None else choice.seconds

    def _within(self, choice: Choice, seconds: float | None = None) -> bool:
        if self.budget.drop is not None:
            return choice.accuracy >= self._accuracy(self.expected) - self.budget.drop
        limit = self.budget.bytes if self.budget.seconds is None else self.budget.seconds
        return (self._spent(choice) if seconds is None else seconds) <= float(limit or 0)

    def _choose(self, path: list[Choice]) -> Choice:
        inside = [choice for choice in path if self._within(choice)]
        if self.budget.drop is not None:
            return min(inside, key=lambda c: c.bytes) if inside else max(path, key=lambda c: c.accuracy)
        return min(inside, key=lambda c: (c.loss, c.bytes)) if inside else min(path, key=self._spent)

    def _filled(self, widths: Widths, losses: list[list[float]]) -> Choice:
        """Spend what is left of the budget on the sites that lose most, as long as that helps."""
        best = self.measure(widths)
        while True:
            wider = []
            for place, width in enumerate(widths):
                if width == WIDEST:
                    continue
                step = WIDTHS.index(width)
                more = self.cost(self.sites[place], WIDTHS[step - 1]) - self.cost(self.sites[place], width)
                gain = losses[place][step] - losses[place][step - 1]
                wider.append((gain / max(more, 1e-30), (*widths[:place], WIDTHS[step - 1], *widths[place + 1 :])))
            for _, candidate in sorted(wider, reverse=True):
                spent = sum(self.cost(site, width) for site, width in zip(self.sites, candidate, strict=True))
                if spent <= float(self.budget.bytes or self.budget.seconds or 0):
                    found = self.measure(candidate)
                    if found.loss < best.loss:
                        best, widths = found, candidate
                        break
            else:
                return best

    # Models ###########################################################################################################

    def _config(self, widths: Widths) -> QuantConfig:
        """The configuration of these widths, every site spelled out."""
        layers: dict[str, dict[str, Any]] = {}
        for site, width in zip(self.sites, widths, strict=True):
            fields = ("input_bits", "activation_bits") if site.kind == "input" else (f"{site.kind}_bits",)
            layers.setdefault(site.layer, {}).update(dict.fromkeys(fields, width))
        overrides = {pattern: dict(changes) for pattern, changes in self.config.overrides.items()}
        for layer, changes in layers.items():
            overrides[layer] = {**overrides.get(layer, {}), **changes}
        return replace(self.config, bits=WIDEST, attention_bits=WIDEST, overrides=overrides)

    def _uniform(self, width: int) -> nn.Module:
        config = replace(self.config, bits=width, attention_bits=WIDEST)
        return calibrate(quantize_model(self.model, config=config), self.data, method="ranges").eval()

    def _mixed(self, widths: Widths) -> nn.Module:
        """A converted model of these widths with its ranges."""
        config = self._config(widths)
        qmodel = quantize_model(self.model, config=config).eval()
        own = quantizers(qmodel)
        sources = {width: quantizers(uniform) for width, uniform in self.ranges.items()}
        if any(set(own) != set(source) for source in sources.values()):  # sites that only data decide on
            return calibrate(qmodel, self.data, method="ranges").eval()
        for name, quantizer in own.items():
            if quantizer.bits != OFF:
                quantizer.load_state_dict(sources[quantizer.bits][name].state_dict())
        return qmodel

    def _times(self) -> dict[int, float]:
        """Time of one width everywhere, by width."""
        packed = {width: pack_model(uniform) for width, uniform in self.ranges.items()}
        with torch.no_grad():
            for each in packed.values():
                run_model(each, self.data)
            runs = {str(width): partial(run_model, each, self.data) for width, each in packed.items()}
            found = median_seconds(runs, TIMED)
        return {width: found[str(width)] for width in WIDTHS}

    def _time(self, qmodel: nn.Module) -> float:
        packed = pack_model(qmodel)
        with torch.no_grad():
            run_model(packed, self.data)
            return median_seconds({"": lambda: run_model(packed, self.data)}, TIMED)[""]

    # Scores ###########################################################################################################

    def _rows(self, outputs: Tensor) -> Tensor:
        return outputs if self.mask is None else outputs[self.mask]

    @property
    def _is_regression(self) -> bool:
        y = getattr(self.data, "y", None)
        measures = isinstance(y, Tensor) and y.is_floating_point()
        return measures or self.expected.dim() < 2 or self.expected.size(1) == 1

    def _loss(self, outputs: Tensor) -> float:
        found, expected = self._rows(outputs), self._rows(self.expected)
        if self._is_regression:
            return float((found - expected).square().mean())
        return float(F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True))

    def _accuracy(self, outputs: Tensor) -> float:
        y = getattr(self.data, "y", None)
        if isinstance(y, Tensor) and y.size(0) == outputs.size(0):
            return score(outputs, y, self.mask)
        return score(self._rows(outputs), self._rows(self.expected).argmax(-1))


def _without_widths(config: QuantConfig) -> QuantConfig:
    """Everything of a configuration that is no width of an input, weight, activation or message."""
    overrides = {
        pattern: {name: value for name, value in changes.items() if name not in CHOSEN}
        for pattern, changes in config.overrides.items()
    }
    return replace(
        config, input_bits=None, weight_bits=None, activation_bits=None, message_bits=None, overrides=overrides
    )


def _sites(qmodel: nn.Module, data: Any) -> list[Site]:
    """The sites of a converted model whose widths matter, with what passes them in a forward pass."""
    shapes: dict[str, tuple[int, int]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, quantizer in quantizers(qmodel).items():
            if quantizer.bits == OFF or quantizer.is_zero_one or not quantizer.is_set:
                continue

            def note(site: nn.Module, args: Any, out: Any, name: str = name) -> None:
                shape = tuple(args[0].shape)
                shapes.setdefault(name, (args[0].numel() // max(1, shape[-1]), shape[-1]))

            stack.callback(quantizer.register_forward_hook(note).remove)
        run_model(qmodel, data)
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    layers = quantized_layers(qmodel)
    for name, shape in shapes.items():
        layer = max((n for n in layers if not n or name.startswith(f"{n}.")), key=len)
        own = name.removeprefix(f"{layer}.")
        kind = next((kind for kind in ("input", "weight", "output") if kind in own), "message")
        if kind != "output":
            found.setdefault((layer, kind), []).append(shape)
    return [Site(layer, kind, tuple(rows)) for (layer, kind), rows in found.items()]


def _path(losses: list[list[float]], costs: list[list[float]]) -> list[Widths]:
    """From the widest everywhere to the narrowest, the step that loses least for what it saves first.

    A site may go down by two steps at once where that loses less for what it saves than the first of them: the path
    then follows the lower convex hull of each site's losses, on which no mixture of its points is better.
    """
    steps = [0] * len(losses)
    path = [tuple(WIDTHS[step] for step in steps)]
    while any(step < len(WIDTHS) - 1 for step in steps):
        moves: Iterable[tuple[float, int, int]] = (
            (
                (losses[place][to] - losses[place][step]) / max(costs[place][step] - costs[place][to], 1e-30),
                place,
                to,
            )
            for place, step in enumerate(steps)
            for to in range(step + 1, len(WIDTHS))
        )
        _, place, to = min(moves)
        steps[place] = to
        path.append(tuple(WIDTHS[step] for step in steps))
    return path
