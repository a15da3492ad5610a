"""Statistics of the weights' sparsity: a few numbers a layer, read from the device in one transfer.

Only :func:`measure_sparsity` waits for the device, once for all weights together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from prox24_lightning.mask.codes import flipped_entries, top_two_code
from prox24_lightning.mask.transposable import best_patterns, relative_squares
from prox24_lightning.prox import penalty_24, prox_path
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.utils.distributed import gathered_objects, raise_on_all_ranks, sum_over_ranks
from prox24_lightning.weights.blocks_4x4 import to_blocks
from prox24_lightning.weights.groups import Dim, group_dims, to_groups
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import copies_of, is_sharded, local_part


@dataclass(frozen=True)
class SparsityStats:
    """Statistics of one weight, or of several taken together.

    "In the metric" means: of ``weight * scale``, the coordinates in which masks are chosen.

    Attributes:
        groups: number of groups of four; in the block geometry those along both dimensions, so that everything that is
            counted by groups or entries counts both directions.
        zeros: share of the groups with exactly 0, 1, 2, 3, 4 zeros; they add up to one.
        retained_squared_norm: squared norm of the two largest entries of every group over that of all, in the metric,
            which is the share that a projection now would keep (in the block geometry by the best transposable mask).
            1.0 for a weight of zeros.
        penalty: mean of the penalty r (arXiv 2501.18015) over the groups, in the metric, relative to the cube of
            the rms there, so that layers compare. About 2.0 for Gaussian weights, 0 for a 2:4 weight.
        rms: root mean square of the weight itself, zeros included.
        mask_flips: share of entries of the top-two mask, in the metric, that differ from the measurement before;
            None for the first.
        strength: strength of the prox last used, units 1 / (weight * scale); the median over several weights;
            None before there is one.
    """

    groups: int
    zeros: tuple[float, ...]
    retained_squared_norm: float
    penalty: float
    rms: float
    mask_flips: float | None = None
    strength: float | None = None

    @property
    def groups_24(self) -> float:
        """Share of the groups that are 2:4; 1.0 only if all are."""
        return 1 - (self.zeros[0] + self.zeros[1])

    @property
    def sparsity(self) -> float:
        """Share of the entries that are exactly zero."""
        return sum(count * share for count, share in enumerate(self.zeros)) / 4


@dataclass(frozen=True)
class MeasuredMask:
    """The top-two mask of a measured weight: one byte a group, and whether a scale was in use."""

    code: Tensor
    scaled: bool


@torch.no_grad()
def measure_sparsity(
    weights: Sequence[GroupedWeight],
    *,
    scale_of: Callable[[str], Tensor | None] = lambda name: None,
    strengths: Mapping[str, Tensor] | None = None,
    last_masks: MutableMapping[str, MeasuredMask] | None = None,
    from_pass: PassStatistics | None = None,
) -> tuple[SparsityStats, dict[str, SparsityStats]]:
    """Return the statistics of all weights together and of each, with one wait for the device.

    Args:
        weights: at least one. Of a sharded weight each rank measures its part, and the sums of all ranks count; all
            ranks call this then.
        scale_of: weight name -> scale of the metric, broadcasting to the weight, or None.
        strengths: weight name -> 0-dim tensor; may lack weights.
        last_masks: weight name -> mask of the last measurement, from which flips are counted; replaced by the present
            mask. Masks with and without a scale are not compared, as the change of coordinates alone flips entries.
        from_pass: statistics from the pass that changed the weights; may lack weights.

    Returns:
        the whole, and a dict by weight name in the order of ``weights``.

    Raises:
        ValueError: on every rank, if one of several cannot measure its parts.
    """
    strengths, last_masks = strengths or {}, {} if last_masks is None else last_masks
    if not any(is_sharded(weight.parameter) for weight in weights):
        rows, compared = _local_rows(weights, scale_of, strengths, last_masks, from_pass)
    else:
        rows, compared, problem = [], [], None
        try:
            rows, compared = _local_rows(weights, scale_of, strengths, last_masks, from_pass)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        raise_on_all_ranks(problem)
        rows = _over_ranks(rows, weights)
        compared = [all(together) for together in zip(*gathered_objects(compared), strict=True)]
    device = rows[0].device
    values = torch.stack([row.to(device, non_blocking=True) for row in rows]).tolist()
    layers = {
        weight.name: _stats(row, weight.groups, flips)
        for weight, row, flips in zip(weights, values, compared, strict=True)
    }
    return _together(values, list(layers.values()), all(compared)), layers


def _local_rows(
    weights: Sequence[GroupedWeight],
    scale_of: Callable[[str], Tensor | None],
    strengths: Mapping[str, Tensor],
    last_masks: MutableMapping[str, MeasuredMask],
    from_pass: PassStatistics | None,
) -> tuple[list[Tensor], list[bool]]:
    """Return of this rank's part of each weight: its sums, flips and strength, and whether flips could be counted."""
    rows, compared = [], []
    for weight in weights:
        scale = scale_of(weight.name)
        part = local_part(weight.parameter)
        measured = None if from_pass is None else from_pass.current(weight.name, part, scale)
        if measured is not None and isinstance(weight.dim, int):
            sums, code = measured.sums[:-1], measured.code.movedim(weight.dim, -1).flatten()
        else:
            sums, code = weight_sums(part, dim=weight.dim, scale=scale)
        mask, last = MeasuredMask(code, scale is not None), last_masks.get(weight.name)
        comparable = last is not None and last.scaled == mask.scaled and last.code.device == code.device
        flips = sums.new_zeros(())
        if last is not None and comparable:
            counted = measured is not None and last.code.data_ptr() == measured.previous_code.data_ptr()
            flips = measured.sums[-1] if measured and counted else flipped_entries(last.code, code)
        strength = strengths[weight.name].detach().float() if weight.name in strengths else sums.new_full((), math.nan)
        extra = [flips, strength]
        rows.append(torch.cat([sums, torch.stack([value.to(sums.device) for value in extra])]))
        compared.append(comparable)
        last_masks[weight.name] = mask
    return rows, compared


