"""Recognise the loss that training minimises, to compute it for other outputs of the model on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossOf = Callable[[Any], Tensor]
"""Output of a model -> its loss on the batch, float32, ()."""

_TOLERANCE = 0.02
"""How far a recognised loss may differ from the one that is minimised, relative to it: terms that hardly count."""


def possible_losses(output: Any, ids: Any, targets: Sequence[Tensor]) -> list[LossOf]:
    """Return the losses that may be meant where a model returns ``output``, the likeliest first.

    They are: what the model returns as ``loss``; the cross entropy of the next token, if ``ids`` are tokens,
    (sequences, length), and it returns logits for each; the cross entropy against each integer tensor of ``targets``
    that fits its logits, (..., classes) or (batch, classes, ...); the squared error against each floating one of the
    same shape.
    """
    found: list[LossOf] = [] if own_loss(output) is None else [value_of_own_loss]
    logits = _logits_of(output)
    if logits is None:
        return found
    if isinstance(ids, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape and ids.shape[1] > 1:
        found.append(partial(_next_token, ids))
    for target in targets:
        if target.is_floating_point():
            if target.shape == logits.shape:
                found.append(partial(_squared_error, target.clone()))  # the module may write into it later
        elif _fits(logits, target):
            found.append(partial(_class, target.clone()))
    return found


def recognised(losses: Sequence[tuple[LossOf, Tensor]], minimised: Tensor | None) -> tuple[LossOf, Tensor] | None:
    """Return the loss, with its value, that is nearest to the one which training minimises; None if none is near.

    Args:
        losses: with their values on the batch.
        minimised: the value of the training loss on it; None if it is not known, and the model's own is taken.
    """
    if minimised is None:
        return next((pair for pair in losses if pair[0] is value_of_own_loss), None)
    wanted = float(minimised.detach())
    near = [pair for pair in losses if abs(float(pair[1]) - wanted) <= _TOLERANCE * abs(wanted)]
    return min(near, key=lambda pair: abs(float(pair[1]) - wanted), default=None)


def own_loss(output: Any) -> Tensor | None:
    """Return what a model returns as ``loss``: one value; None without it."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats, of logits (sequences, length, vocabulary) against the tokens that
    follow, of ``ids`` (sequences, length)."""
    return _cross_entropy(logits[:, :-1], ids[:, 1:])


def value_of_own_loss(output: Any) -> Tensor:
    """Return the value of :func:`own_loss`, float32, (), of a model that returns one."""
    loss = own_loss(output)
    assert loss is not None
    return loss.detach().float().reshape(())


def _next_token(ids: Tensor, output: Any) -> Tensor:
    return next_token_loss(_logits_of(output), ids)


def _class(target: Tensor, output: Any) -> Tensor:
    return _cross_entropy(_logits_of(output), target)


def _squared_error(target: Tensor, output: Any) -> Tensor:
    logits = _logits_of(output)
    return F.mse_loss(logits.float(), target.to(logits.device).float())


def _logits_of(output: Any) -> Any:
    """The logits, or the tensor that a model returns; None without either."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return logits.detach() if isinstance(logits, Tensor) and logits.is_floating_point() else None


def _fits(logits: Tensor, target: Tensor) -> bool:
    """Whether the target may hold the classes: (...) for logits (..., classes), or (batch, ...) for (batch, classes,
    ...) with two dimensions or more."""
    if target.dtype != torch.int64 or logits.dim() < 2:
        return False
    second = logits.dim() > 3 and target.shape == (logits.shape[0], *logits.shape[2:])
    return second or (logits.dim() <= 3 and target.shape == logits.shape[:-1])


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    target = target.to(logits.device)
    if logits.dim() != 3:
        return F.cross_entropy(logits.float(), target)
    # One sequence at a time: logits in float32 are large.
    sums = [F.cross_entropy(one.float(), row, reduction="sum") for one, row in zip(logits, target, strict=True)]
    return torch.stack(sums).sum() / (target != -100).sum().clamp_min(1)
