"""Spend a budget of time on the layers that 2:4 hurts most for what they gain: a knapsack."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

_STEPS = 2000
"""The budget is cut into so many equal parts; a layer takes whole ones, rounded up."""


@dataclass(frozen=True)
class LayerPrice:
    """What a layer costs as 2:4, and what it gains.

    Attributes:
        name: of the weight.
        loss: by how much the model's loss rises when this layer alone is 2:4; nats of a language model.
        local_loss: lost share of the squared norm of its own output.
        dense_time, sparse_time: of its product, in any unit that is the same for all layers.
    """

    name: str
    loss: float
    local_loss: float
    dense_time: float
    sparse_time: float

    @property
    def gain(self) -> float:
        """The time that 2:4 saves; 0 if it saves none."""
        return max(0.0, self.dense_time - self.sparse_time)


def choose_dense(prices: Sequence[LayerPrice], budget: float) -> frozenset[str]:
    """Return the layers to leave dense: together they save most loss, and give back at most ``budget`` of the gain.

    Layers that gain nothing stay dense at any budget. Exact but for the rounding of times to a two-thousandth of the
    budget; two layers of one kind and equal price are taken in their order.

    Args:
        prices: of all layers that could be 2:4.
        budget: share of the sum of all gains, in [0, 1].
    """
    dense = {price.name for price in prices if price.gain == 0}
    room = budget * sum(price.gain for price in prices)
    items = [price for price in prices if price.loss > 0 and 0 < price.gain <= room * (1 + 1e-9)]
    sizes = [min(_STEPS, -int(-(price.gain / room * _STEPS) * (1 - 1e-9) // 1)) for price in items]
    best = [0.0] * (_STEPS + 1)
    taken = [[False] * (_STEPS + 1) for _ in items]
    for number, (price, size) in enumerate(zip(items, sizes, strict=True)):
        for left in range(_STEPS, size - 1, -1):
            found = best[left - size] + price.loss
            if found > best[left]:
                best[left] = found
                taken[number][left] = True
    left = _STEPS
    for number in reversed(range(len(items))):
        if taken[number][left]:
            dense.add(items[number].name)
            left -= sizes[number]
    return frozenset(dense)


def fill(order: Sequence[LayerPrice], prices: Sequence[LayerPrice], budget: float) -> frozenset[str]:
    """Return the layers to leave dense by a simple rule: those that fit into the budget, taken in ``order``."""
    room = budget * sum(price.gain for price in prices) * (1 + 1e-9)
    dense = set()
    for price in order:
        if price.gain <= room:
            room -= price.gain
            dense.add(price.name)
    return frozenset(dense)


def predicted_speedup(prices: Sequence[LayerPrice], dense: Collection[str]) -> float:
    """Return the time of all layers dense over their time with those of ``dense`` dense and the others 2:4."""
    whole = sum(price.dense_time for price in prices)
    now = sum(price.dense_time if price.name in dense else price.sparse_time for price in prices)
    return whole / now if now else 1.0
