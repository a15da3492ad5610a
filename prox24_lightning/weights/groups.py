"""How a weight is cut into groups of four, and which parameters of a model qualify.

Sparse tensor cores take a matrix whose every four consecutive entries *along the dimension that is summed
over* hold at most two non-zeros. For ``nn.Linear`` (weight ``(out_features, in_features)``) that is
dimension 1; for convolutions (weight ``(out_channels, in_channels / groups, *kernel)``) it is dimension 1
too, at every kernel position; for Hugging Face's transposed ``Conv1D`` (weight ``(in, out)``) it is
dimension 0. Everything else in the package asks this module, so no axis is decided twice.

Three geometries. ``row`` lays the groups along the inputs, ``column`` along the outputs, and ``block`` along both:
every 4 x 4 block of (outputs, inputs) has at most two non-zeros in each row and in each column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Geometry = Literal["row", "column", "block"]

Dim = int | tuple[int, int]
"""Where the groups lie: along one dimension, or along both of a pair at once (the block geometry)."""

MATRIX_DIMS: dict[Geometry, Dim] = {"row": -1, "column": 0, "block": (0, 1)}
"""The groups of a weight that is laid out as (out_features, in_features), whatever the layer."""


def resolve_group_dim(shape: Sequence[int], dim: int) -> int:
    """Check that ``shape`` can be cut into groups of four along ``dim`` and return ``dim`` as a non-negative index.

    Raises:
        ValueError: if ``dim`` is out of range, or the size along it does not divide by 4.
    """
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim={dim} is out of range for a weight of shape {tuple(shape)}")
    dim %= len(shape)
    if shape[dim] % 4:
        raise ValueError(
            f"2:4 sparsity needs groups of four, but dimension {dim} of a weight of shape {tuple(shape)} has size "
            f"{shape[dim]}, which does not divide by 4; choose another dim, or leave this weight dense"
        )
    return dim


def group_dims(shape: Sequence[int], dim: Dim) -> tuple[int, ...]:
    """Every dimension along which a weight of ``shape`` must be 2:4, as non-negative indices.

    Raises:
        ValueError: if a dimension is out of range, named twice, or has a size that does not divide by 4.
    """
    if isinstance(dim, int):
        return (resolve_group_dim(shape, dim),)
    dims = tuple(resolve_group_dim(shape, one) for one in dim)
    if len(dims) != 2 or dims[0] == dims[1]:
        raise ValueError(f"dim={dim} of a weight of shape {tuple(shape)} must name two different dimensions")
    return dims


def to_groups(weight: Tensor, dim: int = -1) -> Tensor:
    """View ``weight`` with its groups of four last: ``(..., size / 4, 4)`` with ``dim`` moved to the end.

    A view wherever the strides allow one, which is always: splitting a dimension needs no copy.
    """
    dim = resolve_group_dim(weight.shape, dim)
    return weight.movedim(dim, -1).unflatten(-1, (weight.shape[dim] // 4, 4))


def from_groups(groups: Tensor, dim: int = -1) -> Tensor:
    """Undo :func:`to_groups`: merge the groups and move the dimension back to ``dim``."""
    return groups.flatten(-2).movedim(-1, dim)


def group_shape(shape: Sequence[int], dim: Dim = -1) -> tuple[int, ...]:
    """Shape of one value a group: ``shape`` with the size along ``dim`` (of a pair: along both) divided by 4.

    A ``strength`` tensor broadcasts against this shape: ``(out, 1)`` is one strength a row of a
    ``(out, in)`` weight, ``(out, in / 4)`` one a group.
    """
    dims = group_dims(shape, dim)
    return tuple(size // 4 if axis in dims else size for axis, size in enumerate(shape))
