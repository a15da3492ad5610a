"""One round of trades between groups of four inputs in one launch: what :mod:`.search` does in plain torch."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HALVES = tl.constexpr(128)
_ROWS = 32
"""Rows of the layer that a program reads at a time."""


def halves_table(splits: Tensor) -> Tensor:
    """Return the places of the halves of each split, (64, 2, 4), int32, from (35, 8); what is added are splits 0."""
    table = splits[0].repeat(64, 1)
    table[: len(splits)] = splits
    return table.view(64, 2, 4).int()


def trade_in_one_launch(by_input: Tensor, order: Tensor, pairs: Tensor, halves: Tensor, changed: Tensor) -> None:
    """Let each pair of groups take the split of its eight inputs that loses least.

    Args:
        by_input: (inputs, rows), contiguous, on a CUDA device.
        order: (groups, 4), contiguous, long: the inputs of each group; changed in place.
        pairs: (pairs, 2), contiguous, long: groups, each of them once at most.
        halves: as :func:`halves_table` returns it.
        changed: (1,), int32; becomes 1 if an input has moved.
    """
    if len(pairs):
        with torch.cuda.device_of(by_input):
            _trade_kernel[(len(pairs),)](
                by_input, order, pairs, halves, changed, by_input.shape[1], BLOCK=_ROWS, num_warps=8
            )


@triton.jit
def _trade_kernel(by_input, order, pairs, halves, changed, rows, BLOCK: tl.constexpr):
    pair = tl.program_id(0)
    first = tl.load(pairs + 2 * pair)
    second = tl.load(pairs + 2 * pair + 1)
    half = tl.arange(0, _HALVES)
    a = _values(by_input, order, first, second, halves + half * 4, rows)
    b = _values(by_input, order, first, second, halves + half * 4 + 1, rows)
    c = _values(by_input, order, first, second, halves + half * 4 + 2, rows)
    d = _values(by_input, order, first, second, halves + half * 4 + 3, rows)
    losses = tl.zeros([_HALVES], by_input.dtype.element_ty)
    for begin in range(0, rows, BLOCK):
        row = (begin + tl.arange(0, BLOCK))[None, :]
        inside = row < rows
        value_a = tl.load(a[:, None] + row, mask=inside, other=0)
        value_b = tl.load(b[:, None] + row, mask=inside, other=0)
        value_c = tl.load(c[:, None] + row, mask=inside, other=0)
        value_d = tl.load(d[:, None] + row, mask=inside, other=0)
        # The two smallest of four, as in plain torch.
        lesser = tl.minimum(value_a, value_b) + tl.minimum(value_c, value_d)
        losses += tl.sum(tl.minimum(tl.minimum(value_a + value_b, value_c + value_d), lesser), 1)
    losses = tl.sum(tl.reshape(losses, [_HALVES // 2, 2]), 1)
    present = tl.sum(tl.where(tl.arange(0, _HALVES // 2) == 0, losses, 0.0), 0)
    if tl.min(losses, 0) < present * (1 - 1e-6):
        place = tl.arange(0, 8)
        moved = _inputs(order, first, second, halves + tl.argmin(losses, 0) * 8 + place)
        tl.debug_barrier()  # all threads have read what is written now
        tl.store(order + tl.where(place < 4, first, second) * 4 + place % 4, moved)
        tl.store(changed, 1)


@triton.jit
def _inputs(order, first, second, places):
    """The inputs at ``places``, 0 to 7, of two groups."""
    place = tl.load(places)
    return tl.load(order + tl.where(place < 4, first, second) * 4 + place % 4)


@triton.jit
def _values(by_input, order, first, second, places, rows):
    """Where the values of these inputs begin."""
    return by_input + _inputs(order, first, second, places) * rows
