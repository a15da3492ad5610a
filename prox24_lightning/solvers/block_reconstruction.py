"""Block reconstruction: the weights of one pruned block refined together, by the error of the block's own output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.statistics.output_error import relative_error, token_weights
from prox24_lightning.utils.devices.cuda_graphs import GraphedFunction, GraphedStep
from prox24_lightning.utils.distributed import gathered_objects, mean_over_ranks
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
_JUDGED_TOKENS = 1 << 15
"""Tokens on which a block's error is taken before and after; more would not change which of the two is lower."""


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
        the mean relative error before and after, on batches that hold at least 32768 tokens, or on all. Where it did
        not fall, the parameters are as they were.
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
        judged=_judged_parts(parts),
        trained=trained,
        roundings=roundings,
        learning_rate=learning_rate,
        graphed=graphed,
    )


def _judged_parts(parts: Sequence[tuple[Any, Tensor, Tensor]]) -> list[tuple[Any, Tensor, Tensor]]:
    """Return evenly spaced parts with at least 32768 tokens, on which the error is taken; all, if they hold fewer.

    Every rank takes as many as the one that needs most: the block may make collective calls of its own.
    """

    def spread(count: int) -> list[tuple[Any, Tensor, Tensor]]:
        return [parts[number * len(parts) // count] for number in range(count)]

    def hold_enough(count: int) -> bool:
        return sum(weights.numel() for _, _, weights in spread(count)) >= _JUDGED_TOKENS

    wanted = next(filter(hold_enough, range(1, len(parts))), len(parts))
    return spread(min(len(parts), max(gathered_objects(wanted))))


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


class _FlatParameters:
    """Parameters of one device and dtype as one flat tensor, with one flat gradient.

    Adam then takes a few kernels for all of them; for each small parameter by itself they take longer than the
    gradients of the block. The values are ``start + rate * change``, with the rate of each parameter, so that one step
    size fits all, and a parameter whose gradient is zero stays as it is.

    Attributes:
        change: what Adam changes; ``change.grad`` is its gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        learning_rate: float,
        dtype: torch.dtype,
    ) -> None:
        self._parameters = dict(parameters)
        self._sizes = [parameter.numel() for parameter in parameters.values()]
        starts = [parameter.detach().to(dtype, copy=True) for parameter in parameters.values()]
        self._rates = [start.square().mean().sqrt().clamp_min(_SMALLEST_RMS) * learning_rate for start in starts]
        self._starts = starts
        self.change = starts[0].new_zeros(sum(self._sizes))
        self.change.grad = torch.zeros_like(self.change)
        dropped = [
            ~masks[name] if name in masks else p.new_zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()
        ]
        self._dropped = torch.cat([one.flatten() for one in dropped])

    def take_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Copy the gradients of the parameters, in their order."""
        assert self.change.grad is not None
        for place, gradient in zip(self.change.grad.split(self._sizes), gradients, strict=True):
            place.view(gradient.shape).copy_(gradient)

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights."""
        assert self.change.grad is not None
        # Filled, not multiplied: an infinite gradient of a pruned weight must not become NaN.
        self.change.grad.masked_fill_(self._dropped, 0.0)

    @torch.no_grad()
    def write(self, roundings: Mapping[str, Rounding]) -> None:
        """Write the values into the parameters, rounded where ``roundings`` has a function for it."""
        changes = self.change.split(self._sizes)
        for (name, parameter), start, change, rate in zip(
            self._parameters.items(), self._starts, changes, self._rates, strict=True
        ):
            value = torch.addcmul(start, change.view(start.shape), rate)
            parameter.copy_(roundings[name](value.float()) if name in roundings else value)


def _flattened(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], learning_rate: float
) -> list[tuple[list[int], _FlatParameters]]:
    """Return flat parameters for each device and dtype, and which of ``parameters`` each of them holds, by number."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, parameter in enumerate(parameters.values()):
        # Of 16-bit parameters the steps would be lost in rounding.
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        alike.setdefault((parameter.device, dtype), []).append(place)
    names = list(parameters)
    return [
        (
            places,
            _FlatParameters({names[place]: parameters[names[place]] for place in places}, masks, learning_rate, dtype),
        )
        for (_, dtype), places in alike.items()
    ]


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
    flats = _flattened(parameters, masks, learning_rate)
    changes = [flat.change for _, flat in flats]
    device = changes[0].device
    # Adam's fused kernel takes a step size in float32 only.
    size = torch.ones((), dtype=torch.float32, device=device)
    optimizer = torch.optim.Adam(changes, lr=size, betas=_BETAS, fused=device.type == "cuda", capturable=size.is_cuda)

    def differentiate(*part: Any) -> None:
        with torch.enable_grad():
            gradients = torch.autograd.grad(error_of(*part), values, materialize_grads=True)
        for places, flat in flats:
            flat.take_gradients([gradients[place] for place in places])

    def update() -> None:
        for _, flat in flats:
            flat.mask_gradients()
        optimizer.step()
        for _, flat in flats:
            flat.write(roundings)

    # On a GPU the hundreds of small kernels of both are captured once; the ranks exchange gradients in between.
    first, second = (differentiate, update)
    if graphed:
        first, second = GraphedFunction(differentiate, device), GraphedStep(update, device)
    for number in range(steps):
        rise = min(1.0, (number + 1) / (min(_WARM_UP, steps // 4) + 1))
        size.fill_(rise * 0.5 * (1 + math.cos(math.pi * number / steps)))
        first(*parts[number % len(parts)])
        for change in changes:
            assert change.grad is not None
            mean_over_ranks(change.grad)
        second()
        between_pieces()


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
