"""Simple rules for the layers that stay dense, as one would choose them by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from prox24_lightning.solvers.budget.choose import LayerPrice, fill

Rule = Callable[[Sequence[LayerPrice], float], frozenset[str]]
"""Prices in the order of execution and a budget -> names of the layers to leave dense."""

_ATTENTION = re.compile(r"attn|attention|[qkvo]_proj")


def from_the_ends(prices: Sequence[LayerPrice], budget: float) -> frozenset[str]:
    """Leave the first and the last block dense, then the second and the last but one, and so on."""
    blocks = list(dict.fromkeys(map(_block, prices)))
    place = {block: number for number, block in enumerate(blocks)}
    last = len(blocks) - 1
    return fill(sorted(prices, key=lambda one: min(place[_block(one)], last - place[_block(one)])), prices, budget)


def worst_local(prices: Sequence[LayerPrice], budget: float) -> frozenset[str]:
    """Leave the layers dense whose own outputs 2:4 changes most."""
    return fill(sorted(prices, key=lambda one: -one.local_loss), prices, budget)


def attention_first(prices: Sequence[LayerPrice], budget: float) -> frozenset[str]:
    """Leave attention dense, by the names of its layers, then the others, both in the order of execution."""
    return fill(sorted(prices, key=lambda one: not _ATTENTION.search(one.name)), prices, budget)


RULES: Mapping[str, Rule] = {
    "first and last blocks dense": from_the_ends,
    "worst local loss dense": worst_local,
    "attention dense": attention_first,
}


def _block(price: LayerPrice) -> str:
    """The name of the block that holds a layer: up to the first number in it; without one, the layer's own name."""
    found = re.match(r"(.*?\.)?\d+\.", price.name)
    return found[0] if found else price.name
