"""The callback that takes a model to 2:4 sparsity while it trains."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from prox24_lightning.callbacks.compatibility import check_optimizers, check_trainer, check_weights, optimized
from prox24_lightning.callbacks.tables import print_selection
from prox24_lightning.groups import Geometry, GroupedWeight, Selection, clean_name, select_weights
from prox24_lightning.mask import violations_24
from prox24_lightning.schedules import FRACTION_CURVES, STRENGTH_SCHEDULES, Schedule, named_schedule
from prox24_lightning.sparsify import (
    Metric,
    Phase,
    PhasePlan,
    PostStepProx,
    Progressive,
    Refit,
    SparsityEngine,
    Strategy,
    check_step,
    resolve_plan,
)

StrategyName = Literal["post_step", "progressive"]


class Prox24(Callback):
    """Sparsify, freeze, fine-tune: the weights of any model become 2:4 along an ordinary training run.

    Three phases. *dense*: nothing is touched. *sparsify*: between optimizer steps the proximal operator of the 2:4
    penalty (arXiv 2501.18015) drives the weights to 2:4. *frozen*: the masks are fixed, pruned weights are exactly
    zero in weights, gradients and optimizer state, and the rest trains on.

    Steps are optimizer steps, counted over all optimizers as ``Trainer(max_steps=...)`` counts them, except that a
    step skipped by a gradient scaler does not count.

    Args:
        start: last dense step: int, or float fraction of the run.
        freeze: step after which the masks are fixed: int, or float fraction of the run. Equal to ``start`` it
            prunes in one shot there.
        strategy: ``"progressive"`` takes layer after layer along the phase, by the paper's layer-wise prox and masked
            gradient on the second moments of the layer's inputs in the training batches, and freezes it while
            the rest trains on; it gave the best models (benchmarks/results). ``"post_step"`` applies the prox to all
            weights after every step.
        metric: (``post_step``) ``"activation"`` measures a weight by what it adds to the layer's output, in coordinates
            scaled by the running rms of each input; ``"weight"`` by its magnitude.
        schedule: (``post_step``) ``"auto"`` makes the share of each layer's groups that ``fraction`` names 2:4, the
            cheapest first, and leaves the others alone until their turn. Otherwise the strength itself:
            ``"exponential"``, ``"linear"``, ``"cubic"``, ``"constant"`` or a
            :class:`~prox24_lightning.schedules.Schedule`, relative to 1 / rms of the layer.
        fraction: (``post_step``) for ``"auto"``, the share of groups that are 2:4 while the phase runs from 0 to 1:
            ``"cubic"``, ``"linear"`` or a schedule from 0 to 1.
        targets: patterns of parameter names, module names or module types to take; None takes every linear and
            convolution weight that fits, except output heads and tied weights.
        skip: patterns that stay dense.
        geometry: ``"row"`` lays groups of four along the inputs (what sparse tensor cores take in the forward
            pass), ``"column"`` along the outputs, ``"block"`` along both at once: 4 x 4 blocks with two non-zeros in
            each row and column, for sparse forward and backward passes. Weights that do not fit stay dense, with a
            reason.
        refit: (``post_step``) surviving weights at the freeze: ``"none"`` leaves them, ``"restore"`` puts back the
            values that they had before sparsification (for a trained model that is fine-tuned for a short time).
        name: tells several instances of one trainer apart, in checkpoints and logs.
        verbose: print the table of chosen and skipped weights at the start.

    Raises:
        ValueError, TypeError: for arguments that are wrong whatever the model.
        MisconfigurationException: before the first batch, when model, trainer and arguments do not fit together.
    """

    def __init__(
        self,
        start: int | float = 0.5,
        freeze: int | float = 0.8,
        *,
        strategy: StrategyName = "progressive",
        metric: Metric = "activation",
        schedule: str | Schedule = "auto",
        fraction: str | Schedule = "cubic",
        targets: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        geometry: Geometry = "row",
        refit: Refit = "none",
        name: str = "prox24",
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_step(start, "start")
        check_step(freeze, "freeze")
        if type(start) is type(freeze) and start > freeze:
            raise ValueError(f"start={start!r} comes after freeze={freeze!r}; sparsification begins before the freeze")
        for argument, value, choices in (
            ("strategy", strategy, StrategyName),
            ("metric", metric, Metric),
            ("geometry", geometry, Geometry),
            ("refit", refit, Refit),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{argument}={value!r} is unknown; use one of {', '.join(get_args(choices))}")
        if strategy == "progressive":
            for argument, given, default in (("schedule", schedule, "auto"), ("refit", refit, "none")):
                if given != default:
                    raise ValueError(
                        f"{argument}={given!r} belongs to strategy='post_step'; set that too, or leave it out"
                    )
        for argument, patterns in (("targets", targets), ("skip", skip)):
            if isinstance(patterns, str):
                raise TypeError(
                    f"{argument} takes a list of patterns, got the string {patterns!r}; write [{patterns!r}]"
                )
        self.start = start
        self.freeze = freeze
        self.strategy = strategy
        self.metric = metric
        self.schedule = None if schedule == "auto" else named_schedule(schedule, STRENGTH_SCHEDULES, "schedule")
        self.fraction = named_schedule(fraction, FRACTION_CURVES, "fraction")
        self.targets = targets
        self.skip = skip
        self.geometry = geometry
        self.refit = refit
        self.name = name
        self.verbose = verbose
        self.selection = Selection((), ())
        self._engine: SparsityEngine | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._loaded: dict[str, Any] = {}

    # What monitors and final hooks read.

    @property
    def weights(self) -> tuple[GroupedWeight, ...]:
        """The weights that become 2:4; empty before the fit starts."""
        return self.selection.chosen

    @property
    def step(self) -> int:
        """Finished real optimizer steps."""
        return 0 if self._engine is None else self._engine.step

    @property
    def phase(self) -> Phase:
        """``"dense"``, ``"sparsify"`` or ``"frozen"``."""
        return "dense" if self._engine is None else self._engine.phase

    @property
    def masks(self) -> dict[str, Tensor]:
        """Frozen masks by weight name (bool, True stays); empty before the freeze."""
        return {} if self._engine is None else self._engine.masks

    @property
    def strengths(self) -> dict[str, Tensor]:
        """The strength last used for each weight: 0-dim tensors; empty before sparsification."""
        return {} if self._engine is None else self._engine.strategy.strengths

    @property
    def start_step(self) -> int:
        """``start`` as a step of the present run."""
        return self._plan.start

    @property
    def freeze_step(self) -> int:
        """``freeze`` as a step of the present run."""
        return self._plan.freeze

    def metric_scale(self, name: str) -> Tensor | None:
        """Scale of the metric now in use for a weight; broadcasts to it; None for the weight's own coordinates."""
        return None if self._engine is None else self._engine.metric_scale(name)

    @property
    def _plan(self) -> PhasePlan:
        if self._engine is None:
            raise RuntimeError("the steps of Prox24 are known once a fit has started")
        return self._engine.plan

    # Lightning's hooks.

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_trainer(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first hook at which optimizers exist; an error here comes before any batch, sanity checks included.
        check_optimizers(trainer.optimizers)
        try:
            selection = select_weights(pl_module, targets=self.targets, skip=self.skip, geometry=self.geometry)
            plan = resolve_plan(self.start, self.freeze, trainer.estimated_stepping_batches)
        except ValueError as error:
            raise MisconfigurationException(f"Prox24: {error}") from error
        self.selection = optimized(selection, trainer.optimizers, explicit=self.targets is not None)
        others = [cb for cb in trainer.callbacks if isinstance(cb, Prox24) and cb is not self]  # type: ignore[attr-defined]
        check_weights(self.selection, {other.name: other.selection for other in others}, self.name)
        engine = SparsityEngine(self.weights, plan, self._make_strategy(), metric=self.metric)
        engine.on_freeze.append(lambda: self._mask_averages(trainer))
        if self._engine is not None and self._model is not None and self._model() is pl_module:
            # A second fit of the same model goes on where the first one stopped.
            self._loaded = self._loaded or self._engine.state_dict()
        self._engine = engine
        self._model = weakref.ref(pl_module)
        if self.verbose:
            print_selection(self.selection, f"{self.name}: 2:4 from step {plan.start} to step {plan.freeze}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only here is everything restored from a checkpoint, whatever the strategy.
        engine = self._require_engine()
        if self._loaded:
            try:
                engine.load_state_dict(self._loaded)
            except ValueError as error:
                raise MisconfigurationException(f"Prox24: {error}") from error
            self._loaded = {}
        elif trainer.global_step > engine.step:
            engine.step = trainer.global_step
            rank_zero_warn(
                f"the checkpoint holds no state of Prox24 (name={self.name!r}): it was written without the callback; "
                f"going on from step {engine.step} as {engine.phase}, with masks still to be chosen"
            )
        engine.bind(trainer.optimizers)
        self._mask_averages(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = self._require_engine()
        if not engine.is_bound_to(trainer.optimizers):
            rank_zero_info("Prox24: the trainer's optimizers were replaced; listening to the new ones")
            check_optimizers(trainer.optimizers)
            engine.bind(trainer.optimizers)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._require_engine().before_batch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.phase != "frozen":
            rank_zero_warn(
                f"the run ended at step {self.step} in phase {self.phase!r}, before the freeze at step "
                f"{self.freeze_step}: the model is not 2:4; train on from its last checkpoint, or set freeze lower"
            )
            return
        for weight in self.weights:
            if broken := violations_24(weight.parameter, dim=weight.dim):
                rank_zero_warn(f"{weight.name} is frozen, yet something has written to its pruned entries: {broken}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unbind()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unbind()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded or self._engine is None:
            return self._loaded
        return self._engine.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _make_strategy(self) -> Strategy:
        if self.strategy == "progressive":
            return Progressive()
        return PostStepProx(self.schedule, self.fraction, refit=self.refit)

    def _require_engine(self) -> SparsityEngine:
        if self._engine is None:
            raise RuntimeError("Prox24 was asked to act before on_fit_start")
        return self._engine

    def _unbind(self) -> None:
        if self._engine is not None:
            self._engine.unbind()

    def _mask_averages(self, trainer: Trainer) -> None:
        """Mask averaged copies of the weights (EMA, SWA) too: they remember what was there before the freeze."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if not isinstance(average, nn.Module) or not self.masks:
                continue
            copies = {clean_name(name).removeprefix("module."): value for name, value in average.named_parameters()}
            for name, mask in self.masks.items():
                if name in copies:
                    with torch.no_grad():
                        copies[name].masked_fill_(~mask.to(copies[name].device), 0.0)
