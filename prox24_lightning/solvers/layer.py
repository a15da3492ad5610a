"""Prune one layer: choose the mask by a method, refine the values, report the loss."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.mask import mask_24, zeros_per_group
from prox24_lightning.solvers.admm import PATHS, admm, fitted_path
from prox24_lightning.solvers.config import Method, Refine, SolverConfig
from prox24_lightning.solvers.loss import check_layer, row_losses
from prox24_lightning.solvers.masked_cg import masked_cg
from prox24_lightning.solvers.proximal_gradient import proximal_gradient
from prox24_lightning.solvers.rounding import round_on_support, round_plainly
from prox24_lightning.solvers.sparsegpt import sparsegpt
from prox24_lightning.solvers.wanda import wanda
from prox24_lightning.utils.devices.cuda import without_tf32
from prox24_lightning.weights.groups import Dim, group_dims
from prox24_lightning.weights.rounding import RoundedForm


@dataclass(frozen=True)
class Solution:
    """A pruned layer.

    Attributes:
        weight: (out_features, in_features), exactly zero outside ``mask``, in the dtype of the solver.
        mask: bool, two True in every group of four.
        zero_losses: (out_features,), each row's local loss with all weights zero.
        losses: (out_features,), each row's local loss before refinement.
        refined_losses: (out_features,), the same after refinement; None without refinement.
        rounded_losses: (out_features,), the same after rounding to 8 bits; None without rounding.
        reached: share of the groups that had at most two non-zeros before the final choice of the mask.
        seconds: wall time, up to the last kernel.
    """

    weight: Tensor
    mask: Tensor
    zero_losses: Tensor
    losses: Tensor
    refined_losses: Tensor | None
    reached: float
    seconds: float
    rounded_losses: Tensor | None = None

    @property
    def loss(self) -> float:
        """Relative local loss before refinement: the lost share of the output's squared norm."""
        return _ratio(self.losses, self.zero_losses)

    @property
    def refined_loss(self) -> float | None:
        """Relative local loss after refinement; None without refinement."""
        return None if self.refined_losses is None else _ratio(self.refined_losses, self.zero_losses)

    @property
    def rounded_loss(self) -> float | None:
        """Relative local loss after rounding; None without rounding."""
        return None if self.rounded_losses is None else _ratio(self.rounded_losses, self.zero_losses)

    @staticmethod
    def joined(parts: Sequence[Solution]) -> Solution:
        """Concatenate the solutions of consecutive rows that were solved in parallel; the inverse of :meth:`rows`."""
        rows = [len(part.weight) for part in parts]
        refined = [part.refined_losses for part in parts if part.refined_losses is not None]
        rounded = [part.rounded_losses for part in parts if part.rounded_losses is not None]
        return Solution(
            torch.cat([part.weight for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat([part.zero_losses for part in parts]),
            torch.cat([part.losses for part in parts]),
            torch.cat(refined) if refined else None,
            sum(part.reached * count for part, count in zip(parts, rows, strict=True)) / sum(rows),
            max(part.seconds for part in parts),
            torch.cat(rounded) if rounded else None,
        )

    def rows(self, begin: int, end: int) -> Solution:
        """Return the solution of one of several stacked layers; each gets its rows' share of the time."""
        part = slice(begin, end)
        return Solution(
            self.weight[part],
            self.mask[part],
            self.zero_losses[part],
            self.losses[part],
            None if self.refined_losses is None else self.refined_losses[part],
            self.reached,
            self.seconds * (end - begin) / len(self.weight),
            None if self.rounded_losses is None else self.rounded_losses[part],
        )


def _ratio(losses: Tensor, zero_losses: Tensor) -> float:
    total = zero_losses.sum()
    return float(losses.sum() / total) if total > 0 else 0.0


def solve_layer(
    weight: Tensor,
    hessian: Tensor,
    *,
    method: Method = "prox",
    refine: Refine | None = "masked_gradient",
    dim: Dim = -1,
    steps: int | None = None,
    momentum: float = 0.0,
    damping: float | None = None,
    refine_steps: int = 300,
    tolerance: float = 1e-4,
    weights: RoundedForm | None = None,
    name: str = "layer",
) -> Solution:
    """Find a 2:4 weight that keeps the outputs of a linear layer: ``min_V 1/2 tr((V - W) H (V - W)^T)``.

    Args:
        weight: ``W``, (out_features, in_features); computed in float32, or float64 if it is float64. Layers that see
            the same inputs may be stacked along the rows: for ``dim=-1`` no row's result depends on another row.
        hessian: ``H``, (in_features, in_features), the mean of x x^T over tokens (any positive multiple works).
        method: ``"magnitude"``; ``"wanda"`` (arXiv 2306.11695: magnitude times the input's rms); ``"sparsegpt"`` (arXiv
            2301.00774); ``"prox"`` (arXiv 2501.18015's problem, solved by ADMM); ``"prox_gradient"`` (the same problem,
            solved by the paper's proximal gradient); ``"keep"`` keeps the zeros of a weight that is 2:4 already.
        refine: ``"masked_gradient"`` finds the best values for the chosen mask by masked conjugate gradients; None
            keeps the method's own values.
        dim: the dimension along which the groups of four lie: -1 for groups along inputs, 0 along outputs, (0, 1)
            for both at once: 4 x 4 blocks with a transposable mask.
        steps: of the prox methods; None is 200 for ``prox`` and 400 for ``prox_gradient``.
        momentum: of ``prox_gradient``.
        damping: None is each method's own: 0.01 of the mean diagonal for SparseGPT as published, else 0.001 of each
            diagonal entry, and 0.5 for rounding.
        refine_steps, tolerance: limits of the refinement (:func:`~prox24_lightning.solvers.masked_cg.masked_cg`).
        weights: round the result to 8 bits with a scale a row, its kept entries making up for each other's errors
            (:func:`~prox24_lightning.solvers.rounding.round_on_support`); None does not round.
        name: the layer's name, for messages.

    Raises:
        ValueError: for an unknown method or refinement, complex weights, sizes that do not fit, values that are not
            finite, rounding of groups along the outputs, and with ``"keep"`` a weight that is not 2:4.
    """
    config = SolverConfig(method, refine, steps, momentum, damping, refine_steps, tolerance, weights)
    return solve(weight, hessian, config, dim=dim, name=name)


@torch.no_grad()
@without_tf32()
def solve(
    weight: Tensor,
    hessian: Tensor,
    config: SolverConfig,
    *,
    dim: Dim = -1,
    name: str = "layer",
    shared: bool = False,
) -> Solution:
    """Find a 2:4 weight as :func:`solve_layer` does, with its arguments in one ``config``.

    Args:
        shared: all ranks are here with rows of the same layer, and work together on what the rows have in common.
    """
    begin = time.perf_counter()
    if weight.is_complex():
        raise ValueError(f"{name}: the solvers work on real numbers, got a weight of {weight.dtype}; leave it dense")
    dense = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32).contiguous()
    hessian = hessian.detach().to(dense)
    check_layer(dense, hessian, name)
    dims = group_dims(dense.shape, dim)
    dim = dims[0] if len(dims) == 1 else (dims[0], dims[1])

    if config.weights is not None and 1 not in dims:
        raise ValueError(
            f"{name}: weights={config.weights!r} takes groups along the inputs, these lie along the outputs"
        )

    found, damping = dense, config.method_damping
    if config.method in ("magnitude", "keep"):
        mask = mask_24(dense, dim=dim)
        if config.method == "keep" and bool((dense != 0).logical_and_(~mask).any()):
            raise ValueError(f"{name}: method='keep' keeps the zeros of a 2:4 weight, and this one has too few")
    elif config.method == "wanda":
        mask = wanda(dense, hessian, dim=dim)
    elif config.method == "sparsegpt":
        found, mask = sparsegpt(dense, hessian, dim=dim, damping=damping, name=name)
    else:
        steps = config.method_steps
        if config.method == "prox":
            path = PATHS[config.path]
            if path.fitted:
                path = fitted_path(path, hessian, damping, name=name)
                steps = config.steps or path.steps
            found = admm(
                dense,
                hessian,
                dim=dim,
                steps=steps,
                levels=path.levels,
                damping=damping,
                strengths=path.strengths,
                rhos=path.rhos,
                name=name,
                shared=shared,
            )
        else:
            momentum = config.momentum
            found = proximal_gradient(dense, hessian, dim=dim, steps=steps, momentum=momentum, damping=damping)
        # Wanda's scores decide the few groups that the prox leaves with more than two non-zeros.
        mask = wanda(found, hessian, dim=dim)
    reached = sum(float((zeros_per_group(found, dim=one) >= 2).float().mean()) for one in dims) / len(dims)

    result = torch.where(mask, found, 0.0)
    losses, refined = row_losses(result, dense, hessian), None
    if config.refine is not None:
        result = masked_cg(
            result,
            dense,
            hessian,
            mask,
            steps=config.refine_steps,
            tolerance=config.tolerance,
            damping=config.refine_damping,
            shared=shared,
        )
        refined = row_losses(result, dense, hessian)
    rounded = None
    if config.weights is not None:
        found = round_on_support(result, hessian, mask, config.weights, damping=config.rounding_damping, name=name)
        plain = round_plainly(result, config.weights)
        worse = row_losses(found, result, hessian) >= row_losses(plain, result, hessian)
        result = torch.where(worse.unsqueeze(1), plain, found)
        rounded = row_losses(result, dense, hessian)
    zero_losses = row_losses(torch.zeros_like(dense), dense, hessian)
    zero_losses.sum().item()  # waits for the device, so that `seconds` covers all kernels
    return Solution(result, mask, zero_losses, losses, refined, reached, time.perf_counter() - begin, rounded)
