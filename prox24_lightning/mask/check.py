"""Check a weight against the 2:4 pattern, and locate the groups that break it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.weights.groups import (
    Dim,
    check_weight,
    chunks,
    group_dims,
    group_shape,
    leave_graph,
    quarters,
    to_groups,
)

ENTRIES_AT_A_TIME = 2**21
"""Bounds the scratch memory to some 4 MB, whatever the shape."""


@dataclass(frozen=True)
class Violations:
    """Groups of four with more than two non-zeros.

    Attributes:
        count: how many groups break the pattern.
        groups: how many groups there are.
        first: index of the first entry of each of the first few such groups, in the weight's own coordinates.
        values: their four values.
    """

    count: int
    groups: int
    first: tuple[tuple[int, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def __bool__(self) -> bool:
        return self.count > 0

    def in_short(self) -> str:
        """Return how many groups break the pattern, and where the first is; of all of them, no number."""
        if self.count == self.groups:
            return "no group is"
        return f"{self.count} of {self.groups} groups" + (f", first at {self.first[0]}" if self.first else "")

    def __str__(self) -> str:
        if not self.count:
            return f"all {self.groups} groups are 2:4"
        shown = "; ".join(
            f"at {index}: {', '.join(f'{value:.4g}' for value in group)}"
            for index, group in zip(self.first, self.values, strict=True)
        )
        return f"{self.count} of {self.groups} groups have more than two non-zeros ({shown})"


def zeros_per_group(weight: Tensor, *, dim: int = -1) -> Tensor:
    """Count the exact zeros of every group: int64 of :func:`~prox24_lightning.weights.groups.group_shape`."""
    check_weight(weight, "zeros_per_group", vmap="runs")
    counts = (to_groups(weight.detach(), dim) == 0).sum(-1)
    return counts.movedim(-1, dim)


def is_24(weight: Tensor, *, dim: Dim = -1) -> bool:
    """Return whether every group of four along ``dim`` (a pair: along both) has at most two non-zeros. NaN is non-zero.

    In a compiled function the answer can be returned; an ``if`` on it needs a graph break, as on any value of a tensor.

    Raises:
        ValueError: for a size along ``dim`` that does not divide by 4.
    """
    check_weight(weight, "is_24")
    if torch.compiler.is_compiling():  # no branch before the answer
        dims = group_dims(weight.shape, dim)
        return bool(torch.stack([(zeros_per_group(weight, dim=one) >= 2).all() for one in dims]).all())
    return all(
        bool((_zeros(part) >= 2).all())
        for one in group_dims(weight.shape, dim)
        for _, part in _parts(weight.detach(), one)
    )


def violations_24(weight: Tensor, *, dim: Dim = -1, limit: int = 5) -> Violations:
    """Count the groups that are not 2:4 and locate the first ``limit`` of them, in row-major order of groups.

    With a pair of dimensions the groups along the first are counted and shown first, then those along the second.

    Raises:
        ValueError: for a size along ``dim`` that does not divide by 4.
    """
    check_weight(weight, "violations_24")
    leave_graph("violations_24", "count there with zeros_per_group(weight) < 2")
    parts = [_violations(weight, one, limit) for one in group_dims(weight.shape, dim)]
    return Violations(
        count=sum(part.count for part in parts),
        groups=sum(part.groups for part in parts),
        first=tuple(at for part in parts for at in part.first)[:limit],
        values=tuple(group for part in parts for group in part.values)[:limit],
    )


def _violations(weight: Tensor, dim: int, limit: int) -> Violations:
    count = 0
    first: list[tuple[int, ...]] = []
    values: list[tuple[float, ...]] = []
    for where, part in _parts(weight.detach(), dim):
        broken = _zeros(part) < 2
        count += int(broken.sum())
        if len(first) < min(limit, count):
            for at in torch.nonzero(broken)[: limit - len(first)].tolist():
                values.append(tuple(part[(slice(None), *at)].tolist()))
                group = _group_index(where, at)
                first.append(tuple(4 * i if axis == dim else i for axis, i in enumerate(group)))
    return Violations(count, weight.numel() // 4, tuple(first), tuple(values))


def _parts(weight: Tensor, dim: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Parts ``(4, ...)`` of the groups along ``dim``, in row-major order, with the index of each in the group shape."""
    source = quarters(weight, dim)
    for where in chunks(group_shape(weight.shape, dim), ENTRIES_AT_A_TIME // 4):
        yield where, source[(slice(None), *where)]


def _zeros(part: Tensor) -> Tensor:
    a, b, c, d = (part == 0).view(torch.uint8)
    return (a + b).add_(c).add_(d)


def _group_index(where: tuple[Any, ...], at: list[int]) -> list[int]:
    """Index among all groups of the group ``at`` of a part, whose own index is integers and then one slice."""
    *fixed, cut = where
    return [*fixed, cut.start + at[0], *at[1:]]
