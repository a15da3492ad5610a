"""Compute the distillation losses of one training step: record the student's calls, run the teacher on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prox24_lightning.finetune.distillation.losses import distillation_loss, feature_loss, logits_of, squared_error
from prox24_lightning.finetune.distillation.module_outputs import CallRecorder, RecordedCall
from prox24_lightning.finetune.distillation.teacher import teacher_kwargs
from prox24_lightning.utils.tensors import first_tensor

OutputLoss = Literal["kl", "mse"]


@dataclass(frozen=True)
class LossTerms:
    """Scalar losses to add to a training loss: of the outputs and, unless left out, of the hidden states."""

    output: Tensor
    features: Tensor | None


class TeacherComparison:
    """Compare the outputs of ``student`` with those of ``teacher`` on the same inputs.

    Args:
        student: the module that the training step calls.
        teacher: frozen, in evaluation mode, on the student's device.
        name: of the student, for error messages.
        loss: ``"kl"`` or ``"mse"`` between the outputs.
        temperature: of ``"kl"``.
        blocks: pairs of modules inside student and teacher by name, whose outputs (hidden states) are compared too.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        name: str,
        loss: OutputLoss = "kl",
        temperature: float = 1.0,
        blocks: Mapping[str, tuple[nn.Module, nn.Module]] | None = None,
    ) -> None:
        self.name = name
        self.teacher = teacher
        self.loss = loss
        self.temperature = temperature
        self._blocks = tuple(blocks or ())
        mine = {key: pair[0] for key, pair in (blocks or {}).items()}
        self._student_calls = CallRecorder(student, mine, copy_inputs=True)
        self._teacher_calls = CallRecorder(teacher, {key: pair[1] for key, pair in (blocks or {}).items()})

    def close(self) -> None:
        """Remove every hook."""
        self._student_calls.close()
        self._teacher_calls.close()

    @contextmanager
    def recording(self) -> Iterator[list[RecordedCall]]:
        """Record the student's calls within the context."""
        with self._student_calls.recording() as calls:
            yield calls

    def terms(self, calls: list[RecordedCall]) -> LossTerms:
        """Return the mean losses over ``calls``; calls without gradients (metrics, say) do not count.

        Raises:
            ValueError: if no call carries gradients, or the outputs of student and teacher differ in shape.
        """
        if not calls:
            raise ValueError(
                f"the training step never called {self.name!r}: name the module that it calls as a whole (one whose "
                "graph torch.compile built before the fit is not seen: compile it anew)"
            )
        calls = [call for call in calls if self._logits(call.output).requires_grad]
        if not calls:
            raise ValueError(
                f"the training step called {self.name!r} without gradients only; there is nothing to distil into"
            )
        terms = [self._compare(call) for call in calls]
        output = torch.stack([term.output for term in terms]).mean()
        features = [term.features for term in terms if term.features is not None]
        return LossTerms(output, torch.stack(features).mean() if features else None)

    def _compare(self, call: RecordedCall) -> LossTerms:
        with torch.no_grad(), self._teacher_calls.recording() as answers:
            output = self.teacher(*call.args, **teacher_kwargs(self.teacher, call.kwargs))
        student, teacher = self._logits(call.output), self._logits(output)
        try:
            if self.loss == "kl":
                loss = distillation_loss(student, teacher, temperature=self.temperature)
            else:
                loss = squared_error(student, teacher)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if not self._blocks:
            return LossTerms(loss, None)
        return LossTerms(loss, torch.stack([self._distance(key, call, answers[-1]) for key in self._blocks]).mean())

    def _distance(self, key: str, call: RecordedCall, answer: RecordedCall) -> Tensor:
        student, teacher = _hidden(key, call), _hidden(key, answer)
        if not student.requires_grad:
            raise ValueError(
                f"the hidden state of block {key} carries no gradient (a frozen block, or reentrant activation "
                "checkpointing): set features=0, or use_reentrant=False"
            )
        try:
            return feature_loss(student, teacher)
        except ValueError as error:
            raise ValueError(f"block {key}: {error}") from error

    def _logits(self, output: Any) -> Tensor:
        try:
            return logits_of(output)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def _hidden(key: str, call: RecordedCall) -> Tensor:
    """Return the hidden state in the output of block ``key``: a tensor, or the first entry of a tuple."""
    if key not in call.blocks:
        raise ValueError(f"block {key} was not called; its hidden state cannot be compared: set features=0")
    first = first_tensor(call.blocks[key])
    if first is None:
        kind = type(call.blocks[key]).__name__
        raise ValueError(f"block {key} returns {kind}, in which no hidden state is found: features=0")
    return first
