"""Search the order of a layer's inputs in which 2:4 along them loses least, by swaps between groups of four.

Which inputs form a group of four is free wherever the layer that computes them can return them in another order. A
group keeps two weights in each row, so inputs that the same rows need belong into different groups. apex's ASP chooses
the order by magnitudes; here a weight counts by the loss that pruning it causes, other weights refitted (Optimal Brain
Surgeon, Hassibi and Stork 1993): ``w_ij^2 / [H^-1]_jj``.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from prox24_lightning.solvers.linear_algebra.cholesky import cholesky
from prox24_lightning.solvers.loss import regularized
from prox24_lightning.utils.devices.cuda import why_no_triton

ROUNDS = (192, 512)
"""At most, on a CPU and on a GPU; in each round every group of four trades with one other."""
_ELEMENTS = (1 << 20, 1 << 25)
"""Entries that are compared at a time, on a CPU and on a GPU."""

# All 35 ways to split eight inputs into two groups of four, as indices into the 28 pairs of the eight.
_PAIRS = list(itertools.combinations(range(8), 2))
_FIRST_HALVES = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
_SPLITS = [(*half, *(i for i in range(8) if i not in half)) for half in _FIRST_HALVES]
_HALVES = [split[start : start + 4] for split in _SPLITS for start in (0, 4)]
_HALF_PAIRS = [(_PAIRS.index((a, b)), _PAIRS.index((c, d))) for a, b, c, d in _HALVES]


def saliency(weight: Tensor, hessian: Tensor, *, damping: float = 1e-3, name: str = "layer") -> Tensor:
    """Return the loss that each weight causes when it alone is pruned and its row refitted: ``w^2 / [H^-1]_jj``.

    Args:
        weight: (out_features, in_features), float32 or float64.
        hessian: (in_features, in_features), same dtype.
        damping: added to the diagonal of ``hessian``, relative to each entry.
        name: for error messages.
    """
    inverse = torch.cholesky_inverse(cholesky(regularized(hessian, damping), name=name))
    return weight.square() / inverse.diagonal()


def pruned_saliency(values: Tensor) -> Tensor:
    """Return the sum over all rows and groups of the two smallest of every four saliencies, a 0-dim tensor.

    Args:
        values: (rows, inputs), not negative.
    """
    return values.unflatten(1, (-1, 4)).topk(2, dim=-1, largest=False).values.sum()


@torch.no_grad()
def best_order(values: Tensor, *, runs: int = 1, rounds: int | None = None, seed: int = 0) -> Tensor:
    """Return the order of inputs that lowers :func:`pruned_saliency`, found by swaps.

    Each pair of groups takes the best of the 35 ways to split its eight inputs into two groups; in a round every group
    is in one pair, and in a tournament of rounds it meets each other once. The loss never rises. The search ends after
    a tournament in which nothing has changed: then no pair has a better split.

    Args:
        values: (rows, inputs), not negative. Where several columns move as one (the positions of a kernel, the query
            heads of a key-value head) each of them is a row more for every output.
        runs: number of consecutive runs of ``inputs / runs`` inputs, inside of which they may change places.
        rounds: at most; None takes :data:`ROUNDS`.
        seed: of the order of the pairs; equal on all devices.

    Returns:
        (inputs,), a permutation: the input that comes to each place.

    Raises:
        ValueError: if a run does not divide into groups of four.
    """
    inputs = values.shape[1]
    if inputs % (4 * runs):
        raise ValueError(f"{inputs} inputs in {runs} runs do not divide into groups of four")
    by_input = values.T.contiguous()
    order = torch.arange(inputs, device=values.device).view(-1, 4)
    groups = len(order) // runs
    tournament = _tournament(groups)
    left = ROUNDS[values.device.type == "cuda"] if rounds is None else rounds
    generator = torch.Generator().manual_seed(seed)
    changed = bool(len(tournament))
    while changed and left > 0:
        players = torch.stack([torch.randperm(groups, generator=generator) + run * groups for run in range(runs)])
        pairs = players[:, tournament[:left]].movedim(1, 0).flatten(1, 2)  # (rounds, pairs, 2)
        left -= len(pairs)
        changed = bool(_trade(by_input, order, pairs.to(values.device)))
    return order.flatten()


def _tournament(players: int) -> Tensor:
    """Return rounds of pairs in which each player meets each other once: (rounds, pairs, 2); of an odd number one rests
    in each round."""
    seats = players + players % 2
    circle = torch.arange(seats - 1)
    rounds = torch.stack([torch.cat([torch.tensor([seats - 1]), circle.roll(turn)]) for turn in range(seats - 1)])
    pairs = torch.stack([rounds[:, : seats // 2], rounds[:, seats // 2 :].flip(1)], 2)
    return pairs[:, 1:] if players % 2 else pairs


def _trade(by_input: Tensor, order: Tensor, rounds: Tensor) -> Tensor:
    """Let the pairs of groups of each round take their best splits; return whether an input has moved, 0-dim or (1,).

    Args:
        by_input: (inputs, rows).
        order: (groups, 4), the inputs of each group; changed in place.
        rounds: (rounds, pairs, 2), groups.
    """
    splits = torch.tensor(_SPLITS, device=order.device)
    if by_input.is_cuda and why_no_triton(by_input.device) is None:
        from prox24_lightning.solvers.input_order.trade_kernel import halves_table, trade_in_one_launch

        changed, halves = torch.zeros(1, dtype=torch.int32, device=order.device), halves_table(splits)
        for pairs in rounds:
            trade_in_one_launch(by_input, order, pairs, halves, changed)
        return changed
    moved = []
    for pairs in rounds:
        eights = order[pairs].flatten(1)  # (pairs, 8)
        best = _best_splits(by_input, eights)
        order[pairs] = eights.gather(1, splits[best]).view(-1, 2, 4)
        moved.append(best.any())
    return torch.stack(moved).any()


def _best_splits(by_input: Tensor, eights: Tensor) -> Tensor:
    """Return for each row of eight inputs the number of the split that loses least; 0, the present one, where none is
    better."""
    at_a_time = max(1, _ELEMENTS[by_input.device.type == "cuda"] // (len(_HALVES) * by_input.shape[1]))
    return torch.cat([_best_split(by_input[part]) for part in eights.split(at_a_time)])


@lru_cache
def _indices(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the entries of each pair, (2, 28), and two of the pairs of each half, (2, 70)."""
    return torch.tensor(_PAIRS, device=device).T, torch.tensor(_HALF_PAIRS, device=device).T


def _best_split(values: Tensor) -> Tensor:
    """``values``: (pairs, 8, rows)."""
    (first, second), (front, back) = _indices(values.device)
    left, right = values[:, first], values[:, second]
    # The two smallest of four add up to the least sum of two of them: of a pair, or of the lesser ones of two pairs.
    sums, lesser = left + right, torch.minimum(left, right)
    least = torch.minimum(sums[:, front], sums[:, back])
    losses = torch.minimum(least, lesser[:, front] + lesser[:, back]).sum(-1)  # (pairs, 70)
    losses = losses.unflatten(1, (-1, 2)).sum(2)
    found, best = losses.min(1)
    return torch.where(found < losses[:, 0] * (1 - 1e-6), best, 0)
