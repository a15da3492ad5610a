"""Block reconstruction: the weights of one pruned block refined together, by the error of the block's own output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.statistics.output_error import relative_error, token_weights
from prox24_lightning.utils.cuda_graphs import GraphedFunction, GraphedStep
from prox24_lightning.utils.distributed import mean_over_ranks
from prox24_lightning.utils.long_work import between_pieces

Forward = Callable[[Any], Tensor]
"""Calls the block once, on one calibration batch, and returns its output, (..., features)."""

Rounding = Callable[[Tensor], Tensor]
"""float32 values of a parameter -> what is stored of them."""

LEARNING_RATE = 1.2e-2
"""Largest step, relative to the rms of each tensor."""
_SMALLEST_RMS = 1e-2
"""Taken for tensors below it: a bias may begin at zero, and has to move."""
_ATTEMPTS = 3
_SHRINKAGE = 0.25
"""Of the step size from one attempt to the next, while the error does not fall."""
_WARM_UP = 16
"""Steps of growing size at the start: Adam's first steps take every weight as far as the others, and of some blocks
they double the error that the rest of the steps then have to make good."""
_BETAS = (0.9, 0.95)


def reconstruct_block(
    block: nn.Module,
    masks: Mapping[str, Tensor],
    forward: Forward,
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    *,
    steps: int,
    trained: Collection[Tensor] | None = None,
    feature_weights: Tensor | None = None,
    roundings: Mapping[str, Rounding] | None = None,
    learning_rate: float = LEARNING_RATE,
    graphed: bool = True,
) -> tuple[float, float]:
    """Lower the error of a block's output by Adam on all its parameters; pruned weights stay zero.

    The layer-wise solver answers each layer for its own output alone. Here the layers of a block answer together, its
    norms and biases too, for what the block returns (block reconstruction: arXiv 2102.05426; of pruned language
    models: arXiv 2402.12419). Each step takes one batch; the step size rises for a few steps and falls as a cosine.

    In a distributed run every rank has its own batches, as many as the others, and gradients are averaged.

    Args:
        block: what is changed: its ``trained`` parameters, in place.
        masks: bool, by the names of those of them that are pruned.
        forward: calls the block on one of ``batches``.
        batches: tensors and other values, in tuples, lists and dictionaries as they come.
        targets: the output that each of them is to give.
        steps: how many.
        trained: parameters that may change; None: those that ask for gradients.
        feature_weights: (features,), what a unit of squared error in each feature counts; None is 1 for all.
        roundings: by the names of those parameters that are stored rounded. The block computes with rounded values,
            whose gradients move the float32 values behind them (a straight-through estimate).
        learning_rate: relative to the rms of each parameter; where the error does not fall, smaller ones are tried.
        graphed: steps may be captured as a CUDA graph; False where ``forward`` draws random numbers.

    Returns:
        the mean relative error before and after. Where it did not fall, the parameters are as they were.
    """
    if feature_weights is not None:
        roots = feature_weights.sqrt()
        unweighted, forward = forward, lambda batch: unweighted(batch) * roots
        targets = [target * roots for target in targets]
    parts = [(batch, target, token_weights(target)) for batch, target in zip(batches, targets, strict=True)]

    def error_of(batch: Any, target: Tensor, weights: Tensor) -> Tensor:
        return relative_error(forward(batch), target, weights)

    return descend_together(
        block,
        masks,
        error_of,
        parts,
        steps=steps,
        trained=trained,
        roundings=roundings,
        learning_rate=learning_rate,
        graphed=graphed,
    )


def descend_together(
    module: nn.Module,
    masks: Mapping[str, Tensor],
    error_of: Callable[..., Tensor],
    parts: Sequence[tuple[Any, ...]],
    *,
    steps: int,
    judged: Sequence[tuple[Any, ...]] | None = None,
    trained: Collection[Tensor] | None = None,
    roundings: Mapping[str, Rounding] | None = None,
    learning_rate: float = LEARNING_RATE,
    graphed: bool = True,
) -> tuple[float, float]:
    """Lower an error that several weights of a module have in common, as :func:`reconstruct_block` does.

    Args:
        error_of: called with each of ``parts``; its gradient is taken.
        parts: one a step.
        judged: parts whose mean error decides whether the steps helped; None: ``parts``.

    Other arguments and the result are those of :func:`reconstruct_block`.
    """
    judged = parts if judged is None else judged
    with _own_parameters(module, trained) as parameters:
        before = [parameter.detach().clone() for parameter in parameters.values()]
        first = _mean_error(error_of, judged)
        try:
            for attempt in range(_ATTEMPTS if parameters else 0):
                rate = learning_rate * _SHRINKAGE**attempt
                _descend(parameters, masks, error_of, parts, steps, rate, roundings or {}, graphed=graphed)
                last = _mean_error(error_of, judged)
                if last < first:
                    return first, last
                _write(parameters, before)
        except BaseException:
            _write(parameters, before)
            raise
        return first, first


@contextmanager
def _own_parameters(block: nn.Module, trained: Collection[Tensor] | None) -> Iterator[dict[str, nn.Parameter]]:
    """Put other parameters, which share their memory, in the places of those of ``block`` that may change; by name.

    Autograd remembers on which stream a training step has used a parameter, and makes that stream wait for gradients,
    which no graph capture allows. Nor do hooks of the training see the others.
    """
    places = [
        (owner, name, parameter)
        for owner in block.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if (parameter.requires_grad if trained is None else parameter in trained) and parameter.is_floating_point()
    ]
    made = {parameter: nn.Parameter(parameter.detach()) for _, _, parameter in places}
    try:
        for owner, name, parameter in places:
            setattr(owner, name, made[parameter])
        changing = set(made.values())
        yield {name: parameter for name, parameter in block.named_parameters() if parameter in changing}
    finally:
        for owner, name, parameter in places:
            setattr(owner, name, parameter)


def _descend(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    error_of: Callable[..., Tensor],
    parts: Sequence[tuple[Any, ...]],
    steps: int,
    learning_rate: float,
    roundings: Mapping[str, Rounding],
    *,
    graphed: bool,
) -> None:
    values = list(parameters.values())
    # Of 16-bit parameters the steps would be lost in rounding.
    masters = [value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True) for value in values]
    # Adam's fused kernel takes a step size in float32 only.
    rates = [value.square().mean().sqrt().float().clamp_min(_SMALLEST_RMS) * learning_rate for value in masters]
    groups = [{"params": [master], "lr": rate.clone()} for master, rate in zip(masters, rates, strict=True)]
    cuda = masters[0].is_cuda
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=cuda, capturable=cuda)
    size = rates[0].new_ones(())
    together = _joined_gradients(masters)
    dropped = {name: ~mask for name, mask in masks.items()}

    def differentiate(*part: Any) -> None:
        with torch.enable_grad():
            gradients = torch.autograd.grad(error_of(*part), values, materialize_grads=True)
        for master, gradient in zip(masters, gradients, strict=True):
            assert master.grad is not None
            master.grad.copy_(gradient)

    def update() -> None:
        for name, master in zip(parameters, masters, strict=True):
            if name in dropped and master.grad is not None:
                # Filled, not multiplied: an infinite gradient of a pruned weight must not become NaN.
                master.grad.masked_fill_(dropped[name], 0.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            torch.mul(rate, size, out=group["lr"])
        optimizer.step()
        with torch.no_grad():
            stored = [
                roundings[name](master.float()) if name in roundings else master
                for name, master in zip(parameters, masters, strict=True)
            ]
        _write(parameters, stored)

    # On a GPU the hundreds of small kernels of both are captured once; the ranks exchange gradients in between.
    first, second = (differentiate, update)
    if graphed:
        first, second = GraphedFunction(differentiate, masters[0].device), GraphedStep(update, masters[0].device)
    for number in range(steps):
        rise = min(1.0, (number + 1) / (min(_WARM_UP, steps // 4) + 1))
        size.fill_(rise * 0.5 * (1 + math.cos(math.pi * number / steps)))
        first(*parts[number % len(parts)])
        for gradients in together:
            mean_over_ranks(gradients)
        second()
        between_pieces()


def _joined_gradients(masters: Sequence[Tensor]) -> list[Tensor]:
    """Give every tensor a gradient that is a part of one tensor for each device and dtype, and return these."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for master in masters:
        alike.setdefault((master.device, master.dtype), []).append(master)
    found = []
    for members in alike.values():
        found.append(members[0].new_zeros(sum(master.numel() for master in members)))
        parts = found[-1].split([master.numel() for master in members])
        for master, part in zip(members, parts, strict=True):
            master.grad = part.view(master.shape)
    return found


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters.values(), values, strict=True):
        parameter.copy_(value)


def _mean_error(error_of: Callable[..., Tensor], parts: Sequence[tuple[Any, ...]]) -> float:
    with torch.enable_grad():  # as in the steps: what is compiled for them serves here too
        errors = []
        for part in parts:
            between_pieces()
            errors.append(error_of(*part).detach())
    return float(mean_over_ranks(torch.stack(errors).mean()))
