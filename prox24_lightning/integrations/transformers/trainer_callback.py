"""The same engine in a ``transformers.Trainer``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from typing_extensions import override

from prox24_lightning.integrations.transformers.checkpoint_state import CheckpointState
from prox24_lightning.integrations.transformers.host import TransformersCallback, has_changed_loss
from prox24_lightning.integrations.transformers.solve_progress import SolveProgress
from prox24_lightning.monitoring.early_rise import EarlyRise, EarlyWatch
from prox24_lightning.monitoring.loss_rise import RateWatch
from prox24_lightning.monitoring.loss_since_start import LossSinceStart
from prox24_lightning.monitoring.selection_table import print_selection
from prox24_lightning.schedules import Schedule
from prox24_lightning.solvers.config import DAMPING
from prox24_lightning.sparsify.config import CalibrationMode, Metric, Refit, SparsifyConfig, StrategyName
from prox24_lightning.sparsify.controller import SparsifyController
from prox24_lightning.sparsify.phases import Phase
from prox24_lightning.sparsify.strategies.progressive.strategy import CALIBRATION_BATCHES, RECONSTRUCTION_STEPS
from prox24_lightning.weights.groups import Geometry
from prox24_lightning.weights.selection import GroupedWeight, Selection


class Prox24TrainerCallback(TransformersCallback):
    """:class:`~prox24_lightning.Prox24` for ``transformers.Trainer``: the same arguments, phases and results.

    ``Trainer(..., callbacks=[Prox24TrainerCallback(start=0.5, freeze=0.8)])``. The state goes into every checkpoint
    folder, and ``trainer.train(resume_from_checkpoint=...)`` goes on from there; name a folder that was moved out of
    ``output_dir`` by ``resume_from``. The run stops before a checkpoint with NaN or infinite weights is written. A
    checkpoint that a kill has left without its state is refused. The final masks go to ``masks_file``, or anywhere by
    :meth:`save_masks`. The best checkpoint (``load_best_model_at_end``) is the best since the freeze: those before it
    are not 2:4.

    While layers are solved a bar shows block, layer and seconds left (lines where ``disable_tqdm`` is set or there is
    no terminal), and Ctrl-C ends it between small pieces. For scalars, the overview figure and a closing table see
    :class:`~prox24_lightning.SparsityMonitorTrainerCallback`, for a teacher
    :class:`~prox24_lightning.DistillationTrainerCallback`.

    Args:
        resume_from: the checkpoint folder that the run is resumed from, where it is not ``output_dir/checkpoint-STEP``.
        arguments: those of :class:`~prox24_lightning.Prox24`.

    Attributes:
        controller: what decides along the run.
        early_rise: as in :class:`~prox24_lightning.Prox24`, where the model returns its loss.

    Raises:
        ValueError: before the first batch, when model, trainer and arguments do not fit together.
    """

    in_lightning = "Prox24"

    def __init__(
        self,
        start: int | float = 0.02,
        freeze: int | float = 0.3,
        *,
        strategy: StrategyName = "progressive",
        dense_target: float = 0.5,
        reconstruction_steps: int = RECONSTRUCTION_STEPS,
        gradient_weighting: bool = True,
        calibration: CalibrationMode = "auto",
        reorder_inputs: bool = False,
        budget: float = 0.0,
        calibration_batches: int = CALIBRATION_BATCHES,
        token_weighting: float = 0.0,
        damping: float = DAMPING,
        metric: Metric = "activation",
        schedule: str | Schedule = "auto",
        fraction: str | Schedule = "cubic",
        targets: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        geometry: Geometry = "row",
        refit: Refit = "none",
        sparse_training: bool = False,
        masks_file: str | Path | None = None,
        name: str = "prox24",
        verbose: bool = True,
        resume_from: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.config = SparsifyConfig(
            start=start,
            freeze=freeze,
            strategy=strategy,
            dense_target=dense_target,
            reconstruction_steps=reconstruction_steps,
            gradient_weighting=gradient_weighting,
            calibration=calibration,
            reorder_inputs=reorder_inputs,
            budget=budget,
            calibration_batches=calibration_batches,
            token_weighting=token_weighting,
            damping=damping,
            metric=metric,
            schedule=schedule,
            fraction=fraction,
            targets=targets,
            skip=skip,
            geometry=geometry,
            refit=refit,
            sparse_training=sparse_training,
            masks_file=masks_file,
            name=name,
            verbose=verbose,
        )
        self.resume_from = resume_from
        self._files: CheckpointState | None = None
        self._prepared: int | None = None
        self._rate: RateWatch | None = None
        self._early: EarlyWatch | None = None
        self.early_rise: EarlyRise | None = None
        self.controller = SparsifyController(self.config)

    @property
    def selection(self) -> Selection:
        """The weights that become 2:4, and those that stay dense with the reason; empty before training."""
        return self.controller.selection

    @property
    def weights(self) -> tuple[GroupedWeight, ...]:
        """The weights that become 2:4; empty before training."""
        return self.controller.weights

    @property
    def step(self) -> int:
        """Finished real optimizer steps."""
        return self.controller.step

    @property
    def phase(self) -> Phase:
        """``"dense"``, ``"sparsify"`` or ``"frozen"``."""
        return self.controller.phase

    @property
    def masks(self) -> dict[str, Tensor]:
        """Frozen masks by weight name (bool, True stays); empty before the freeze."""
        return self.controller.masks

    def save_masks(self, path: str | Path) -> Path:
        """Write the frozen masks to a file that :func:`~prox24_lightning.load_masks` reads; all ranks call it.

        Raises:
            ValueError: before the freeze.
        """
        return self.controller.save_masks(path)

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
        controller = self.controller
        controller.watch.attach(SolveProgress(args, state, self.config))
        engine = controller.prepare(kwargs["model"], optimizers, state.max_steps, _claimed(state, self.config.name))
        _claimed(state)[self.config.name] = controller.selection
        engine.on_frozen.append(lambda: _forget_best(state))
        if self.config.verbose and state.is_world_process_zero:
            steps = controller.start_step, controller.freeze_step
            print_selection(controller.selection, self.config.headline(*steps, resumed=state.global_step > 0))
        self._files = CheckpointState(args.output_dir or ".", self.config.name, controller.weights)
        loaded = self._files.read(state.global_step, self.resume_from) if state.global_step else {}
        if state.global_step and not loaded:
            folder = self.resume_from or self._files.folder(state.global_step)
            warnings.warn(
                f"there is no {self.config.name}.pt in {folder}; name the checkpoint's folder as resume_from",
                stacklevel=2,
            )
        controller.restore(loaded, state.global_step)
        if state.is_world_process_zero:
            self._files.begin(state.global_step, resumed=bool(loaded))
        controller.bind(optimizers)
        if self._early is not None:  # of a run that an error has ended
            self._early.close()
        self._early = self.early_rise = None
        if state.is_world_process_zero:
            self._rate = RateWatch(state.max_steps, 1 / max(state.logging_steps, 1), self.step)
            if self.step == 0:
                compare = partial(_comparison, kwargs["model"], args)
                self._early = EarlyWatch(compare, state.max_steps, controller.dense_until)

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.controller.before_batch(_bare(kwargs["optimizer"]))
        if self._early is not None and not self._has_other_loss(state):
            self._early.begin_batch(self.step)
        self._announce(state)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.controller.after_batch(_bare(kwargs["optimizer"]))
        if self._early is not None:
            rise = self._early.end_batch(self.step, not self.masks, _groups(kwargs["optimizer"]))
            self.early_rise = rise or self.early_rise
            if rise is not None and rise.is_too_high:
                warnings.warn(f"{self.config.name}: {rise}: {rise.advice}", stacklevel=2)
        self._announce(state)
        if control.should_save:
            self._prepare_checkpoint(state)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if self._rate is None or loss is None or self._has_other_loss(state):
            return
        risen = self._rate.add(torch.tensor(float(loss)), self.step, self.phase, _groups(kwargs["optimizer"]))
        if risen is not None:
            warnings.warn(f"{self.config.name}: {risen}", stacklevel=2)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._prepare_checkpoint(state)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.save_strategy == SaveStrategy.BEST:  # transformers decides between here and the checkpoint
            self._prepare_checkpoint(state)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._files is None:
            return
        if self._prepared == state.global_step:
            if state.is_world_process_zero:
                self._files.finish(state.global_step)
        else:  # a callback after this one has asked for the checkpoint
            content = self.controller.state_dict()
            if state.is_world_process_zero:
                self._files.write(state.global_step, content)
        self._prepared = None

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.controller.unbind()
        self.controller.watch.detach()
        self.controller.check_end()
        if self.config.verbose and state.is_world_process_zero and (pauses := self.controller.pauses()):
            print(pauses)
        self.controller.write_masks()
        if self._files is not None and state.is_world_process_zero:
            self._files.discard()
        if self._early is not None:
            self._early.close()
        self._files = self._prepared = self._rate = self._early = None

    def _has_other_loss(self, state: TrainerState) -> bool:
        """Whether the loss may rise for reasons of other callbacks."""
        return has_changed_loss(state) or len(_claimed(state)) > 1

    def _announce(self, state: TrainerState) -> None:
        line = self.controller.new_phase()
        if line is not None and state.is_world_process_zero:
            print(line)

    def _prepare_checkpoint(self, state: TrainerState) -> None:
        """Write the state for a checkpoint that transformers writes next; stop before it if weights are not finite."""
        if self._files is None or self._prepared == state.global_step:
            return
        content = self.controller.state_dict()
        if state.is_world_process_zero:
            self._files.prepare(state.global_step, content)
        self._prepared = state.global_step


def _claimed(state: TrainerState, name: str = "") -> dict[str, Selection]:
    """Return what the callbacks of this run that began earlier have chosen, by name; the state is theirs in common.

    Raises:
        ValueError: if one of them has this ``name``.
    """
    found: dict[str, Selection] = state.__dict__.setdefault("_prox24", {})
    if name in found:
        raise ValueError(
            f"two Prox24TrainerCallback have the name {name!r}, and would write the same files: give each its name and "
            "its targets"
        )
    return found


def _forget_best(state: TrainerState) -> None:
    """Forget the best checkpoint so far, which is not 2:4: it must neither be loaded at the end nor outlive others."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _comparison(model: nn.Module, args: TrainingArguments) -> LossSinceStart:
    if args.torch_compile or getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise ValueError("compiled code calls the model")
    return LossSinceStart(model, model)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer."""
    return [group for one in _bare(optimizer) for group in one.param_groups]


def _bare(optimizer: Any) -> list[Optimizer]:
    """Return the optimizer inside accelerate's wrapper, which may skip its steps."""
    return [optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer]
