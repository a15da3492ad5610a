"""The weights that a monitor watches together, and the scalars and pictures it makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from prox24_lightning.mask.codes import mask_picture
from prox24_lightning.monitoring.history import SparsityHistory
from prox24_lightning.monitoring.statistics import MeasuredMask, SparsityStats, measure_sparsity
from prox24_lightning.monitoring.summary import percent
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.sparsify.phases import Phase
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

PHASES = ("dense", "sparsify", "frozen")
"""In the order of their numbers in the log."""
METRICS = ("groups_24", "retained_squared_norm", "penalty", "rms", "mask_flips", "strength")


class PruningState(Protocol):
    """What a monitor reads of the controller of a run."""

    @property
    def phase(self) -> Phase: ...
    @property
    def step(self) -> int: ...
    @property
    def masks(self) -> dict[str, Tensor]: ...
    @property
    def strengths(self) -> dict[str, Tensor]: ...
    @property
    def pass_statistics(self) -> PassStatistics | None: ...
    def measure_next_step(self, wanted: bool) -> None: ...
    def metric_scale(self, name: str) -> Tensor | None: ...


@dataclass
class MonitoredWeights:
    """The weights of one Prox24, or all weights of a model that could be 2:4.

    Attributes:
        label: name of the Prox24, or ``"model"``.
        pruning: the controller of the Prox24, or None.
        weights: what is measured.
        history: the statistics of the run so far.
        whole: the newest statistics of all weights together; None before the first.
        layers: the newest statistics of each weight, by name.
        masks: the masks of the newest statistics, against which the next mask flips are counted.
    """

    label: str
    pruning: PruningState | None
    weights: tuple[GroupedWeight, ...]
    history: SparsityHistory
    whole: SparsityStats | None = None
    layers: dict[str, SparsityStats] = field(default_factory=dict)
    masks: dict[str, MeasuredMask] = field(default_factory=dict)

    def measure(self, steps: int, loss: float = math.nan) -> bool:
        """Compute the statistics after ``steps`` steps and record them; return False if that step was recorded.

        ``loss`` is the mean training loss since the last measurement.
        """
        is_new = self.history.steps[-1:] != [steps]
        pruning = self.pruning
        # A frozen weight has no strength: the one still stored was last used before the freeze.
        strengths = None if pruning is None or pruning.phase == "frozen" else pruning.strengths
        self.whole, self.layers = measure_sparsity(
            self.weights,
            scale_of=self._scale,
            strengths=strengths,
            last_masks=self.masks,
            from_pass=None if pruning is None else pruning.pass_statistics,
        )
        self.history.record(steps, self.whole, self.layers, loss)
        return is_new

    def enters_phase(self, steps: int) -> bool:
        """Record the phase after ``steps`` steps; return whether it is a new one."""
        return self.pruning is not None and self.history.record_phase(steps, self.pruning.phase)

    def scalars(self, prefix: str, layer_prefix: str | None) -> Iterator[tuple[str, float]]:
        """Yield tag and value of the newest statistics; those of layers only with a ``layer_prefix``."""
        if self.whole is None:
            return
        yield from _scalars(self.whole, prefix)
        for count, share in enumerate(self.whole.zeros):
            yield f"{prefix}groups_with_{count}_zeros", share
        if self.pruning is not None:
            yield f"{prefix}phase", float(PHASES.index(self.pruning.phase))
            yield f"{prefix}step", float(self.pruning.step)
        if layer_prefix is not None:
            for name, layer in self.layers.items():
                yield from _scalars(layer, f"{layer_prefix}{name.removesuffix('.weight')}/")

    def mask_pictures(self, count: int) -> list[tuple[str, Tensor]]:
        """Return corners of at most ``count`` weights, evenly spread over the model, on the CPU."""
        last, count = len(self.weights) - 1, min(count, len(self.weights))
        places = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
        return [
            (
                weight.name,
                mask_picture(local_part(weight.parameter), dim=weight.dim, scale=self._scale(weight.name)).cpu(),
            )
            for weight in (self.weights[place] for place in places)
        ]

    def describe(self) -> str:
        """Return the newest statistics in one line."""
        fractions = self.history.fractions[-1]
        done = sum(fraction == 1 for fraction in fractions)
        return (
            f"{self.label}: {percent(self.history.groups_24[-1])} of the groups, {done} of {len(fractions)} weights "
            f"are 2:4 after {self.history.steps[-1]} steps"
        )

    def _scale(self, name: str) -> Tensor | None:
        return None if self.pruning is None else self.pruning.metric_scale(name)


def _scalars(stats: SparsityStats, prefix: str) -> Iterator[tuple[str, float]]:
    for name in METRICS:
        value = getattr(stats, name)
        if value is not None:
            yield f"{prefix}{name}", value
