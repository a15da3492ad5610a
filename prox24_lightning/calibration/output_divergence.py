"""How far a changed model's outputs are from those it gave before, as a rise of its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.calibration.model_loss import model_output


class OutputDivergence:
    """Mean Kullback-Leibler divergence of a model's predictions from those that it gave when this object was made.

    For a model whose probabilities are right it is the rise of the loss, in nats a token. Measured on some thousand
    tokens it is far less noisy than the difference of two losses: the text's own luck is not in it. Of a model without
    ``logits`` it is the squared error of the first output, relative to its square.

    Args:
        runs: each calls the model, as it is then, on one batch.

    Raises:
        ValueError: if the model returns nothing that can be compared.
    """

    def __init__(self, runs: Sequence[Callable[[], Any]]) -> None:
        self._runs = list(runs)
        with torch.no_grad():
            self._references = [_outputs(run()) for run in self._runs]

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the divergence of the model as it is now."""
        found = 0.0
        for run, (before, are_logits) in zip(self._runs, self._references, strict=True):
            now, _ = _outputs(run())
            found += _divergence(before, now) if are_logits else _error(before, now)
        return found / len(self._runs)


def _outputs(output: Any) -> tuple[Tensor, bool]:
    logits = getattr(output, "logits", None)
    return (logits.detach(), True) if isinstance(logits, Tensor) else (model_output(output).detach().clone(), False)


def _divergence(before: Tensor, now: Tensor) -> float:
    rows = [  # one sequence at a time: logits in float32 are large
        F.kl_div(new.float().log_softmax(-1), old.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for old, new in zip(before, now, strict=True)
    ]
    return float(torch.stack([row.mean() for row in rows]).mean())


def _error(before: Tensor, now: Tensor) -> float:
    before = before.float()
    return float((now.float() - before).square().sum() / before.square().sum().clamp_min(1e-30))
