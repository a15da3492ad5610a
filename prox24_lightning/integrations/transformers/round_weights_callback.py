"""Fine-tuning that sees the 8-bit rounding of the converted model, in a ``transformers.Trainer``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from prox24_lightning.integrations.transformers.host import TransformersCallback, mark_changed_loss
from prox24_lightning.integrations.transformers.scalars import log_scalars
from prox24_lightning.integrations.transformers.trainer_callback import Prox24TrainerCallback
from prox24_lightning.sparsify.rounded_training import RoundedTraining, sparse_weights
from prox24_lightning.sparsify.zeros import ZerosWatch
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import GroupedWeight


class RoundWeightsTrainerCallback(TransformersCallback):
    """:class:`~prox24_lightning.RoundWeights` for ``transformers.Trainer``.

    It looks for the ``Prox24TrainerCallback`` of the trainer and logs through it, so it takes the trainer:
    ``trainer.add_callback(RoundWeightsTrainerCallback(trainer))``. Evaluations within ``train()`` are rounded too, and
    the best checkpoint (``load_best_model_at_end``) is the best since the rounding began. ``rounding/weights`` is
    logged with the trainer's own values; for one process and DDP.

    Args:
        trainer: whose model trains rounded.
        weights: ``"fp8_e4m3"`` or ``"int8"``.
        start: first rounded step: int, or float fraction of the run; not before the last mask is frozen.
        inputs: round the layers' inputs too; False for a model that is stored in 8 bits and runs expanded.
        verbose: print a line when the rounding begins, and the change of the weights by it at the end.

    Raises:
        ValueError, TypeError: for arguments that are wrong whatever the model; before the first batch, for a ``start``
            beyond the run, and for a model that is not 2:4 and has no ``Prox24TrainerCallback``.
    """

    in_lightning = "RoundWeights"

    def __init__(
        self,
        trainer: Trainer,
        weights: RoundedForm = "fp8_e4m3",
        start: int | float = 0.0,
        *,
        inputs: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self._rounding = RoundedTraining(weights, start, inputs=inputs)
        self.weights = weights
        self.verbose = verbose
        self._trainer = trainer
        self._sparse: Sequence[GroupedWeight] = ()
        self._zeros: ZerosWatch | None = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        mark_changed_loss(state)
        self._rounding.remove()  # a run that was interrupted has no end
        self._rounding.prepare(state.max_steps)
        alone = not self._sparsifiers()
        self._sparse = sparse_weights(kwargs["model"]) if alone else ()
        self._zeros = ZerosWatch(kwargs["model"]) if alone else None

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._update(kwargs["model"], state)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        zeros, self._zeros = self._zeros, None
        for problem in (None if zeros is None else zeros.problem(), self._rounding.uncalled()):
            if problem is not None:
                _warn(problem, state)
        self._update(kwargs["model"], state)  # an evaluation after this step is rounded too
        if control.should_log and self._rounding.layers:
            log_scalars(self._trainer, {"rounding/weights": self._rounding.errors()[""]})

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rounding = self._rounding
        for problem in (rounding.unused(self._step(state)), rounding.uncalled(last=True)):
            if problem is not None:
                _warn(problem, state)
        if self.verbose and state.is_world_process_zero and (summary := rounding.summary()) is not None:
            print(f"RoundWeights: {summary}")
        rounding.remove()
        self._sparse, self._zeros = (), None

    def _update(self, model: nn.Module, state: TrainerState) -> None:
        """Begin if it is time, and follow layers that were exchanged."""
        sparsifiers, rounding, step = self._sparsifiers(), self._rounding, self._step(state)
        weights = self._sparse or [weight for callback in sparsifiers for weight in callback.weights]
        frozen = all(callback.phase == "frozen" for callback in sparsifiers)
        if not rounding.update(model, weights, step, frozen=frozen):
            return
        if (problem := rounding.exceptions()) is not None:
            _warn(problem, state)
        if not rounding.layers:
            return
        if self.verbose and state.is_world_process_zero:
            print(f"RoundWeights: {rounding.headline()}")
        if step <= max(rounding.start_step, *(callback.controller.freeze_step for callback in sparsifiers), 0):
            # Else the run is resumed, and its best checkpoint a rounded one.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _sparsifiers(self) -> list[Prox24TrainerCallback]:
        callbacks = self._trainer.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, Prox24TrainerCallback)]

    def _step(self, state: TrainerState) -> int:
        """Return the finished optimizer steps, as Prox24 counts them if there is one."""
        return next((callback.step for callback in self._sparsifiers()), state.global_step)


def _warn(text: str, state: TrainerState) -> None:
    if state.is_world_process_zero:
        warnings.warn(text, stacklevel=3)