def _over_ranks(rows: Sequence[Tensor], weights: Sequence[GroupedWeight]) -> list[Tensor]:
    """Return the sums of all ranks. A part that several ranks hold counts once; the strength is the first rank's."""
    copies = torch.tensor([copies_of(weight.parameter) for weight in weights], device=rows[0].device)
    total = sum_over_ranks(torch.stack([row.to(rows[0].device) for row in rows])[:, :-1] / copies.unsqueeze(1))
    return list(torch.cat([total, torch.stack([row[-1:].to(total.device) for row in rows])], 1))


def weight_sums(weight: Tensor, *, dim: Dim = -1, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums behind :class:`SparsityStats` for one weight, on its device.

    Args:
        weight: any floating dtype, any strides; its size along ``dim`` divides by 4.
        dim: dimension of the groups, or both of 4 x 4 blocks.
        scale: the metric; positive, broadcasts to ``weight``; None is one everywhere.

    Returns:
        float32 ``(9,)``: squares, squares in the metric, those of the two smallest of each group, penalty in the
        metric, groups with 0, 1, 2, 3, 4 zeros (rounded above 2**24, but zero only where there is none); and the
        mask as :func:`~prox24_lightning.mask.codes.top_two_code` gives it.
    """
    weight = weight.detach()
    if not weight.numel():  # a rank without a part of a sharded weight
        return weight.new_zeros(9, dtype=torch.float32), weight.new_zeros(0, dtype=torch.uint8)
    if isinstance(dim, int) and prox_path(weight) == "triton":
        from prox24_lightning.prox.triton.statistics_pass import group_sums

        return group_sums(weight, dim=dim, scale=scale)
    # One pass lays the first, second, third and fourth entries of all groups in rows, so the rest is contiguous.
    dims = group_dims(weight.shape, dim)
    entries = torch.cat([_in_rows(weight, one) for one in dims], 1).float()
    zeros = (entries == 0).view(torch.uint8)
    zeros = zeros[0] + zeros[1] + zeros[2] + zeros[3]
    squares = torch.linalg.vector_norm(entries).square()
    if scale is not None:
        expanded = scale.detach().expand(weight.shape)
        entries *= torch.cat([_in_rows(expanded, one) for one in dims], 1)
    penalty = penalty_24(entries, dim=0)
    in_metric = entries.square_()
    lost, code = _lost_by_groups(in_metric) if len(dims) == 1 else _lost_by_blocks(weight, scale, (dims[0], dims[1]))
    sums = [squares, in_metric.sum(), lost, penalty]
    sums += [torch.count_nonzero(zeros == count) for count in range(5)]
    return torch.stack([value.float() for value in sums]), code


def _lost_by_groups(in_metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the two smallest squares of every group, and the code of the top-two mask, from (4, groups)."""
    high, low = torch.maximum(in_metric[0::2], in_metric[1::2]), torch.minimum(in_metric[0::2], in_metric[1::2])
    # The sum of the two smallest is exactly zero for a 2:4 group; one minus the two largest has a rounding error.
    lost = torch.minimum(low[0], low[1])
    lost += torch.minimum(torch.minimum(high[0], high[1]), torch.maximum(low[0], low[1]))
    return lost.sum(), top_two_code(in_metric)


def _lost_by_blocks(weight: Tensor, scale: Tensor | None, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the squares outside the best transposable mask, counted along both directions, and the codes of the mask's
    columns and rows."""
    values = weight.float() if scale is None else weight.float() * scale.detach()
    blocks = to_blocks(values, dims)
    keep = best_patterns(relative_squares(blocks))
    bits = keep.to(torch.uint8) << torch.arange(4, dtype=torch.uint8, device=keep.device).view(4, 1, 1)
    across = keep.movedim(1, 0).to(torch.uint8) << torch.arange(4, dtype=torch.uint8, device=keep.device).view(4, 1, 1)
    lost = torch.where(keep, 0.0, blocks).square().sum()
    return 2 * lost, torch.cat([bits.sum(0, dtype=torch.uint8), across.sum(0, dtype=torch.uint8)]).flatten()


def _in_rows(tensor: Tensor, dim: int) -> Tensor:
    """Return a new ``(4, groups)``, whose row i is the i-th entry of every group."""
    return torch.stack(to_groups(tensor, dim).unbind(-1)).flatten(1)


def _stats(row: Sequence[float], groups: int, compared: bool) -> SparsityStats:
    squares, in_metric, lost, penalty, *zeros, flips, strength = row
    entries = 4 * groups
    return SparsityStats(
        groups=groups,
        zeros=tuple(count / groups for count in zeros),
        retained_squared_norm=1 - lost / in_metric if in_metric else 1.0,
        penalty=penalty / groups / (in_metric / entries) ** 1.5 if in_metric else 0.0,
        rms=math.sqrt(squares / entries),
        mask_flips=flips / entries if compared else None,
        strength=None if math.isnan(strength) else strength,
    )


def _together(rows: Sequence[Sequence[float]], layers: Sequence[SparsityStats], compared: bool) -> SparsityStats:
    groups = sum(layer.groups for layer in layers)
    totals = [sum(column) for column in zip(*rows, strict=True)]
    strengths = [layer.strength for layer in layers if layer.strength is not None]
    whole = _stats([*totals[:-1], median(strengths) if strengths else math.nan], groups, compared)
    # Sums of cubes do not compare between layers of different scales; their relative values do.
    penalty = sum(layer.penalty * layer.groups for layer in layers) / groups
    return SparsityStats(**{**vars(whole), "penalty": penalty})
