"""Round the kept entries of a pruned layer to 8 bits, so that the entries of a row make up for each other's errors.

Given a mask and one scale a row, the values are those of a grid, and the local loss is a quadratic in them. Cyclic
coordinate descent takes one column after the other: each kept entry moves to the grid's value nearest to its best one,
given all others. GPTQ (arXiv 2210.17323) does that once, and lets only later columns make up for an error; its update
needs all entries, and fills pruned ones. A few sweeps over the kept entries need no inverse of the Hessian, and no step
raises the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.solvers.config import ROUNDING_DAMPING
from prox24_lightning.solvers.loss import regularized
from prox24_lightning.utils.devices.cuda_graphs import GraphedFunction
from prox24_lightning.weights.rounding import RoundedForm, expand_rows, round_values, row_scales, scales_of


def round_on_support(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor,
    form: RoundedForm,
    *,
    sweeps: int = 3,
    damping: float = ROUNDING_DAMPING,
    block: int = 64,
    name: str = "layer",
) -> Tensor:
    """Return a rounded ``V`` on ``mask`` with a lower ``1/2 tr((V - weight) H (V - weight)^T)`` than plain rounding.

    The largest entry of each row is rounded plainly and stays: it sets the row's scale, so that
    :func:`~prox24_lightning.weights.rounding.round_rows` finds the same scale and values in the result, also after a
    cast to bfloat16.

    Args:
        weight: (out_features, in_features), float32 or float64, whose outputs are to be kept: the best values on
            ``mask``, zero outside of it.
        hessian: (in_features, in_features).
        mask: bool, (out_features, in_features).
        form: of the values; each row has one scale.
        sweeps: over all columns; 0 rounds plainly.
        damping: added to the diagonal of ``hessian``, relative to each entry. Without it values fit the calibration
            tokens alone, and lose more on others than plain rounding does.
        block: columns between two updates of the whole rest; changes the time, not the result beyond rounding.
        name: of the layer, for errors.

    Raises:
        ValueError: for a row that cannot be rounded.
    """
    kept = torch.where(mask, weight, 0)
    # The scale that the packed file will find: that of the largest entry as the model stores it.
    largest = kept.abs().amax(1, keepdim=True).to(torch.bfloat16)
    scales = row_scales(largest, form, name=name)
    rounded = _nearest(kept, scales, form)
    hessian = regularized(hessian, damping)
    diagonal = hessian.diagonal()
    free = mask & (largest > 0)
    free[torch.arange(len(free), device=free.device), rounded.abs().argmax(1)] = False
    columns = weight.shape[1]
    descent = _Descent(rounded.new_empty(len(rounded), block), form)
    descend = GraphedFunction(descent, rounded.device)
    for _ in range(sweeps):
        gradient = (rounded - kept) @ hessian
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            part, found = rounded[:, start:stop], descent.moved[:, : stop - start]
            coupling = hessian[start:stop, start:stop]
            descend(part, gradient[:, start:stop], coupling, diagonal[start:stop], free[:, start:stop], scales)
            gradient.addmm_(found - part, hessian[start:stop])
            part.copy_(found)
    return rounded


class _Descent:
    """Take some columns one after the other to the grid's values that are best given all others; captured on a GPU.

    Args:
        moved: (out_features, columns or more), receives the values.
        form: of the grid.
    """

    def __init__(self, moved: Tensor, form: RoundedForm) -> None:
        self.moved = moved
        self.form = form

    def __call__(
        self, part: Tensor, gradient: Tensor, coupling: Tensor, diagonal: Tensor, free: Tensor, scales: Tensor
    ) -> None:
        slope = gradient.clone()
        for i in range(part.shape[1]):
            best = part[:, i] - slope[:, i] / diagonal[i]
            moved = torch.where(free[:, i], _nearest(best.unsqueeze(1), scales, self.form)[:, 0], part[:, i])
            slope.addr_(moved - part[:, i], coupling[i])
            self.moved[:, i] = moved


def round_plainly(weight: Tensor, form: RoundedForm) -> Tensor:
    """Return float32 (out_features, in_features) rows with each entry rounded by itself, as the packed file holds them.

    Nothing waits for the device, so that a step of training can be captured with it.
    """
    # The scale that the packed file will find: that of the largest entry as the model stores it.
    return _nearest(weight, scales_of(weight.abs().amax(1).to(torch.bfloat16).float(), form), form)


def _nearest(weight: Tensor, scales: Tensor, form: RoundedForm) -> Tensor:
    return expand_rows(round_values(weight, scales, form), scales, weight.dtype)
