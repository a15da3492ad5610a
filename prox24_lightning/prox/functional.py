"""The public functions of the prox: checks of the arguments, the choice of a path, and what torch.compile sees.

``prox_24`` runs one fused Triton kernel where it can (contiguous float32, bfloat16 and float16 weights on a CUDA GPU
of compute capability 8.0 or newer) and batched torch operations elsewhere; :func:`prox_path` says which path runs,
:func:`why_batched` why. :class:`~prox24_lightning.prox.MultiTensorProx` takes all the weights of a model in one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, library

from prox24_lightning.prox.batched import CHUNK, prox_24_batched
from prox24_lightning.prox.block import BlockMethod, BlockTrace, check_method, prox_blocks, trace_blocks
from prox24_lightning.prox.checks import as_tensor, check_arguments, check_dtype
from prox24_lightning.prox.critical import critical_strength_24
from prox24_lightning.prox.dispatch import prox_path
from prox24_lightning.weights.blocks_4x4 import BLOCK_DIMS, block_shape
from prox24_lightning.weights.groups import Dim, check_weight, group_shape, leave_graph, resolve_group_dim


def prox_24(
    weight: Tensor,
    strength: float | Tensor,
    *,
    dim: Dim = -1,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Solve ``argmin_w 1/2 ||w - weight||^2 + strength * r(w)`` exactly for every group of four.

    ``r(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|`` is zero exactly where the group is 2:4 (arXiv
    2501.18015; the paper's alternating minimisation can miss the minimiser, the scalar equations used here
    cannot). With ``scale`` the distance is measured as ``||scale * (w - weight)||`` and the penalty is that of
    ``scale * w``: the result is ``prox(weight * scale, strength) / scale``. Not recorded by autograd.

    Args:
        weight: float16, bfloat16 (both computed in float32 and rounded once), float32 or float64; any shape
            whose ``dim`` divides by 4, any strides. ``(out_features, in_features)`` with ``dim=-1`` for a linear layer.
        strength: lambda >= 0, units 1/weight (1/(weight * scale) with ``scale``), any step size multiplied in: a
            float, or a tensor that broadcasts against :func:`~prox24_lightning.weights.groups.group_shape`
            (``(out, 1)``: one a row). 0 returns the weight, infinity keeps the two largest of each group.
        dim: the dimension along which the groups lie. A pair asks for the block geometry: :func:`prox_block`.
        scale: positive and finite, broadcasts to ``weight``, for instance the root mean square of each input.
        out: where to write, of the shape, dtype and device of ``weight``; ``weight`` itself works in place.

    Returns:
        ``out``, or a new tensor like ``weight``. Kept entries of a group that ends with two are bit for bit those
        of ``weight``; pruned entries are +0.0. Among equal magnitudes the earlier position is kept.
        A group that holds NaN comes back as NaN; one with an infinite entry keeps its two largest at any strength > 0.

    Raises:
        ValueError: for a dtype that is not one of the four, a bad ``dim``, a ``strength`` or ``scale`` that does not
            broadcast, an ``out`` that does not match, and a negative or NaN strength or a scale that is not
            positive. Values of CUDA tensors are not checked, as that would wait for the device: where they are bad the
            group comes back as NaN.
        TypeError: for what is not a tensor, and under ``torch.vmap``.
    """
    if not isinstance(dim, int):
        return prox_block(weight, strength, dims=dim, scale=scale, out=out)
    check_weight(weight, "prox_24")
    check_dtype(weight)
    if torch.compiler.is_compiling():
        result = _compiled_prox_24(weight.detach(), as_tensor(strength, weight), dim, scale, False)
        return result if out is None else out.copy_(result)
    check_arguments(weight, group_shape(weight.shape, resolve_group_dim(weight.shape, dim)), strength, scale, out)
    with torch.no_grad():
        if prox_path(weight) == "triton" and (out is None or out.is_contiguous()):
            from prox24_lightning.prox.triton.launch import prox_24_triton

            return prox_24_triton(weight, strength, dim=dim, scale=scale, out=out)
        return prox_24_batched(weight, strength, dim=dim, scale=scale, out=out)


@library.custom_op(
    "prox24_lightning::prox_24",
    mutates_args=(),
    schema="(Tensor weight, Tensor strength, int dim, Tensor? scale, bool settle) -> Tensor",
)
def _compiled_prox_24(weight: Tensor, strength: Tensor, dim: int, scale: Tensor | None, settle: bool) -> Tensor:
    """``prox_24`` and ``settle_24`` as torch.compile sees them: one operation, whose checks happen when it runs."""
    out = torch.empty_like(weight).contiguous()
    return (settle_24 if settle else prox_24)(weight, strength, dim=dim, scale=scale, out=out)


@_compiled_prox_24.register_fake
def _(weight: Tensor, strength: Tensor, dim: int, scale: Tensor | None, settle: bool) -> Tensor:
    return torch.empty_like(weight).contiguous()


@library.custom_op(
    "prox24_lightning::prox_block",
    mutates_args=(),
    schema="(Tensor weight, Tensor strength, int[] dims, Tensor? scale, str method, int steps, int sweeps) -> Tensor",
)
def _compiled_prox_block(
    weight: Tensor,
    strength: Tensor,
    dims: list[int],
    scale: Tensor | None,
    method: BlockMethod,
    steps: int,
    sweeps: int,
) -> Tensor:
    """``prox_block`` as torch.compile sees it."""
    pair = dims[0], dims[1]
    out = torch.empty_like(weight).contiguous()
    return prox_block(weight, strength, dims=pair, scale=scale, out=out, method=method, steps=steps, sweeps=sweeps)


