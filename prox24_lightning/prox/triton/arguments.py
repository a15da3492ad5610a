"""What the kernels hand on to each other: tensors, layout of a weight, and what a variant is compiled for.

Triton compiles named tuples away; inside a kernel their fields are values, pointers and compile-time constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

SIZES = ["groups", "chunk", "programs", "length", "samples"]
SIZES += [f"{tensor}_{where}" for tensor in ("strength", "scale") for where in ("before", "along", "behind")]
"""Arguments of kernels that are not worth a variant of their own where they are 1 or divide by 16."""

COLUMNS = tl.constexpr(10)
"""Entries of a row of a :class:`~prox24_lightning.prox.triton.multi_tensor.WeightTable`."""
SUMS = tl.constexpr(10)
"""Numbers of :class:`~prox24_lightning.prox.statistics.ProxStatistics`."""


class Strides(NamedTuple):
    """Strides of a strength or a scale: before, along and behind the dimension of the groups."""

    before: Any
    along: Any
    behind: Any


class Layout(NamedTuple):
    """Layout of a contiguous weight.

    Attributes:
        length: groups along their dimension.
        inner: entries behind that dimension; 1 where it is the last.
        strength_strides, scale_strides: :class:`Strides`.
    """

    length: Any
    inner: Any
    strength_strides: Any
    scale_strides: Any


class Tensors(NamedTuple):
    """Where a weight and what belongs to it lie.

    Attributes:
        source, target: the weight, and where its prox goes; the same in place.
        strength: a pointer, or the strength itself where there is one: then nothing is loaded again after a store.
        scale: a pointer; anything where there is no scale.
        sums: ten numbers, see :class:`~prox24_lightning.prox.statistics.ProxStatistics`; as the next two, anything
            where there are no statistics.
        code, previous_code: one byte a group, the mask now and at the last statistics.
        scratch: memory of the queue in Triton's interpreter; None on a GPU, which has shared memory.
    """

    source: Any
    target: Any
    strength: Any
    scale: Any
    sums: Any
    code: Any
    previous_code: Any
    scratch: Any


class Variant(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        one_strength: one strength for all groups.
        has_scale: a metric.
        last_dim: groups along the last dimension.
        wide: 64-bit addresses.
        settle: prune the groups that end with two entries, and leave the others as they are.
        pairs: words are pairs of bfloat16 entries (``bf16_pairs.py``).
        vectors: groups of float32 along the last dimension that are aligned: one store a group.
        statistics: of the results, from the same pass.
    """

    one_strength: Any
    has_scale: Any
    last_dim: Any
    wide: Any
    settle: Any
    pairs: Any
    vectors: Any
    statistics: Any
