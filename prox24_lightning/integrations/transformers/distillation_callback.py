"""Distillation from the dense model, or from another teacher, in a ``transformers.Trainer``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from prox24_lightning.finetune import (
    DistillationConfig,
    OutputLoss,
    TeacherComparison,
    frozen_copy,
    memory_bytes,
    pair_blocks,
    weights_checksum,
)
from prox24_lightning.integrations.transformers.host import TransformersCallback, mark_changed_loss
from prox24_lightning.integrations.transformers.scalars import log_scalars
from prox24_lightning.utils.files import write_text

_FILE = "distillation.json"


class DistillationTrainerCallback(TransformersCallback):
    """:class:`~prox24_lightning.Distillation` for ``transformers.Trainer``.

    The loss becomes ``(1 - share) * loss + share * distillation (+ features * hidden states)``. While training runs,
    the trainer's ``compute_loss`` is wrapped, so the callback takes the trainer:
    ``trainer.add_callback(DistillationTrainerCallback(trainer))``. The teacher is a frozen copy of the trainer's model
    as it is then: make the callback before ``trainer.train(resume_from_checkpoint=...)``, from the same weights as in
    the first run; a checksum in the checkpoint folders confirms it. It runs on the same inputs, without labels.

    ``distillation/loss`` (and ``distillation/features``) are logged with the trainer's own values; for one process and
    DDP.

    Args:
        trainer: whose loss is changed.
        share: weight of the distillation loss, above 0 and at most 1; 1 drops the training loss.
        teacher: another model, called like the trainer's; it is copied and not changed.
        temperature: (``loss="kl"``) above 0; softens both distributions.
        features: weight of the hidden-state loss: the squared error of each block's output relative to the teacher's
            squared norm, token by token, averaged over tokens and blocks; 0 leaves it out.
        loss: ``"kl"`` for logits with the classes last, averaged over all positions, padding included; ``"mse"`` for
            outputs that are not logits.

    Raises:
        ValueError: for arguments that are wrong whatever the model; at the start of training, when the teacher is
            another one than in the checkpoint, or has other blocks.
    """

    in_lightning = "Distillation"

    def __init__(
        self,
        trainer: Trainer,
        share: float = 0.5,
        *,
        teacher: nn.Module | None = None,
        temperature: float = 1.0,
        features: float = 0.0,
        loss: OutputLoss = "kl",
    ) -> None:
        super().__init__()
        self.config = DistillationConfig(share, temperature, features, loss)
        source: Any = trainer.model if teacher is None else teacher
        if isinstance(source, (str, Path)):
            raise ValueError(
                f"teacher={str(source)!r} is no model: load it first, as by from_pretrained, and pass that"
            )
        self.teacher = frozen_copy(source, shared=(trainer,))
        self._trainer = trainer
        self._checksum = weights_checksum(self.teacher)
        self._comparison: TeacherComparison | None = None
        self._compute_loss: Any = None
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    @property
    def teacher_bytes(self) -> int:
        """Memory of the teacher's weights, in bytes."""
        return memory_bytes(self.teacher)

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        mark_changed_loss(state)
        self._detach()  # a run that was interrupted has no end
        self._check_origin(args, state)
        student = kwargs["model"]
        name = type(student).__name__
        config = self.config
        self._comparison = TeacherComparison(
            student,
            self.teacher.to(args.device),
            name=name,
            loss=config.loss,
            temperature=config.temperature,
            blocks=pair_blocks(name, student, self.teacher) if config.features else None,
        )
        self._compute_loss = self._trainer.compute_loss
        self._trainer.compute_loss = self._with_teacher  # type: ignore[method-assign]

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log and self._batches:
            log_scalars(self._trainer, {key: float(total) / self._batches for key, total in self._sums.items()})
            self._sums, self._batches = {}, 0

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_text(self._file(args, state), json.dumps({"teacher_checksum": self._checksum}))

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()

    def _with_teacher(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the trainer's loss, and add the teacher's; in evaluation the former alone."""
        if self._comparison is None or not model.training or not torch.is_grad_enabled():
            return self._compute_loss(model, inputs, *args, **kwargs)
        with self._comparison.recording() as calls:
            result = self._compute_loss(model, inputs, *args, **kwargs)
        with self._trainer.accelerator.autocast():
            terms = self._comparison.terms(calls)
        found = {"distillation/loss": terms.output}
        added = self.config.share * terms.output
        if terms.features is not None:
            found["distillation/features"] = terms.features
            added = added + self.config.features * terms.features
        for key, value in found.items():
            self._sums[key] = self._sums.get(key, 0) + value.detach()
        self._batches += 1
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        # A loss that is divided by the items of all accumulated batches already is not divided by their number again.
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        loss = (1 - self.config.share) * loss + (added / self._accumulated() if self._is_scaled(items) else added)
        return (loss, *outputs) if isinstance(result, tuple) else loss

    def _accumulated(self) -> int:
        return getattr(self._trainer, "current_gradient_accumulation_steps", 1)

    def _is_scaled(self, items: Any) -> bool:
        """Return whether the trainer takes the loss to be scaled for gradient accumulation."""
        trainer: Any = self._trainer
        if (given := getattr(trainer, "loss_is_scaled_for_ga", None)) is not None:
            return bool(given)
        return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None

    def _check_origin(self, args: TrainingArguments, state: TrainerState) -> None:
        file = self._file(args, state)
        if state.global_step and file.exists():
            expected = json.loads(file.read_text(encoding="utf-8"))["teacher_checksum"]
            if expected != self._checksum:
                raise ValueError(
                    f"{file} was written with another teacher (checksum {expected}, now {self._checksum}); make the "
                    "callback from the weights that the run began with, or pass them as teacher="
                )

    def _detach(self) -> None:
        """Give the trainer its own loss back; the teacher waits on the CPU for another run."""
        if self._comparison is not None:
            self._comparison.close()
            self._trainer.compute_loss = self._compute_loss  # type: ignore[method-assign]
        self._comparison = self._compute_loss = None
        self._sums, self._batches = {}, 0
        self.teacher.cpu()

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / _FILE