@_compiled_prox_block.register_fake
def _(
    weight: Tensor,
    strength: Tensor,
    dims: list[int],
    scale: Tensor | None,
    method: BlockMethod,
    steps: int,
    sweeps: int,
) -> Tensor:
    return torch.empty_like(weight).contiguous()


def settle_24(
    weight: Tensor,
    strength: float | Tensor,
    *,
    dim: int = -1,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Keep the two largest entries of every group that :func:`prox_24` makes 2:4 at ``strength``; leave the others.

    That is ``prox_24`` with ``strength`` where the :func:`critical_strength_24` of a group is at most that, and 0
    elsewhere, but in one pass.

    Args:
        weight, strength, dim, scale, out: as for :func:`prox_24`; ``dim`` is one dimension.

    Returns:
        ``out``, or a new tensor like ``weight``; every entry is that of ``weight`` or +0.0.

    Raises:
        ValueError, TypeError: as :func:`prox_24`.
    """
    check_weight(weight, "settle_24")
    check_dtype(weight)
    if torch.compiler.is_compiling():
        result = _compiled_prox_24(weight.detach(), as_tensor(strength, weight), dim, scale, True)
        return result if out is None else out.copy_(result)
    check_arguments(weight, group_shape(weight.shape, resolve_group_dim(weight.shape, dim)), strength, scale, out)
    with torch.no_grad():
        if prox_path(weight) == "triton" and (out is None or out.is_contiguous()):
            from prox24_lightning.prox.triton.launch import prox_24_triton

            return prox_24_triton(weight, strength, dim=dim, scale=scale, out=out, settle=True)
        strength = as_tensor(strength, weight)
        critical = critical_strength_24(weight, dim=dim, scale=scale)
        return prox_24_batched(weight, torch.where(critical > strength, 0.0, strength), dim=dim, scale=scale, out=out)


def prox_block(
    weight: Tensor,
    strength: float | Tensor,
    *,
    dims: tuple[int, int] = BLOCK_DIMS,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    method: BlockMethod = "dykstra",
    steps: int = 5,
    sweeps: int = 2,
) -> Tensor:
    """Minimise ``1/2 ||w - weight||^2 + strength * (r over rows + r over columns)`` for every 4 x 4 block, by
    splitting.

    At full strength a block keeps *at most* two entries in every row and column: seven entries may retain more than any
    eight. No closed form is known; ``prox/block.py`` explains the splitting, and why no block ends with a worse
    objective than its exact projection. The row and column steps run on the :func:`prox_path` of the weight. No wait
    for the device.

    Args:
        weight: as for :func:`prox_24`; both sizes along ``dims`` divide by 4.
        strength: as for :func:`prox_24`, but a tensor broadcasts against
            :func:`~prox24_lightning.weights.blocks_4x4.block_shape`: one value a block.
        dims: the two dimensions that are cut into blocks.
        scale, out: as for :func:`prox_24`.
        method: ``"dykstra"`` alternates row and column prox, ``"averaged"`` takes both at once and their mean,
            ``"descent"`` leaves the splitting out. Dykstra's ends lowest (``prox24 study``).
        steps: of the splitting: two row-sized prox each.
        sweeps: of the descent after it: two row-sized prox each.

    Returns:
        ``out``, or a new contiguous tensor. A block that ends transposable keeps its survivors bit for bit.

    Raises:
        ValueError: as :func:`prox_24`, and for an unknown method.
    """
    check_weight(weight, "prox_block", vmap="matrices")
    check_method(method, steps, sweeps)
    check_dtype(weight)
    if torch.compiler.is_compiling():
        strength = as_tensor(strength, weight)
        result = _compiled_prox_block(weight.detach(), strength, list(dims), scale, method, steps, sweeps)
        return result if out is None else out.copy_(result)
    check_arguments(weight, block_shape(weight.shape, dims), strength, scale, out)
    with torch.no_grad():
        result = prox_blocks(
            weight,
            as_tensor(strength, weight),
            _line_prox(weight),
            dims=dims,
            scale=scale,
            method=method,
            steps=steps,
            sweeps=sweeps,
        )
        return result if out is None else out.copy_(result)


@torch.no_grad()
def block_convergence(
    blocks: Tensor, strength: float | Tensor, *, method: BlockMethod = "dykstra", steps: int = 50
) -> BlockTrace:
    """Trace the splitting alone on magnitudes of (4, 4, blocks), step by step; ``strength`` one value or (blocks,).

    Raises:
        ValueError: for the method ``"descent"``, which has no splitting, and for bad arguments.
    """
    check_weight(blocks, "block_convergence", vmap="one by one")
    leave_graph("block_convergence", "call it outside of the compiled function")
    check_method(method, steps, 0)
    if method == "descent":
        raise ValueError("method='descent' has no splitting to trace; use 'dykstra' or 'averaged'")
    strength = as_tensor(strength, blocks).expand(blocks.shape[2])
    return trace_blocks(blocks.abs(), strength, _line_prox(blocks), method, steps)


def _line_prox(weight: Tensor) -> Callable[..., Tensor]:
    """Return the row prox for the lines of blocks. On CPU in long chunks: a sweep has eight prox of a quarter of the
    weight."""
    return partial(prox_24_batched, chunk=CHUNK) if weight.device.type == "cpu" else prox_24
