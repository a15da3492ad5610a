"""The loss of a model on calibration batches, in its own terms where it has any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import call_model
from prox24_lightning.utils.tensors import first_tensor, to_device


class ModelLoss:
    """Mean loss over batches: what the model returns as ``loss``, the loss of the next token, or the relative squared
    error of its first output against the outputs that it gave when this object was made.

    Args:
        model: called as :func:`~prox24_lightning.oneshot.prune_layerwise` calls it.
        batches: mappings, tuples or tensors.
        device: of the model.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], device: torch.device) -> None:
        self._model, self._device = model, device
        self._batches = [to_device(dict(one) if isinstance(one, Mapping) else one, device) for one in batches]
        self._references: list[Tensor] = []
        self._terms: Callable[[int, Any], Tensor] = self._own
        output = call_model(model, to_device(self._batches[0], device, copy=True))
        if _loss_of(output) is None:
            self._terms = self._next_token
            if not self._predicts_tokens(output):
                self._terms = self._difference
                self._references = [_output(call_model(model, batch)).detach().clone() for batch in self._batches]

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the loss of the model as it is now."""
        total = torch.zeros((), device=self._device)
        for number, batch in enumerate(self._batches):
            total += self._terms(number, call_model(self._model, to_device(batch, self._device, copy=True)))
        return float(total / len(self._batches))

    def _predicts_tokens(self, output: Any) -> bool:
        first = self._batches[0]
        ids, logits = first.get("input_ids") if isinstance(first, Mapping) else None, getattr(output, "logits", None)
        return isinstance(ids, Tensor) and isinstance(logits, Tensor) and logits.shape[:-1] == ids.shape

    def _own(self, number: int, output: Any) -> Tensor:
        loss = _loss_of(output)
        assert loss is not None
        return loss.float()

    def _next_token(self, number: int, output: Any) -> Tensor:
        ids = self._batches[number]["input_ids"]
        losses = [
            F.cross_entropy(logits[:-1].float(), one[1:], reduction="sum")
            for logits, one in zip(output.logits, ids, strict=True)
        ]
        return torch.stack(losses).sum() / (ids.numel() - len(ids))

    def _difference(self, number: int, output: Any) -> Tensor:
        reference = self._references[number].float()
        return (_output(output).float() - reference).square().sum() / reference.square().sum().clamp_min(1e-30)


def _loss_of(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _output(output: Any) -> Tensor:
    found = first_tensor(tuple(output.values()) if isinstance(output, Mapping) else output)
    if found is None:
        raise ValueError(f"the model returns {type(output).__name__}, in which no output can be compared")
    return found
