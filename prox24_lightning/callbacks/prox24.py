"""The callback that takes a model to 2:4 sparsity while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from prox24_lightning.callbacks.averaged_copies import AveragedCopies
from prox24_lightning.callbacks.best_records import BestRecords
from prox24_lightning.callbacks.compatibility import check_trainer
from prox24_lightning.callbacks.loaded_state import LoadedState
from prox24_lightning.callbacks.rate_warning import RateWarning
from prox24_lightning.callbacks.run_length import RunLength
from prox24_lightning.callbacks.solve_display import TrainerDisplay, how_to_go_on, stop_on_sigterm
from prox24_lightning.monitoring.early_rise import EarlyRise
from prox24_lightning.monitoring.selection_table import print_selection
from prox24_lightning.schedules import Schedule
from prox24_lightning.solvers.config import DAMPING
from prox24_lightning.sparsify.config import CalibrationMode, Metric, Refit, SparsifyConfig, StrategyName
from prox24_lightning.sparsify.controller import SparsifyController
from prox24_lightning.sparsify.phases import Phase
from prox24_lightning.sparsify.strategies.progressive.strategy import CALIBRATION_BATCHES, RECONSTRUCTION_STEPS
from prox24_lightning.weights.groups import Geometry
from prox24_lightning.weights.selection import GroupedWeight, Selection


class Prox24(Callback):
    """Sparsify, freeze, fine-tune: the weights of any model become 2:4 along an ordinary training run.

    Three phases. *dense*: nothing is touched. *sparsify*: between optimizer steps the proximal operator of the 2:4
    penalty (arXiv 2501.18015) drives the weights to 2:4. *frozen*: the masks are fixed, pruned weights are exactly
    zero in weights, gradients and optimizer state, and the rest trains on.

    Steps are optimizer steps, counted over all optimizers as ``Trainer(max_steps=...)`` counts them, except that a
    step skipped by a gradient scaler does not count. Under manual optimisation, or with an overridden
    ``optimizer_step``, the length of the run is measured while it goes on, and fractions follow the measurement.

    Masks, phase and counters live in the trainer's checkpoints, and a run resumed from one ends like the unbroken run,
    bit for bit, on as many ranks and where training itself repeats (deterministic kernels; in the middle of an epoch, a
    data loader with a ``state_dict``). The guide's page on Lightning lists what may change at a resume.

    A checkpoint in which a weight chosen here is NaN or infinite is not written: the run stops with the reason, and the
    last good one stays. Optimizers, weights and layers that are exchanged during the run are followed, and layers that
    begin to train later join; an exchange that the optimizers have not followed stops the run by name.

    **Best scores.** When the last weight is frozen, what ``EarlyStopping``, ``ModelCheckpoint`` and
    ``ReduceLROnPlateau`` remember as the best score begins anew, with one warning: it was the dense model's. Files from
    before the freeze stay on the disk. A ``ModelCheckpoint`` that saves nothing after the freeze saves the final model.
    Averages (EMA, SWA) of callbacks, and those that the module keeps itself, get the masks as well.

    Args:
        start: last dense step: int, or float fraction of the run. The default suits a trained model that is fine-tuned:
            the earlier the start, the longer the recovery. From scratch later is better: 0.6 and 0.8.
        freeze: step after which the masks are fixed: int, or float fraction of the run (above 0 one step at least).
            Equal to ``start``, all weights are pruned in one shot there.
        strategy: ``"progressive"`` solves one block after the other during the phase, by the paper's layer-wise prox
            and masked gradient updates with the Hessian of the last training batches, and freezes it while the rest
            trains on. ``"post_step"`` applies the prox to all weights after every step. ``"keep"`` fine-tunes a model
            that is 2:4 already: its zeros are frozen before the first step, no value changes, and weights that are not
            2:4 stay dense; leave ``start`` and ``freeze`` out.
        dense_target: (``progressive``) the target of a layer's outputs: 0 its own outputs on its present inputs; 1 the
            outputs of the dense reference, the model as it was at ``start`` (error feedback: later blocks correct the
            errors of earlier ones); values between mix the two. Any but 0 keeps a frozen copy of the model until the
            freeze, and needs a model that training calls as a whole: otherwise each layer aims at its own outputs.
            From scratch, where the reference is half trained, 0 is better.
        reconstruction_steps: (``progressive``) gradient steps on the output error of a whole block, its norms and
            biases included, once its layers are solved; 0 for none.
        gradient_weighting: (``progressive``) weight the features of a block's output in these steps by their squared
            gradients in the last training batches; False weights all the same.
        calibration: (``progressive``) ``"auto"`` runs the last training batches again through the model if it gives the
            same outputs then, else sums each layer's Hessian up from the training batches as they pass, and says so in
            one warning. ``"stream"`` always does the latter, ``"magnitude"`` keeps the largest weights.
        reorder_inputs: (``progressive``, ``geometry="row"``) choose which inputs share a group of four as the phase
            begins, where that costs nothing at run time: hidden units, inputs of an output projection inside a head,
            channels between convolutions. Layers that compute these inputs, the state of the optimizers and averages
            move along; where one of these cannot, or outputs would change, the order stays.
        budget: (``progressive``) share of the speed-up that is given back as the phase begins, for layers that stay
            dense, where that lowers the model's loss most, measured one by one and together.
            The loss is what the module that training calls returns as ``loss``, or the error of its output; times are
            those of this GPU's kernel table at 4096 tokens, or multiply-adds.
        calibration_batches: (``progressive``) how many of the last training batches a block is solved on.
        token_weighting: (``progressive``) how far tokens count, while a layer is solved, by what an error there does to
            the output of its block, by one backward pass: 0 all alike, 1 by that alone. Its gain is not measured.
        damping: (``progressive``) added to the diagonal of a layer's Hessian, relative to each entry: larger values
            keep weights nearer to the dense ones, and fit the calibration batches less. Its gain is not measured.
        metric: (``post_step``, and for layers that ``progressive`` cannot solve) ``"activation"`` scales weights by the
            running rms of each input, so that they count by their effect on the layer's output; ``"weight"`` takes
            their magnitude.
        schedule: (``post_step``) ``"auto"`` finds the strength at which ``fraction`` of each layer's groups become 2:4,
            the cheapest first; the other groups stay as they are. Otherwise the strength itself:
            ``"exponential"``, ``"linear"``, ``"cubic"``, ``"constant"`` or a
            :class:`~prox24_lightning.schedules.Schedule`, relative to 1 / rms of the layer.
        fraction: (``post_step``) for ``"auto"``, the share of groups that are 2:4 while the phase runs from 0 to 1:
            ``"cubic"``, ``"linear"`` or a schedule from 0 to 1.
        targets: patterns of the weights to take; None takes every linear and convolution weight that fits, except
            output heads and tied weights. A pattern is compared with the whole name of the parameter
            (``model.layers.0.mlp.up_proj.weight``), of its module (``model.layers.0.mlp.up_proj``), and of the module's
            class and its bases (``Conv2d``), case by case. ``*`` stands for any text, dots included, ``?`` for one
            character, ``[03]`` for one of these: ``["*.mlp.*", "Conv2d"]``. Without wildcards it may also name a head
            or a tied weight. A pattern that fits nothing is refused.
        skip: patterns, likewise, of weights that stay dense, also where ``targets`` takes them.
        geometry: ``"row"`` lays groups of four along the inputs (what sparse tensor cores take in the forward
            pass), ``"column"`` along the outputs, ``"block"`` along both at once: 4 x 4 blocks with two non-zeros in
            each row and column, for sparse forward and backward passes. Weights that do not fit stay dense, with a
            reason.
        refit: (``post_step``) surviving weights at the freeze: ``"none"`` leaves them, ``"restore"`` puts back the
            values that they had before sparsification (for a trained model that is fine-tuned for a short time).
        sparse_training: (``geometry="block"``) once a linear layer's mask is frozen, run its forward pass and input
            gradient on sparse tensor cores, where training is on a GPU in 16 bits (autocast), and layer and batch are
            large enough for it to pay; the weight gradient stays dense. Layers that do not fit train as before.
        masks_file: where the masks are written at the end of a fit that has reached the freeze: a ``.safetensors`` file
            that :func:`~prox24_lightning.load_masks` puts onto any model with these weights. None writes none;
            :meth:`save_masks` does it later.
        name: distinguishes several instances of one trainer in checkpoints and logs.
        verbose: print the table of chosen and skipped weights at the start, and a line for each phase.

    Attributes:
        controller: decides along the run; monitors read it.
        early_rise: how the loss on new batches has changed before anything is pruned; a warning names a rise. None
            before that, for sharded models, and with another loss than those of
            :mod:`~prox24_lightning.calibration.recognised_loss`.

    Raises:
        ValueError, TypeError: for arguments that are wrong whatever the model.
        MisconfigurationException: before the first batch, when model, trainer and arguments do not fit together.
    """

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
    ) -> None:
        super().__init__()
        config = SparsifyConfig(
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
        # Lightning calls training_step, and under DDP calls it through the module: the module itself is never called.
        self.controller = SparsifyController(config, root_is_called=False)
        self._loaded = LoadedState()
        self._records: BestRecords | None = None
        self._length: RunLength | None = None
        self._copies: AveragedCopies | None = None
        self._rate: RateWarning | None = None
        self.early_rise: EarlyRise | None = None

    # What users, monitors and final hooks read.

    @property
    def config(self) -> SparsifyConfig:
        """The arguments; a new ``config`` takes effect at the next fit."""
        return self.controller.config

    @config.setter
    def config(self, config: SparsifyConfig) -> None:
        self.controller.config = config

    @property
    def name(self) -> str:
        """``name`` as it was given."""
        return self.config.name

    @property
    def selection(self) -> Selection:
        """The weights that become 2:4, and those that stay dense with the reason; empty before the fit starts."""
        return self.controller.selection

    @property
    def weights(self) -> tuple[GroupedWeight, ...]:
        """The weights that become 2:4; empty before the fit starts."""
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
    def start_step(self) -> int:
        """``start`` as a step of the present run."""
        return self.controller.start_step

    @property
    def freeze_step(self) -> int:
        """``freeze`` as a step of the present run."""
        return self.controller.freeze_step

    @property
    def masks(self) -> dict[str, Tensor]:
        """Frozen masks by weight name (bool, True stays); empty before the freeze.

        Of a weight that is sharded (FSDP2, tensor parallelism) this rank's part.
        """
        return self.controller.masks

    @property
    def strengths(self) -> dict[str, Tensor]:
        """The strength last used for each weight: 0-dim tensors; empty before sparsification."""
        return self.controller.strengths

    def save_masks(self, path: str | Path) -> Path:
        """Write the frozen masks to a file that :func:`~prox24_lightning.load_masks` reads; all ranks call it.

        Raises:
            ValueError: before the freeze.
        """
        return self.controller.save_masks(path)

    # Lightning's hooks.

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded.state or not (state := self.controller.state_dict()):
            return self._loaded.state
        return state if self._length is None else {**state, "run_length": self._length.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded.load(state_dict)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded.begin_run(pl_module)
        if stage == "fit":
            check_trainer(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first hook at which optimizers exist; an error here comes before any batch, sanity checks included.
        others = [cb for cb in trainer.callbacks if isinstance(cb, Prox24) and cb is not self]  # type: ignore[attr-defined]
        claimed = {other.name: other.selection for other in others}
        try:
            length = self._length = RunLength(trainer, pl_module)
            engine = self.controller.prepare(
                pl_module, trainer.optimizers, length.total, claimed, exact=length.is_exact
            )
        except ValueError as error:
            raise MisconfigurationException(f"Prox24: {error}") from error
        self.controller.watch.attach(TrainerDisplay(trainer, self.name), partial(stop_on_sigterm, trainer))
        self._records = BestRecords(trainer, pl_module)
        engine.on_masks.append(self._mask_averages)
        engine.companions.append(lambda order: {} if self._copies is None else self._copies.companions(order))
        # With several Prox24 the model is 2:4 when the last of them is frozen.
        engine.on_frozen.append(lambda: self._restart_records(others))
        if self.config.verbose:
            resumed = bool(self._loaded.state)
            print_selection(self.selection, self.config.headline(self.start_step, self.freeze_step, resumed=resumed))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only here is everything restored from a checkpoint, whatever the strategy.
        self._restore(trainer)
        assert self._length is not None
        self.controller.change_length(self._length.total)
        self._copies = AveragedCopies(trainer, pl_module)
        sparsifiers = [cb for cb in trainer.callbacks if isinstance(cb, Prox24)]  # type: ignore[attr-defined]
        controllers = [callback.controller for callback in sparsifiers]
        is_first = sparsifiers[0] is self  # one of them warns for all
        self._rate = RateWarning(trainer, pl_module, controllers, self._length.total) if is_first else None
        self.controller.bind(trainer.optimizers)
        self._announce()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._length is not None
        if self._copies is not None and not self._copies.has_looked:
            self._copies.find(self.weights)  # the module may have made its average in on_train_start
        self._length.update(self.step)
        self.controller.before_batch(trainer.optimizers, self._length.total)
        if self._rate is not None:
            self._rate.before_batch(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.controller.after_batch(trainer.optimizers)
        if self._rate is not None:
            self._rate.after_batch(outputs)
            self.early_rise = self._rate.early_rise
        if self._length is not None and not self._length.is_exact and self._length.is_last_batch():
            self.controller.freeze_now()  # the length was an estimate
        self._announce()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._mask_averages()
            if self._records is not None and not trainer.sanity_checking:
                self._records.forget_stale()
        else:
            self.controller.check_loaded(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.controller.check_loaded(pl_module)

    on_predict_start = on_test_start

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.controller.end_sparse_training()  # what other callbacks convert or export in on_fit_end are plain layers
        self._mask_averages()
        self.controller.check_end()
        if self.phase == "frozen" and self._records is not None:
            self._records.save_missing()
        if self.config.verbose and (pauses := self.controller.pauses()):
            rank_zero_info(pauses)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.controller.is_restored:  # a checkpoint of the last step: there was nothing to train
            self._restore(trainer)
        # Averaging callbacks put their weights into the model in on_train_end; the file holds hashes of the last ones.
        self.controller.write_masks()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._mask_averages()  # in place: the checkpoint holds these very tensors

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (KeyboardInterrupt, SystemExit)) and self._length is not None:
            rank_zero_info(f"{self.name}: stopped {self.controller.where()}; {how_to_go_on(trainer)}")
        self.controller.unbind()
        self.controller.watch.detach()
        self._loaded.end_run()
        if self._rate is not None:
            self._rate.close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.controller.unbind()
        self.controller.watch.detach()
        self._loaded.end_run()
        if self._rate is not None:
            self._rate.close()
        self._records = self._copies = self._length = self._rate = None  # they hold trainer and module

    def _announce(self) -> None:
        if (line := self.controller.new_phase()) is not None:
            rank_zero_info(line)

    def _restart_records(self, others: Sequence[Prox24]) -> None:
        if self._records is not None and all(other.phase == "frozen" for other in others):
            self._records.restart()

    def _restore(self, trainer: Trainer) -> None:
        state = self._loaded.take()
        if self._length is not None and "run_length" in state:
            self._length.load_state_dict(state["run_length"])
        try:
            self.controller.restore(state, trainer.global_step)
        except ValueError as error:
            raise MisconfigurationException(f"Prox24: {error}") from error

    def _mask_averages(self) -> None:
        if self._copies is not None and self.masks:
            self._copies.mask(self.weights, self.masks)
