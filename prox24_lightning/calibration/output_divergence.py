"""How far a changed model's outputs are from those it gave before, as a rise of its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.calibration.model_loss import model_output


class OutputDivergence:
    """Mean Kullback-Leibler divergence of a model's predictions from those that it gave when this object was made.

    For a model whose probabilities are right it is the rise of the loss, in nats a token. Measured on some thousand
    tokens it is far less noisy than the difference of two losses: the text's own luck is not in it. Of a model without
    ``logits``, or with a single one, it is the squared error of the first output, relative to its square.

    Args:
        runs: each calls the model, as it is then, on one batch.

    Raises:
        ValueError: if the model returns nothing that can be compared.
    """

    def __init__(self, runs: Sequence[Callable[[], Any]]) -> None:
        self._runs = list(runs)
        with torch.no_grad():
            self._references = [predictions(run()) for run in self._runs]

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the divergence of the model as it is now."""
        found = [divergence(before, run()) for run, before in zip(self._runs, self._references, strict=True)]
        return float(torch.stack(found).mean())


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicted on a batch.

    Attributes:
        values: its logits, or the first output of a model without.
        are_logits: whether they are logits of several classes or tokens.
    """

    values: Tensor
    are_logits: bool


def predictions(output: Any) -> Predictions:
    """Return what a model's output predicts, without gradients.

    Raises:
        ValueError: if there is nothing that can be compared.
    """
    logits = _logits(output)
    if logits is not None and logits.dim() > 1 and logits.shape[-1] > 1:  # a single one is the value of a regression
        return Predictions(logits.detach(), True)
    return Predictions(_values(output).detach().clone(), False)


def divergence(before: Predictions, output: Any) -> Tensor:
    """Return the divergence of a model's output from earlier predictions on the same batch; it has a gradient."""
    if before.are_logits:
        pairs = zip(before.values, output.logits, strict=True)
        return torch.stack([_divergence_of_sequence(old, new) for old, new in pairs]).mean()
    old = before.values.float()
    return (_values(output).float() - old).square().sum() / old.square().sum().clamp_min(1e-30)


def _logits(output: Any) -> Tensor | None:
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _values(output: Any) -> Tensor:
    logits = _logits(output)
    return model_output(output) if logits is None else logits


def _divergence_of_sequence(before: Tensor, now: Tensor) -> Tensor:
    """Of one sequence, since logits in float32 are large."""
    before, now = before.float().log_softmax(-1), now.float().log_softmax(-1)
    return F.kl_div(now, before, reduction="none", log_target=True).sum(-1).mean()
