"""Fine-tuning that sees the 8-bit rounding of the converted model, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from prox24_lightning.callbacks.best_records import BestRecords
from prox24_lightning.callbacks.loaded_state import LoadedState
from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.callbacks.run_length import RunLength
from prox24_lightning.callbacks.unenforced_zeros import UnenforcedZeros
from prox24_lightning.sparsify.rounded_training import RoundedTraining, sparse_weights
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import GroupedWeight


class RoundWeights(Callback):
    """Train the 2:4 layers as they will multiply in 8 bits, so that conversion to 8 bits costs less accuracy.

    Once the masks are frozen and ``start`` is reached, the forward of each linear 2:4 layer sees its weight as
    ``convert_model(weights=...)`` will round it (8 bits, one scale a row) and its inputs as the kernels round them (one
    scale a token). Gradients pass the rounding straight through. The weights themselves are not rounded: parameters,
    their dtype, the ``state_dict`` and checkpoints stay as they are, and conversion rounds them. Rounding starts from
    the 16-bit dtype that the run computes in, bfloat16 where it computes in float32.

    Works beside :class:`~prox24_lightning.Prox24`, or on a model whose zeros ``load_masks`` keeps. Validation within
    the fit is rounded too, and best scores (``ModelCheckpoint``, ``EarlyStopping``, ``ReduceLROnPlateau``) begin anew
    when the rounding begins; after the fit the layers have their own forward back. A
    :class:`~prox24_lightning.ConvertAndBenchmark` without ``weights`` takes this form. What cannot train so
    (convolutions, experts, layers whose weight is used without calling them, tensor parallelism) is named in a warning
    and trains as before.

    Logged as ``rounding/weights``: the norm of the change that rounding makes over the norm of the weights.

    Args:
        weights: ``"fp8_e4m3"`` or ``"int8"``.
        start: first rounded step: int, or float fraction of the run; not before the last mask is frozen.
        inputs: round the layers' inputs too; False for a model that is stored in 8 bits and runs expanded.
        verbose: print a line when the rounding begins, and the change of the weights by it at the end.

    Raises:
        ValueError, TypeError: for arguments that are wrong whatever the model.
        MisconfigurationException: before the first batch, for a ``start`` beyond the run, and for a model that is not
            2:4 and has no Prox24.
    """

    changes_loss = True  # it rises when the rounding begins

    def __init__(
        self,
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
        self._loaded = LoadedState()
        self._begun_at: int | None = None
        self._length: RunLength | None = None
        self._records: BestRecords | None = None
        self._sparse: Sequence[GroupedWeight] | None = None
        self._zeros = UnenforcedZeros()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded.begin_run(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rounding.remove()  # of a run that ended without a hook
        self._length = RunLength(trainer, pl_module)
        self._records = BestRecords(trainer, pl_module)
        try:
            self._rounding.prepare(self._length.total, exact=self._length.is_exact)
        except ValueError as error:
            raise MisconfigurationException(f"RoundWeights: {error}") from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only here is everything restored from a checkpoint, whatever the strategy.
        self._zeros.on_train_start(trainer, pl_module)
        state = self._loaded.take()
        self._begun_at = state.get("begun_at")
        if self._length is not None and "run_length" in state:
            self._length.load_state_dict(state["run_length"])
        self._sparse = None
        if not _sparsifiers(trainer):
            try:
                self._sparse = sparse_weights(pl_module)
            except ValueError as error:
                raise MisconfigurationException(f"RoundWeights: {error}") from error

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._length is not None
        self._length.update(self._step(trainer))
        self._rounding.prepare(self._length.total, exact=False)
        self._update(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._zeros.on_train_batch_end(trainer)
        if (problem := self._rounding.uncalled()) is not None:
            rank_zero_warn(problem)
        self._update(trainer, pl_module)  # a validation after this batch is rounded too
        every, steps = trainer.log_every_n_steps, trainer.fit_loop.epoch_loop._batches_that_stepped  # type: ignore[attr-defined]
        if self._rounding.layers and trainer.loggers and every and (steps + 1) % every == 0:
            pl_module.log("rounding/weights", self._rounding.errors()[""])

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._records is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._records.forget_stale()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rounding = self._rounding
        # A rehearsal of a batch or two may well end with the freeze.
        unused = None if trainer.fast_dev_run else rounding.unused(self._step(trainer))  # type: ignore[attr-defined]
        for problem in (unused, rounding.uncalled(last=True)):
            if problem is not None:
                rank_zero_warn(problem)
        if self.verbose and (summary := rounding.summary()) is not None:
            rank_zero_info(f"RoundWeights: {summary}")
        rounding.remove()  # what other callbacks convert or export in on_fit_end are plain layers

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded.state or self._length is None:
            return self._loaded.state
        return {"begun_at": self._begun_at, "run_length": self._length.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded.load(state_dict)

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin if it is time, and follow layers that were exchanged."""
        sparsifiers, rounding = _sparsifiers(trainer), self._rounding
        weights = self._sparse if self._sparse is not None else [w for cb in sparsifiers for w in cb.weights]
        frozen = all(callback.phase == "frozen" for callback in sparsifiers)
        if not rounding.update(pl_module, weights, self._step(trainer), frozen=frozen):
            return
        if (problem := rounding.exceptions()) is not None:
            rank_zero_warn(problem)
        if not rounding.layers:
            return
        if self.verbose:
            rank_zero_info(f"RoundWeights: {rounding.headline()}")
        if self._begun_at is None and self._records is not None:
            self._begun_at = self._step(trainer)
            self._records.restart(f"the forward is rounded to {self.weights}", "of the one without", "")

    def _step(self, trainer: Trainer) -> int:
        """Return the finished optimizer steps, as Prox24 counts them if there is one."""
        return next((callback.step for callback in _sparsifiers(trainer)), trainer.global_step)

    def _end(self) -> None:
        self._rounding.remove()
        self._loaded.end_run()
        self._length = self._records = self._sparse = None  # they hold trainer and module


def _sparsifiers(trainer: Trainer) -> list[Prox24]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Prox24)]  # type: ignore[attr-defined]
