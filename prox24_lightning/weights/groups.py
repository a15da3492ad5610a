"""Groups of four: views of a weight with its groups last, and the checks that its sizes allow them.

Sparse tensor cores take a matrix in which every four consecutive entries *along the dimension that is summed over*
hold at most two non-zeros. Which dimension of a layer's weight that is, decides
:mod:`~prox24_lightning.weights.eligibility`.

A weight has one of three geometries. In ``row`` the groups lie along the inputs, in ``column`` along the outputs, and
in ``block`` along both: every 4 x 4 block of (outputs, inputs) has at most two non-zeros in each row and each column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Geometry = Literal["row", "column", "block"]

Dim = int | tuple[int, int]
"""The dimension along which the groups lie; a pair for the block geometry, whose groups lie along both."""

MATRIX_DIMS: dict[Geometry, Dim] = {"row": -1, "column": 0, "block": (0, 1)}
"""Geometry -> where the groups lie once the weight is laid out as (out_features, in_features)."""


_INSTEAD_OF_VMAP = {
    "stack": "call it on the stacked weights, whose groups lie along the same dimension (dim=-1 stays, dim=0 becomes "
    "dim=1)",
    "matrices": "call it on the stacked weights, with the dimensions of the matrices (dims=(1, 2) for a stack of shape "
    "(count, out, in))",
    "one by one": "call it on one tensor at a time",
}


def check_weight(
    weight: object, function: str, *, vmap: Literal["runs", "stack", "matrices", "one by one"] = "stack"
) -> None:
    """Refuse what the tensor functions cannot work on.

    Args:
        vmap: ``"runs"`` if ``function`` runs under ``torch.vmap``, else what to do instead: call it on the stack, with
            ``dim``; on the stack, with ``dims``; on one tensor at a time.

    Raises:
        TypeError: for anything but a tensor (a numpy array, say), and for a tensor of ``torch.vmap``.
        ValueError: for one in a sparse layout.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{function} takes a torch.Tensor, got {type(weight).__module__}.{type(weight).__qualname__}; use "
            "torch.as_tensor"
        )
    if weight.layout != torch.strided:
        raise ValueError(f"{function} takes a tensor that holds its zeros, got {weight.layout}; use weight.to_dense()")
    if vmap != "runs" and not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(weight):
        raise TypeError(f"{function} does not run under torch.vmap; {_INSTEAD_OF_VMAP[vmap]}")


def check_scale(scale: Tensor | None, weight: Tensor) -> None:
    """Refuse a scale that does not broadcast to the weight; its values are not checked.

    Raises:
        TypeError: for what is not a tensor.
        ValueError: for a shape that does not broadcast.
    """
    if scale is None:
        return
    if not isinstance(scale, Tensor):
        kind = f"{type(scale).__module__}.{type(scale).__qualname__}"
        raise TypeError(f"scale takes a torch.Tensor, got {kind}; use torch.as_tensor")
    if not broadcasts(scale, weight.shape):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not broadcast to the weight's shape {tuple(weight.shape)}; use "
            "(in_features,) for one value an input"
        )


def broadcasts(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Return whether ``tensor`` can be expanded to ``shape``."""
    if tensor.dim() > len(shape):
        return False
    return all(a in (1, b) for a, b in zip(reversed(tensor.shape), reversed(shape), strict=False))


def leave_graph(function: str, remedy: str) -> None:
    """Break a graph that torch.compile traces before a function whose results are Python values.

    Without ``fullgraph=True`` the function then runs between two graphs; with it, torch's error has this sentence.

    Args:
        function: its name.
        remedy: what to do in a whole graph.

    Raises:
        TypeError: under ``torch.export``, which has no way around.
    """
    sentence = f"{function} gives Python values, which no graph holds; {remedy}"
    if torch.compiler.is_exporting():
        raise TypeError(sentence)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=sentence)


def resolve_group_dim(shape: Sequence[int], dim: int) -> int:
    """Return ``dim`` as a non-negative index, after checking that ``shape`` divides into groups of four along it.

    Raises:
        ValueError: if ``dim`` is out of range, or the size along it does not divide by 4.
    """
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim={dim} is out of range for a weight of shape {tuple(shape)}")
    dim %= len(shape)
    if shape[dim] % 4:
        raise ValueError(
            f"2:4 sparsity needs groups of four, but dimension {dim} of a weight of shape {tuple(shape)} has size "
            f"{shape[dim]}, which does not divide by 4; choose another dim or dims, or leave it dense"
        )
    return dim


def group_dims(shape: Sequence[int], dim: Dim) -> tuple[int, ...]:
    """Return every dimension along which a weight of ``shape`` must be 2:4, as non-negative indices.

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
    """Return a view of ``weight`` with its groups last: ``(..., size / 4, 4)``, with ``dim`` moved to the end."""
    dim = resolve_group_dim(weight.shape, dim)
    return weight.movedim(dim, -1).unflatten(-1, (weight.shape[dim] // 4, 4))


def from_groups(groups: Tensor, dim: int = -1) -> Tensor:
    """Undo :func:`to_groups`: merge the groups and move their dimension back to ``dim``."""
    return groups.flatten(-2).movedim(-1, dim)


def group_shape(shape: Sequence[int], dim: Dim = -1) -> tuple[int, ...]:
    """Return the shape of a tensor with one value per group: ``shape`` divided by 4 along ``dim`` (of a pair: both).

    A ``strength`` tensor broadcasts against this shape: ``(out, 1)`` holds one strength per row of an ``(out, in)``
    weight, ``(out, in / 4)`` one per group.
    """
    dims = group_dims(shape, dim)
    return tuple(size // 4 if axis in dims else size for axis, size in enumerate(shape))


def quarters(tensor: Tensor, dim: int) -> Tensor:
    """Return a view as ``(4, *group_shape)``: the first, second, third and fourth entries of all groups."""
    return tensor.unflatten(dim, (tensor.shape[dim] // 4, 4)).movedim(dim + 1, 0)


def chunks(shape: Sequence[int], size: int) -> Iterator[tuple[int | slice, ...]]:
    """Yield index tuples that cut a tensor of ``shape`` into pieces of about ``size`` entries, in row-major order.

    Each is some integers and then at most one slice. An empty tensor has none.
    """
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    rest = 1
    for length in shape[1:]:
        rest *= length
    if rest <= size:
        step = max(1, size // max(1, rest))
        for begin in range(0, shape[0], step):
            yield (slice(begin, begin + step),)
    else:
        for index in range(shape[0]):
            for inner in chunks(shape[1:], size):
                yield (index, *inner)
