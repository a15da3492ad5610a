"""The settings of a run as users write them, checked as far as that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from prox24_lightning.schedules import FRACTION_CURVES, STRENGTH_SCHEDULES, Schedule, named_schedule
from prox24_lightning.solvers.config import DAMPING
from prox24_lightning.sparsify.engine import Metric
from prox24_lightning.sparsify.phases import PhasePlan, check_step
from prox24_lightning.sparsify.strategies.post_step.strategy import Refit
from prox24_lightning.sparsify.strategies.progressive.calibration import CalibrationMode
from prox24_lightning.sparsify.strategies.progressive.strategy import CALIBRATION_BATCHES, RECONSTRUCTION_STEPS
from prox24_lightning.weights.groups import Geometry

StrategyName = Literal["post_step", "progressive", "keep"]


@dataclass(frozen=True)
class SparsifyConfig:
    """The arguments of :class:`~prox24_lightning.Prox24`, which documents them.

    Raises:
        ValueError, TypeError: for a wrong value, with the value and the remedy.
    """

    start: int | float = 0.02
    freeze: int | float = 0.3
    strategy: StrategyName = "progressive"
    dense_target: float = 0.5
    reconstruction_steps: int = RECONSTRUCTION_STEPS
    gradient_weighting: bool = True
    calibration: CalibrationMode = "auto"
    reorder_inputs: bool = False
    budget: float = 0.0
    calibration_batches: int = CALIBRATION_BATCHES
    token_weighting: float = 0.0
    damping: float = DAMPING
    metric: Metric = "activation"
    schedule: str | Schedule = "auto"
    fraction: str | Schedule = "cubic"
    targets: Sequence[str] | None = None
    skip: Sequence[str] | None = None
    geometry: Geometry = "row"
    refit: Refit = "none"
    sparse_training: bool = False
    masks_file: str | Path | None = None
    name: str = "prox24"
    verbose: bool = True

    def headline(self, start: int, freeze: int, *, resumed: bool = False) -> str:
        """Return in words what a run does between these two steps; ``resumed``: what a checkpoint says counts."""
        if resumed:
            return f"{self.name}: goes on from a checkpoint"
        if self.strategy == "keep":
            return f"{self.name}: the zeros of weights that are 2:4 are kept from the first step on"
        return f"{self.name}: weights become 2:4 {PhasePlan(start, freeze).when()}"

    def __post_init__(self) -> None:
        self._check_steps()
        for argument, choices in (
            ("strategy", StrategyName),
            ("metric", Metric),
            ("geometry", Geometry),
            ("refit", Refit),
            ("calibration", CalibrationMode),
        ):
            if (value := getattr(self, argument)) not in get_args(choices):
                raise ValueError(f"{argument}={value!r} is unknown; use one of {', '.join(get_args(choices))}")
        self._check_strategy()
        if self.sparse_training and self.geometry != "block":
            raise ValueError(
                f"sparse_training=True needs geometry='block', not {self.geometry!r}: only a mask that is 2:4 both "
                "ways lets the forward pass and the input gradient run on sparse tensor cores"
            )
        for argument, patterns in (("targets", self.targets), ("skip", self.skip)):
            if isinstance(patterns, str):
                raise TypeError(
                    f"{argument} takes a list of patterns, got the string {patterns!r}; write [{patterns!r}]"
                )
        if self.masks_file is not None and Path(self.masks_file).suffix != ".safetensors":
            raise ValueError(
                f"masks_file={str(self.masks_file)!r} must end in .safetensors, the format it is written in"
            )

    @property
    def strength_schedule(self) -> Schedule | None:
        """The relative strength of ``post_step`` over the phase; None where ``fraction`` decides it."""
        if self.schedule == "auto":
            return None
        return named_schedule(self.schedule, STRENGTH_SCHEDULES, "schedule")

    @property
    def fraction_schedule(self) -> Schedule:
        """The share of groups that ``post_step`` makes 2:4 over the phase."""
        return named_schedule(self.fraction, FRACTION_CURVES, "fraction")

    @property
    def phase_steps(self) -> tuple[int | float, int | float]:
        """``start`` and ``freeze``; 0 where the masks are those of the model as it is."""
        return (0, 0) if self.strategy == "keep" else (self.start, self.freeze)

    def _check_steps(self) -> None:
        check_step(self.start, "start")
        check_step(self.freeze, "freeze")
        defaults = {field.name: field.default for field in fields(self)}
        for argument in ("start", "freeze") if self.strategy == "keep" else ():
            if (given := getattr(self, argument)) not in (0, defaults[argument]):
                raise ValueError(
                    f"{argument}={given!r} has no effect with strategy='keep', which freezes the zeros of the model "
                    "before the first step; leave it out, or take another strategy to prune in the run"
                )
        if type(self.start) is type(self.freeze) and self.start > self.freeze:
            raise ValueError(
                f"start={self.start!r} comes after freeze={self.freeze!r}; sparsification begins before the freeze"
            )

    def _check_strategy(self) -> None:
        if self.strategy != "post_step":
            for argument, default in (("schedule", "auto"), ("refit", "none")):
                if (given := getattr(self, argument)) != default:
                    raise ValueError(
                        f"{argument}={given!r} belongs to strategy='post_step'; set that too, or leave it out"
                    )
        if not isinstance(self.reorder_inputs, bool):
            raise ValueError(
                f"reorder_inputs={self.reorder_inputs!r} must be True or False: training orders inputs inside blocks; "
                "'stream' is for prune_layerwise and prox24 prune"
            )
        if self.reorder_inputs and (self.strategy != "progressive" or self.geometry != "row"):
            raise ValueError(
                f"reorder_inputs=True needs strategy='progressive' and geometry='row', not {self.strategy!r} and "
                f"{self.geometry!r}; leave it out"
            )
        if not 0 <= self.budget < 1:
            raise ValueError(f"budget={self.budget} must lie in [0, 1): the share of the speed-up that is given back")
        if self.budget and self.strategy != "progressive":
            raise ValueError(f"budget={self.budget} belongs to strategy='progressive'; set that too, or leave it out")
        if not 0 <= self.dense_target <= 1:
            raise ValueError(
                f"dense_target={self.dense_target} must lie in [0, 1]: 0 is a layer's own output, 1 the dense model's"
            )
        share = self.token_weighting
        if not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise ValueError(
                f"token_weighting={share!r} must lie in [0, 1]: 0 counts all tokens alike, 1 by the error "
                "of the block's output alone"
            )
        if not (isinstance(self.damping, (int, float)) and 0 < self.damping <= 1):
            raise ValueError(
                f"damping={self.damping!r} must lie in (0, 1]: a share of each diagonal entry of the Hessian"
            )
        batches = self.calibration_batches
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ValueError(f"calibration_batches={batches!r} must be a whole number of training batches, at least 1")
        steps = self.reconstruction_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"reconstruction_steps={steps!r} must be a whole number of gradient steps a block; 0 is none"
            )
        _ = self.strength_schedule, self.fraction_schedule  # unknown names are refused here
