"""The same engine in a ``transformers.Trainer``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from prox24_lightning.monitoring.selection_table import print_selection
from prox24_lightning.sparsify.controller import Sparsifier
from prox24_lightning.utils.files import save_object


class Prox24TrainerCallback(Sparsifier, TrainerCallback):
    """:class:`~prox24_lightning.Prox24` for ``transformers.Trainer``: the same arguments, phases and results.

    ``Trainer(..., callbacks=[Prox24TrainerCallback(start=0.5, freeze=0.8)])``. The state goes into every checkpoint
    folder and is taken up from there by ``trainer.train(resume_from_checkpoint=...)``; a folder that was moved out of
    ``output_dir`` is named by ``resume_from``. The final masks go to ``masks_file``, or anywhere by :meth:`save_masks`.
    The best checkpoint (``load_best_model_at_end``) is the best since the freeze: those before it are not 2:4.

    Args:
        resume_from: the checkpoint folder that the run is resumed from, where it is not ``output_dir/checkpoint-STEP``.
        arguments: those of :class:`~prox24_lightning.Prox24`.

    Raises:
        ValueError: before the first batch, when model, trainer and arguments do not fit together.
    """

    def __init__(self, *positional: Any, resume_from: str | Path | None = None, **arguments: Any) -> None:
        super().__init__(*positional, **arguments)
        self.resume_from = resume_from

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizers = _bare(kwargs["optimizer"])
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "Prox24TrainerCallback works with one process or DDP; transformers' FSDP and DeepSpeed flatten or hide "
                "the weights: shard the model in Lightning's ModelParallelStrategy with Prox24 instead"
            )
        engine = self.prepare(kwargs["model"], optimizers, state.max_steps, {})
        engine.on_freeze.append(lambda: _forget_best(state))
        if self.verbose and state.is_world_process_zero:
            print_selection(self.selection, f"{self.name}: 2:4 from step {self.start_step} to step {self.freeze_step}")
        if state.global_step:
            path = self._state_file(self.resume_from or _checkpoint(args, state))
            if path.exists():
                self.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
            elif self.step < state.global_step:
                warnings.warn(f"there is no {path}; name the checkpoint's folder as resume_from", stacklevel=2)
        self.restore(state.global_step)
        self.bind(optimizers)

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.before_batch(_bare(kwargs["optimizer"]))

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        content = self.state_dict()
        if state.is_world_process_zero:
            save_object(self._state_file(_checkpoint(args, state)), content)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.unbind()
        self.check_end()
        self.write_masks()

    def _state_file(self, checkpoint: str | Path) -> Path:
        """Beside what transformers writes into the folder of a checkpoint."""
        return Path(checkpoint) / f"{self.name}.pt"


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _forget_best(state: TrainerState) -> None:
    """What was best so far is not 2:4: it must neither be loaded at the end nor be kept in the place of what is."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _bare(optimizer: Any) -> list[Optimizer]:
    """The optimizer inside accelerate's wrapper, whose own steps it may skip."""
    return [getattr(optimizer, "optimizer", optimizer)]
