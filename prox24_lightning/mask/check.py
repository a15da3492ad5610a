"""Check a weight against the 2:4 pattern, and say where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.weights.groups import Dim, group_dims, to_groups

_AT_A_TIME = 2**21  # entries, which bounds the scratch memory


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

    def __str__(self) -> str:
        if not self.count:
            return f"all {self.groups} groups are 2:4"
        shown = "; ".join(
            f"at {index}: {', '.join(f'{value:.4g}' for value in group)}"
            for index, group in zip(self.first, self.values, strict=True)
        )
        return f"{self.count} of {self.groups} groups have more than two non-zeros ({shown})"


def zeros_per_group(weight: Tensor, *, dim: int = -1) -> Tensor:
    """Number of exact zeros in every group of four: int64 of :func:`~prox24_lightning.weights.groups.group_shape`."""
    counts = (to_groups(weight.detach(), dim) == 0).sum(-1)
    return counts.movedim(-1, dim)


def is_24(weight: Tensor, *, dim: Dim = -1) -> bool:
    """Whether every group of four along ``dim`` (a pair: along both) has at most two non-zeros. NaN counts as
    non-zero.

    Raises:
        ValueError: for a size along ``dim`` that does not divide by 4.
    """
    return all(
        bool((zeros_per_group(slab, dim=one) >= 2).all())
        for one in group_dims(weight.shape, dim)
        for _, slab in _slabs(weight, one)
    )


def violations_24(weight: Tensor, *, dim: Dim = -1, limit: int = 5) -> Violations:
    """Count the groups that are not 2:4 and locate the first ``limit`` of them, in row-major order of groups.

    With a pair of dimensions the groups along the first are counted and shown first, then those along the second.

    Raises:
        ValueError: for a size along ``dim`` that does not divide by 4.
    """
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
    for start, slab in _slabs(weight, dim):
        broken = zeros_per_group(slab, dim=dim) < 2
        count += int(broken.sum())
        if len(first) < min(limit, count):
            groups = to_groups(slab.detach(), dim).movedim(-2, dim)
            for at in torch.nonzero(broken)[: limit - len(first)].tolist():
                values.append(tuple(groups[tuple(at)].tolist()))
                inside = (4 * i if axis == dim else i for axis, i in enumerate(at))
                first.append(tuple(start + i if axis == 0 else i for axis, i in enumerate(inside)))
    return Violations(count, weight.numel() // 4, tuple(first), tuple(values))


def _slabs(weight: Tensor, dim: int) -> Iterator[tuple[int, Tensor]]:
    """Parts along the first dimension that hold whole groups, with the index at which each begins."""
    row = max(1, weight[:1].numel())
    step = max(1, _AT_A_TIME // row // 4) * 4
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step]
