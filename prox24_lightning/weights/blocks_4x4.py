"""4 x 4 blocks of a weight, which the block geometry makes 2:4 along both sides.

A linear weight ``(out_features, in_features)`` is cut along both dimensions; a convolution
``(out_channels, in_channels, *kernel)`` along its channels, at every kernel position.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prox24_lightning.weights.groups import group_dims, group_shape

BLOCK_DIMS = (0, 1)
"""The dimensions of a linear or convolution weight along which blocks are cut."""


def block_shape(shape: Sequence[int], dims: tuple[int, int] = BLOCK_DIMS) -> tuple[int, ...]:
    """Return the shape of a tensor with one value per block: ``shape`` with both sizes divided by 4.

    Raises:
        ValueError: if a size does not divide by 4, or ``dims`` are not two different dimensions.
    """
    return group_shape(shape, dims)


def to_blocks(weight: Tensor, dims: tuple[int, int] = BLOCK_DIMS) -> Tensor:
    """Return ``weight`` as ``(4, 4, blocks)``: entry (i, j) of every block.

    The blocks are in the order of :func:`block_shape` with ``dims`` moved to the end. A view where the strides allow
    one; a copy is contiguous along the blocks.
    """
    first, second = group_dims(weight.shape, dims)
    moved = weight.movedim((first, second), (-2, -1))
    parts = moved.unflatten(-1, (moved.shape[-1] // 4, 4)).unflatten(-3, (moved.shape[-2] // 4, 4))
    return parts.movedim((-3, -1), (0, 1)).flatten(2)


def from_blocks(blocks: Tensor, shape: Sequence[int], dims: tuple[int, int] = BLOCK_DIMS) -> Tensor:
    """Undo :func:`to_blocks` for a weight of ``shape``; the result is contiguous."""
    first, second = group_dims(shape, dims)
    rest = [size for axis, size in enumerate(shape) if axis not in (first, second)]
    parts = blocks.unflatten(2, (*rest, shape[first] // 4, shape[second] // 4))
    moved = parts.movedim((0, 1), (-3, -1)).flatten(-2).flatten(-3, -2)
    return moved.movedim((-2, -1), (first, second)).contiguous()


def per_block(values: Tensor, shape: Sequence[int], dims: tuple[int, int] = BLOCK_DIMS) -> Tensor:
    """Return ``values``, which broadcast against :func:`block_shape`, as one value per block of :func:`to_blocks`."""
    first, second = group_dims(shape, dims)
    return values.expand(block_shape(shape, dims)).movedim((first, second), (-2, -1)).flatten()
