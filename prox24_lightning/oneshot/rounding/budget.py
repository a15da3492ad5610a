"""Which layers of a model in 8 bits keep 16 bits, so that its loss rises by no more than the user accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.calls.hooks import remove_all
from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.calibration.output_divergence import OutputDivergence
from prox24_lightning.calibration.rounded_inputs import rounded_inputs
from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.utils.markdown import markdown_table
from prox24_lightning.weights.rounding import RoundedForm

_NUDGED = 16
"""One output in so many has its last bit changed: too little to count, enough to round otherwise ever after."""


@dataclass(frozen=True)
class RoundingPrice:
    """What 8 bits cost in layers that share an input, and what they save.

    Attributes:
        names: of the layers, which take one form: servers run such layers as one.
        rise: of the model's loss with these layers alone in 8 bits, inputs and all
            (:class:`LossRise`).
        gain: the time that 8 bits save, in any unit that is the same for all layers.
    """

    names: tuple[str, ...]
    rise: float
    gain: float


@dataclass(frozen=True)
class RoundingBudget:
    """Result of :func:`within_rise`.

    Attributes:
        prices: of all layers, those that cost most for what they save first.
        kept: names of the layers that keep 16 bits.
        rise: of the loss with all the others in 8 bits, measured together.
        rise_without: with all layers in 8 bits.
    """

    prices: tuple[RoundingPrice, ...]
    kept: tuple[str, ...]
    rise: float
    rise_without: float

    @property
    def gain_left(self) -> float:
        """Share of the time that 8 bits would save in all layers which the choice saves."""
        kept = set(self.kept)
        whole = sum(price.gain for price in self.prices)
        return sum(price.gain for price in self.prices if not kept.issuperset(price.names)) / whole if whole else 1.0

    def table(self, rows: int = 12) -> str:
        """Return the most expensive layers as a table in Markdown."""
        kept = set(self.kept)
        whole = sum(price.gain for price in self.prices)
        lines = [
            (
                ", ".join(price.names),
                f"{price.rise:.6f}",
                f"{100 * price.gain / whole:.2f} %" if whole else "",
                "16 bits" if kept.issuperset(price.names) else "8 bits",
            )
            for price in self.prices[:rows]
        ]
        return markdown_table(("layers", "rise of the loss (nats)", "share of the gain", "form"), lines)


class RoundedLayers:
    """Layers that can be switched between 16 and 8 bits: weights, and the inputs that they see.

    Args:
        layers: by name; their weights are the rounded ones now.
        exact: the weights of 16 bits, by the same names, on the CPU.
        form: of the rounded ones.
    """

    def __init__(self, layers: Mapping[str, nn.Module], exact: Mapping[str, Tensor], form: RoundedForm) -> None:
        self._layers = dict(layers)
        self._exact = dict(exact)
        self._form: RoundedForm = form
        self._rounded = {name: layer.get_parameter("weight").detach().cpu().clone() for name, layer in layers.items()}
        self._now = set(layers)

    @contextmanager
    def inputs_too(self, names: Iterable[str]) -> Iterator[None]:
        """Put the weights of ``names`` alone into 8 bits, and round their inputs as long as the context lasts."""
        names = set(names)
        self.round(names)
        with rounded_inputs([self._layers[name] for name in names], self._form):
            yield

    @torch.no_grad()
    def round(self, names: Iterable[str]) -> None:
        """Put the weights of ``names`` into 8 bits, and all others into 16."""
        names = set(names)
        for name in names ^ self._now:
            values = (self._rounded if name in names else self._exact)[name]
            self._layers[name].get_parameter("weight").copy_(values)
        self._now = names

    @contextmanager
    def nudged(self, names: Iterable[str]) -> Iterator[None]:
        """Put all weights into 16 bits, and move some outputs of ``names`` by their last bit."""
        self.round(())
        handles = [self._layers[name].register_forward_hook(_nudge) for name in names]
        try:
            yield
        finally:
            remove_all(handles)


def _nudge(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    moved = output.clone()
    moved[..., ::_NUDGED] *= 1 + torch.finfo(output.dtype).eps
    return moved


class LossRise:
    """The rise of a model's loss with some of its layers in 8 bits: the divergence of its outputs, in nats.

    Arithmetic of 16 bits rounds in another way after any change, however small: of SmolLM2-135M in bfloat16 a last bit
    in one layer makes 0.0016 nats. That is no rise, and more than 8 bits cost in most single layers, so what the same
    layers give with last bits changed is taken off.

    Args:
        switch: between the forms of the layers.
        divergence: from the model with all layers in 16 bits.
    """

    def __init__(self, switch: RoundedLayers, divergence: OutputDivergence) -> None:
        self._switch = switch
        self._divergence = divergence

    def __call__(self, names: Iterable[str]) -> float:
        """Return the rise with only the layers of ``names`` in 8 bits, inputs too: 0 or more, infinity for NaN."""
        names = list(names)
        with self._switch.nudged(names):
            noise = self._divergence()
        with self._switch.inputs_too(names):
            rise = self._divergence() - noise
        return max(0.0, rise) if math.isfinite(rise) else math.inf


def rounding_prices(
    layers: Mapping[str, nn.Module],
    rise: Callable[[Sequence[str]], float],
    run: Callable[[], Any],
    times: LayerTimes | None = None,
    *,
    step: Callable[[int, str], None] = lambda layers, name: None,
) -> list[RoundingPrice]:
    """Return the price of the layers of each input, measured with these alone in 8 bits.

    Args:
        layers: by name.
        rise: of the loss with the layers of these names alone in 8 bits.
        run: calls the whole model on one batch.
        times: by layer: in 16 and in 8 bits; None goes by multiply-adds.
        step: called with the number of further layers measured, and the name of one.
    """
    names = {layer: name for name, layer in layers.items()}
    prices = []
    for group in find_input_groups(list(layers.values()), run):
        members = tuple(names[layer] for layer in group.layers)
        prices.append(RoundingPrice(members, rise(members), sum(_gain(name, layers[name], times) for name in members)))
        step(len(members), members[0])
    return prices


def _gain(name: str, layer: nn.Module, times: LayerTimes | None) -> float:
    if times is None:
        return float(layer.get_parameter("weight").numel())
    exact, rounded = times[name]
    return max(0.0, exact - rounded)


def within_rise(
    prices: Sequence[RoundingPrice], measured: Callable[[Sequence[str]], float], max_rise: float
) -> RoundingBudget:
    """Choose the layers that keep 16 bits: those that cost most for what they save, as few as the bound takes.

    The rises of single layers do not add up exactly. So they give the order alone, and how many of them are kept is
    found by bisection on the measured rise of all the others together.

    Args:
        prices: of all layers.
        measured: returns the rise with the layers of these names in 8 bits.
        max_rise: that is accepted, in the unit of ``prices``.
    """
    order = sorted(prices, key=lambda price: price.rise / price.gain if price.gain else float("inf"), reverse=True)

    def rounded(kept: int) -> list[str]:
        return [name for price in order[kept:] for name in price.names]

    without = measured(rounded(0))
    low, high, rise = 0, len(order), 0.0  # with ``low`` kept the rise is beyond the bound, with ``high`` within
    if without <= max_rise:
        high, rise = 0, without
    while high - low > 1:
        middle = (low + high) // 2
        if (found := measured(rounded(middle))) <= max_rise:
            high, rise = middle, found
        else:
            low = middle
    kept = tuple(name for price in order[:high] for name in price.names)
    return RoundingBudget(tuple(order), kept, rise, without)
