"""The arguments of a run as users write them: what can be refused before there is a model, is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from prox24_lightning.schedules import Schedule
from prox24_lightning.sparsify.engine import Metric
from prox24_lightning.sparsify.phases import check_step
from prox24_lightning.sparsify.strategies.post_step.strategy import Refit
from prox24_lightning.weights.groups import Geometry

StrategyName = Literal["post_step", "progressive"]


def check_arguments(
    start: int | float,
    freeze: int | float,
    strategy: StrategyName,
    dense_target: float,
    reconstruction_steps: int,
    metric: Metric,
    schedule: str | Schedule,
    targets: Sequence[str] | None,
    skip: Sequence[str] | None,
    geometry: Geometry,
    refit: Refit,
    sparse_training: bool,
    masks_file: str | Path | None,
) -> None:
    """The arguments are those of :class:`~prox24_lightning.Prox24`.

    Raises:
        ValueError, TypeError: with the value and the remedy.
    """
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
                raise ValueError(f"{argument}={given!r} belongs to strategy='post_step'; set that too, or leave it out")
    if not 0 <= dense_target <= 1:
        raise ValueError(
            f"dense_target={dense_target} must lie in [0, 1]: 0 is a layer's own output, 1 the dense model's"
        )
    if isinstance(reconstruction_steps, bool) or not isinstance(reconstruction_steps, int) or reconstruction_steps < 0:
        raise ValueError(
            f"reconstruction_steps={reconstruction_steps!r} must be a whole number of gradient steps a block; 0 is none"
        )
    if sparse_training and geometry != "block":
        raise ValueError(
            f"sparse_training=True needs geometry='block', not {geometry!r}: only a mask that is 2:4 both ways "
            "lets the forward pass and the input gradient run on sparse tensor cores"
        )
    for argument, patterns in (("targets", targets), ("skip", skip)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument} takes a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    if masks_file is not None and Path(masks_file).suffix != ".safetensors":
        raise ValueError(f"masks_file={str(masks_file)!r} must end in .safetensors, the format it is written in")
