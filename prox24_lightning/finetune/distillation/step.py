"""One step of distillation: the student's calls recorded, the teacher asked the same, the losses between the two."""

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
from prox24_lightning.weights.names import clean_name

OutputLoss = Literal["kl", "mse"]


@dataclass(frozen=True)
class Terms:
    """What is added to a training loss: the distance of the outputs and, where asked for, of the hidden states."""

    output: Tensor
    features: Tensor | None


class Distiller:
    """Compares what ``student`` gives out with what ``teacher`` gives out on the same inputs.

    Args:
        student: called by the training step.
        teacher: frozen, in evaluation mode, on the student's device.
        name: the student's, for errors.
        loss: ``"kl"`` or ``"mse"``, of the outputs.
        temperature: of ``"kl"``.
        blocks: pairs of modules inside student and teacher by name, whose hidden states are compared too.
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
        self._student = CallRecorder(student, mine, copy_inputs=True)
        self._asked = CallRecorder(teacher, {key: pair[1] for key, pair in (blocks or {}).items()})

    def close(self) -> None:
        """Take every hook away."""
        self._student.close()
        self._asked.close()

    @contextmanager
    def recording(self) -> Iterator[list[RecordedCall]]:
        """The student's calls within the context."""
        with self._student.recording() as calls:
            yield calls

    def terms(self, calls: list[RecordedCall]) -> Terms:
        """The losses over ``calls``, averaged; those made without gradients (a second look, say) do not count.

        Raises:
            ValueError: if there is no call to learn from, or student and teacher do not give out the same form.
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
        return Terms(output, torch.stack(features).mean() if features else None)

    def _compare(self, call: RecordedCall) -> Terms:
        with torch.no_grad(), self._asked.recording() as asked:
            answer = self.teacher(*call.args, **teacher_kwargs(self.teacher, call.kwargs))
        student, teacher = self._logits(call.output), self._logits(answer)
        try:
            if self.loss == "kl":
                output = distillation_loss(student, teacher, temperature=self.temperature)
            else:
                output = squared_error(student, teacher)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if not self._blocks:
            return Terms(output, None)
        return Terms(output, torch.stack([self._distance(key, call, asked[-1]) for key in self._blocks]).mean())

    def _distance(self, key: str, call: RecordedCall, asked: RecordedCall) -> Tensor:
        student, teacher = _hidden(key, call), _hidden(key, asked)
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
    """The hidden state that block ``key`` gave out: a tensor, or the first entry of a tuple."""
    if key not in call.blocks:
        raise ValueError(f"block {key} was not called; its hidden state cannot be compared: set features=0")
    first = first_tensor(call.blocks[key])
    if first is None:
        kind = type(call.blocks[key]).__name__
        raise ValueError(f"block {key} returns {kind}, in which no hidden state is found: features=0")
    return first


def find_student(root: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """The submodule ``name`` of ``root``, or its only child with trainable parameters; with its name.

    Of a compiled module it is the outer one, which is what gets called.

    Raises:
        ValueError: if there is no such module, or without a name more than one.
    """
    children = [key for key, child in root.named_children() if any(value.requires_grad for value in child.parameters())]
    choices = ", ".join(repr(key) for key in children) or "none"
    if name is None:
        if len(children) != 1:
            raise ValueError(
                f"{type(root).__name__} has {len(children)} children that train ({choices}): name the one whose output "
                "shall be distilled with module=, or put those that work together into one module"
            )
        (name,) = children
    for key, module in root.named_modules():
        if key and clean_name(key) == name:
            return name, module
    raise ValueError(f"module={name!r} is not in {type(root).__name__}; its children that train: {choices}")
