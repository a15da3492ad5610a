"""Choose the layers that stay dense among several candidates, by the loss that the model has with each of them.

Prices of single layers do not add up: what a layer costs depends on which of the others are 2:4. So they only propose
candidates, beside simple rules; the loss of the whole model decides, and then exchanges around the best candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prox24_lightning.solvers.budget.choose import LayerPrice, choose_dense
from prox24_lightning.solvers.budget.rules import RULES

Loss = Callable[[Collection[str]], float]
"""Names of the layers that are dense while all others are 2:4 -> loss of the model."""

ROUNDS = 2
"""Rounds of exchanges around the best candidate."""
POOL = 16
"""So many layers of each side, dense and 2:4, are priced anew in a round."""
MOVES = 16
"""So many single exchanges are measured in a round."""
_SHARES = (1, 2)
"""The whole pool and half of it are exchanged at once."""


@dataclass(frozen=True)
class Choice:
    """The layers that stay dense within a budget.

    Attributes:
        name: of the candidate.
        dense: names of the layers.
        loss: of the model with it, by weights solved before the choice; None if none was measured.
        tried: name and loss of every candidate that was measured.
    """

    name: str
    dense: frozenset[str]
    loss: float | None = None
    tried: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON takes it."""
        return {**asdict(self), "dense": sorted(self.dense)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Choice:
        """Return the choice that :meth:`to_dict` has written."""
        tried = tuple((name, loss) for name, loss in content["tried"])
        return cls(content["name"], frozenset(content["dense"]), content["loss"], tried)


def evaluations(layers: int, budgets: Sequence[float]) -> int:
    """Return how often the loss is measured at most, to choose among so many layers at each of ``budgets``."""
    each = len(RULES) + 3 + ROUNDS * (min(layers, 2 * POOL) + len(_SHARES) + MOVES)
    return layers + sum(each for budget in budgets if budget)


def choose_by_loss(
    dense_side: Sequence[LayerPrice],
    sparse_side: Sequence[LayerPrice],
    budget: float,
    probe: Loss,
    judge: Loss,
    *,
    describe: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Return the candidate with the lowest loss, improved by exchanges; it gives back at most ``budget`` of the gain.

    Candidates are the knapsack with prices of the dense model, of the 2:4 model, and of a mix of both by the budget,
    and three simple rules. A round of exchanges prices anew the layers that are closest to changing sides, around the
    best candidate; it lets a knapsack choose among them, then adds the best of those left out one by one in place of
    the worst inside. What lowers the loss is kept.

    Args:
        dense_side: by how much the loss of the dense model rises when a layer alone is 2:4.
        sparse_side: the same layers: by how much the loss of the 2:4 model falls when a layer alone is dense.
        budget: share of the sum of all gains, in [0, 1].
        probe: gives the prices of a round.
        judge: decides between candidates.
        describe: called with the name of each measurement, before it.
    """
    if not budget:
        return Choice("2:4", choose_dense(dense_side, 0.0))
    mix = _mixed(dense_side, sparse_side, budget)
    candidates = {
        "prices of the dense model": choose_dense(dense_side, budget),
        "prices of the 2:4 model": choose_dense(sparse_side, budget),
        "mixed prices": choose_dense(mix, budget),
        **{name: rule(dense_side, budget) for name, rule in RULES.items()},
    }
    judged: dict[frozenset[str], float] = {}
    tried: list[tuple[str, float]] = []

    def measured(name: str, dense: frozenset[str]) -> float:
        describe(f"budget {budget:g}: {name}")
        if dense not in judged:
            judged[dense] = judge(dense)
        tried.append((name, judged[dense]))
        return judged[dense]

    # Of equal losses, all infinite ones among them, the first candidate is best.
    loss, name = min(((measured(name, dense), name) for name, dense in candidates.items()), key=lambda found: found[0])
    dense = candidates[name]
    exchanged = f"{name}, then exchanges"
    for _ in range(ROUNDS):
        before, pool = loss, _pool(mix, dense, probe, describe)
        for other in _jumps(mix, pool, dense, budget):
            if (found := measured(exchanged, other)) < loss:
                loss, dense, name = found, other, exchanged
        moves = _Moves(mix, pool, budget)
        while (moved := moves.next(dense)) is not None:
            if (found := measured(exchanged, moved)) < loss:
                loss, dense, name = found, moved, exchanged
            else:
                moves.reject()
        if loss == before:
            break
    return Choice(name, dense, loss, tuple(tried))


def marginal_prices(
    prices: Sequence[LayerPrice],
    dense: Collection[str],
    probe: Loss,
    describe: Callable[[str], None] = lambda text: None,
) -> list[LayerPrice]:
    """Return ``prices`` with the rise of the loss when a layer of ``dense`` becomes 2:4, or its fall when another one
    becomes dense.
    """
    base, found = probe(dense), []
    for price in prices:
        describe(f"price of {price.name}")
        moved = probe(set(dense) ^ {price.name})
        found.append(replace(price, loss=moved - base if price.name in dense else base - moved))
    return found


def _mixed(dense_side: Sequence[LayerPrice], sparse_side: Sequence[LayerPrice], budget: float) -> list[LayerPrice]:
    pairs = zip(dense_side, sparse_side, strict=True)
    return [replace(one, loss=budget * one.loss + (1 - budget) * two.loss) for one, two in pairs]


def _pool(
    prices: Sequence[LayerPrice], dense: frozenset[str], probe: Loss, describe: Callable[[str], None]
) -> list[LayerPrice]:
    """The layers of each side that are closest to changing it, with prices measured around ``dense``."""
    inside, outside = _by_rate(prices, dense)
    return marginal_prices([*inside[:POOL], *outside[:POOL]], dense, probe, describe)


def _jumps(
    prices: Sequence[LayerPrice], pool: Sequence[LayerPrice], dense: frozenset[str], budget: float
) -> Iterator[frozenset[str]]:
    """Other choices than ``dense``, by a knapsack among the layers of the pool."""
    for share in _SHARES:
        part = [price for side in _by_rate(pool, dense) for price in side[: -(-POOL // share)]]
        rest = dense - {price.name for price in part}
        gains = sum(price.gain for price in part)
        other = rest | choose_dense(part, max(0.0, min(1.0, _room(prices, rest, budget) / gains)) if gains else 0.0)
        if other != dense:
            yield other


class _Moves:
    """Exchanges of a layer of the pool that is 2:4 for dense ones that make room for it, the most promising first.

    Args:
        prices: of all layers.
        pool: with prices measured anew.
        budget: that no exchange exceeds.
    """

    def __init__(self, prices: Sequence[LayerPrice], pool: Sequence[LayerPrice], budget: float) -> None:
        self._prices, self._pool, self._budget = prices, pool, budget
        self._left = MOVES
        self._done: set[str] = set()
        self._leaving: set[str] = set()

    def next(self, dense: frozenset[str]) -> frozenset[str] | None:
        """Return what ``dense`` becomes by the next exchange; None after the last one."""
        inside, outside = _by_rate([price for price in self._pool if price.name not in self._done], dense)
        for coming in outside if self._left else ():
            room, leaving = _room(self._prices, dense, self._budget), []
            for price in inside:
                if room < coming.gain:
                    leaving.append(price)
                    room += price.gain
            self._done.add(coming.name)
            if room >= coming.gain and sum(price.loss for price in leaving) < coming.loss:
                self._left -= 1
                self._leaving = {price.name for price in leaving}
                return (dense - self._leaving) | {coming.name}
        return None

    def reject(self) -> None:
        """The last exchange did not help: what left for it stays."""
        self._done |= self._leaving


def _room(prices: Sequence[LayerPrice], dense: Collection[str], budget: float) -> float:
    """The gain that may still be given back."""
    spent = sum(price.gain for price in prices if price.name in dense)
    return budget * sum(price.gain for price in prices) * (1 + 1e-9) - spent


def _by_rate(prices: Sequence[LayerPrice], dense: Collection[str]) -> tuple[list[LayerPrice], list[LayerPrice]]:
    """The layers that gain time, by loss per time: of ``dense`` the lowest first, of the others the highest."""
    order = sorted((price for price in prices if price.gain), key=lambda price: price.loss / price.gain)
    return [one for one in order if one.name in dense], [one for one in reversed(order) if one.name not in dense]
