"""The loss of a model on calibration batches, in its own terms where it has any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.calibration.recognised_loss import next_token_loss, own_loss, value_of_own_loss
from prox24_lightning.utils.tensors import first_tensor


class ModelLoss:
    """Mean loss over runs: what the model returns as ``loss``, the loss of the next token, or the relative squared
    error of its first output against the outputs that it gave when this object was made.

    Args:
        runs: each calls the model, as it is then, on one batch.
        ids: the tokens of each run, (sequences, length), if it is one of a language model; else None.

    Raises:
        ValueError: if the model returns nothing that can be compared.
    """

    def __init__(self, runs: Sequence[Callable[[], Any]], ids: Sequence[Any]) -> None:
        self._runs, self._ids = list(runs), list(ids)
        self._references: list[Tensor] = []
        output = self._runs[0]()
        self._terms: Callable[[int, Any], Tensor] = self._own
        if own_loss(output) is None:
            self._terms = self._next_token
            if not all(isinstance(one, Tensor) for one in self._ids) or not _predicts(output, self._ids[0]):
                self._terms = self._difference
                self._references = [model_output(run()).detach().clone() for run in self._runs]

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the loss of the model as it is now."""
        return sum(float(self._terms(number, run())) for number, run in enumerate(self._runs)) / len(self._runs)

    def _own(self, number: int, output: Any) -> Tensor:
        return value_of_own_loss(output)

    def _next_token(self, number: int, output: Any) -> Tensor:
        return next_token_loss(output.logits, self._ids[number])

    def _difference(self, number: int, output: Any) -> Tensor:
        reference = self._references[number].float()
        error = (model_output(output).detach().float() - reference).square().sum()
        return error / reference.square().sum().clamp_min(1e-30)


def _predicts(output: Any, ids: Tensor) -> bool:
    """Whether the model gives logits for each token."""
    logits = getattr(output, "logits", None)
    return isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape


def model_output(output: Any) -> Tensor:
    """Return the first tensor of what a model returns.

    Raises:
        ValueError: if there is none.
    """
    found = first_tensor(tuple(output.values()) if isinstance(output, Mapping) else output)
    if found is None:
        raise ValueError(f"the model returns {type(output).__name__}, in which no output can be compared")
    return found
