"""Distillation from the dense model, or from another teacher, as a Lightning callback."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from prox24_lightning.callbacks.loaded_state import LoadedState
from prox24_lightning.callbacks.training_step_wrapper import wrap_training_step
from prox24_lightning.callbacks.unenforced_zeros import UnenforcedZeros
from prox24_lightning.finetune import (
    BatchTimer,
    DistillationConfig,
    OutputLoss,
    TeacherComparison,
    TimeShare,
    find_student,
    frozen_copy,
    load_weights,
    memory_bytes,
    names_24,
    pair_blocks,
    same_weights,
    shard_like,
    weights_checksum,
)


class Distillation(Callback):
    """Add to the training loss the distance of the model's outputs from those of a frozen teacher.

    The loss becomes ``(1 - share) * loss + share * distillation (+ features * hidden states)``. The teacher is a copy
    of the module as constructed, before any checkpoint is restored into it: with pretrained weights, the dense model.
    So load pretrained weights in the module's ``__init__``. The teacher is not in the model's parameters, its
    ``state_dict`` or a checkpoint; a resumed run constructs the module from the same weights again, and a checksum in
    the checkpoint confirms it.

    Works beside :class:`~prox24_lightning.Prox24` or alone, with automatic optimisation. During the fit it wraps
    ``training_step``: it records the calls of the module, runs the teacher on the same inputs (in evaluation mode,
    without gradients, under the same autocast, without ``labels``), and adds the losses.

    Args:
        share: weight of the distillation loss, above 0 and at most 1; 1 drops the training loss.
        module: name of the submodule whose output is distilled, for instance ``"model"``; None takes the
            LightningModule's only child that trains.
        teacher: another module, called like ``module``; it is copied and not changed. Or the path of a checkpoint of
            the same LightningModule, say of its dense fine-tuning: the teacher has the weights of ``module`` in there.
        temperature: (``loss="kl"``) above 0; softens both distributions.
        features: weight of the hidden-state loss: the squared error of each block's output relative to the teacher's
            squared norm, token by token, averaged over tokens and blocks; 0 leaves it out. Its gain is not measured.
        loss: ``"kl"`` for logits with the classes last, averaged over all positions, padding included; ``"mse"`` for
            outputs that are not logits.
        verbose: print the teacher's memory at the start, and its share of the time at the end.

    Raises:
        ValueError: for arguments that are wrong whatever the model.
        MisconfigurationException: before the first optimizer step, when model, trainer and arguments do not
            fit together.
    """

    changes_loss = True  # it begins at zero, and rises at the best rate too

    def __init__(
        self,
        share: float = 0.5,
        *,
        module: str | None = None,
        teacher: nn.Module | str | Path | None = None,
        temperature: float = 1.0,
        features: float = 0.0,
        loss: OutputLoss = "kl",
        verbose: bool = True,
    ) -> None:
        super().__init__()
        DistillationConfig(share, temperature, features, loss)  # refuses wrong values
        self.share = share
        self.module = module
        self.temperature = temperature
        self.features = features
        self.loss = loss
        self.verbose = verbose
        self.time_share: TimeShare | None = None
        self._given = teacher
        self._teacher: nn.Module | None = None
        self._checksum = ""
        self._source: weakref.ref[nn.Module] | None = None
        self._loaded = LoadedState()
        self._fresh = True
        self._zeros = UnenforcedZeros()
        self._comparison: TeacherComparison | None = None
        self._timer: BatchTimer | None = None
        self._unwrap: Callable[[], None] | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; None before the first fit."""
        return self._teacher

    @property
    def teacher_bytes(self) -> int:
        """Memory of the teacher's weights, in bytes; 0 before the first fit."""
        return 0 if self._teacher is None else memory_bytes(self._teacher)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded.begin_run(pl_module)
        if stage != "fit":
            return
        others = [cb for cb in trainer.callbacks if isinstance(cb, Distillation)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException(f"the trainer has {len(others)} Distillation callbacks; keep one of them")
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"Distillation adds to the loss that training_step returns, but {type(pl_module).__name__} sets "
                "automatic_optimization=False and steps on its own; add finetune.distillation_loss to its loss there"
            )
        name, source = "", self._given
        try:
            if not isinstance(source, nn.Module):
                name, source = find_student(pl_module, self.module)
            # A second fit of the same model keeps the teacher of the first.
            self._fresh = self._teacher is None or self._source is None or self._source() is not source
            if not self._fresh:
                return
            teacher = frozen_copy(source, shared=(trainer, pl_module))
        except ValueError as error:
            late = is_overridden("configure_model", pl_module)
            hint = "; the teacher is copied before configure_model: make it in __init__, or pass a module as teacher="
            raise MisconfigurationException(f"Distillation: {error}{hint if late else ''}") from error
        if isinstance(self._given, (str, Path)):
            self._load(teacher, self._given, name)
        self._teacher, self._source = teacher, weakref.ref(source)
        self._checksum = weights_checksum(teacher)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By now the strategy has placed the model and the precision plugin has cast it.
        teacher = trainer.precision_plugin.convert_module(self._require_teacher())
        with suppress(ValueError):  # no module to distil from: on_train_start raises the error
            shard_like(teacher, find_student(pl_module, self.module)[1])
        self._teacher = teacher.to(trainer.strategy.root_device)
        if self.verbose:
            rank_zero_info(
                f"Distillation: teacher {type(teacher).__name__}, {self.teacher_bytes / 2**20:.1f} MiB beside the model"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first hook at which every strategy has restored the checkpoint.
        self._zeros.on_train_start(trainer, pl_module)
        teacher = self._require_teacher()
        try:
            name, student = find_student(pl_module, self.module)
            self._check_origin(trainer, pl_module, name, student)
            blocks = pair_blocks(name, student, teacher) if self.features else None
        except ValueError as error:
            raise MisconfigurationException(f"Distillation: {error}") from error
        self._timer = BatchTimer(trainer.strategy.root_device)
        self._comparison = TeacherComparison(
            student, teacher, name=name, loss=self.loss, temperature=self.temperature, blocks=blocks
        )
        self._unwrap = wrap_training_step(pl_module, functools.partial(self._step, pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._timer is not None:
            self._timer.begin()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._zeros.on_train_batch_end(trainer)
        if self._timer is not None:
            self._timer.end()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.time_share = None if self._timer is None else self._timer.result()
        if self.verbose and (share := self.time_share) is not None:
            rank_zero_info(
                f"Distillation: teacher and loss took {share.ratio:.1%} of the time of a batch ({share.part_ms:.3g} of "
                f"{share.whole_ms:.3g} ms; medians of {share.samples} batches)"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()
        self._loaded.end_run()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        self._loaded.end_run()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"teacher_checksum": self._checksum} if self._checksum else self._loaded.state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded.load(state_dict)

    def _load(self, teacher: nn.Module, path: str | Path, name: str) -> None:
        """Give ``teacher`` the weights of the checkpoint that the user has named."""
        try:
            load_weights(teacher, path, name)
        except (ValueError, OSError) as error:
            raise MisconfigurationException(f"Distillation(teacher=...): {error}") from error
        if pruned := names_24(teacher):
            rank_zero_warn(
                f"the teacher of Distillation from {path} is pruned: {len(pruned)} of its weights are 2:4, the first "
                f"{pruned[0]}; name the checkpoint of a dense run, unless you mean this one"
            )

    def _require_teacher(self) -> nn.Module:
        if self._teacher is None:
            raise RuntimeError("Distillation was asked to act before setup")
        return self._teacher

    def _check_origin(self, trainer: Trainer, pl_module: LightningModule, name: str, student: nn.Module) -> None:
        """Check that the teacher is the one of the checkpoint, and the one that the user means."""
        expected = self._loaded.take().get("teacher_checksum")
        if expected is not None and expected != self._checksum:
            remedy = (
                f"name the file that the run began with, as it was, instead of teacher={str(self._given)!r}"
                if isinstance(self._given, (str, Path))
                else "construct the module from the weights that the run began with, or pass them as teacher="
            )
            raise MisconfigurationException(
                f"Distillation: the checkpoint was written with another teacher (checksum {expected}, now "
                f"{self._checksum}); {remedy}"
            )
        if expected is not None or self._given is not None or not self._fresh:
            return
        if trainer.ckpt_path is not None:
            rank_zero_warn(
                "the checkpoint holds no state of Distillation: it was written without the callback; the teacher is "
                f"{name!r} as it was constructed, not as it was restored; pass teacher= if you mean the latter"
            )
        elif is_overridden("setup", pl_module) and not same_weights(student, self._require_teacher()):
            rank_zero_warn(
                f"the weights of {name!r} changed after Distillation copied its teacher from them: load pretrained "
                f"weights in the __init__ of {type(pl_module).__name__} rather than in its setup, or pass teacher="
            )

    def _step(self, pl_module: LightningModule, step: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the user's training step and add to the loss that it returns."""
        if self._comparison is None or self._timer is None or not pl_module.trainer.training:
            return step(*args, **kwargs)  # validation_step may call training_step
        with self._comparison.recording() as calls:
            result = step(*args, **kwargs)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            return result  # a skipped batch, or an error that Lightning reports
        try:
            with self._timer.part():
                terms = self._comparison.terms(calls)
        except ValueError as error:
            raise MisconfigurationException(f"Distillation: {error}") from error
        loss = (1 - self.share) * loss + self.share * terms.output
        pl_module.log("distillation/loss", terms.output.detach())
        if terms.features is not None:
            loss = loss + self.features * terms.features
            pl_module.log("distillation/features", terms.features.detach())
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _detach(self) -> None:
        """Restore the module, and move the teacher to the CPU; it is kept for another fit."""
        if self._unwrap is not None:
            self._unwrap()
        if self._comparison is not None:
            self._comparison.close()
        self._comparison = self._timer = self._unwrap = None
        if self._teacher is not None:
            self._teacher.cpu()
