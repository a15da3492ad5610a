"""What a monitor watches together, and the numbers it makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.mask.codes import mask_picture
from prox24_lightning.monitoring.history import SparsityHistory
from prox24_lightning.monitoring.statistics import SeenMask, SparsityStats, look
from prox24_lightning.monitoring.summary import percent
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

PHASES = ("dense", "sparsify", "frozen")
"""In the order of their numbers in the log."""
METRICS = ("groups_24", "energy_kept", "penalty", "rms", "mask_flips", "strength")


@dataclass
class Track:
    """The weights of one Prox24, or all weights of a model that could be 2:4.

    Attributes:
        label: name of the Prox24, or ``"model"``.
        prox: the Prox24, or None.
        weights: what is watched.
        history: the record of looks.
        layers: statistics of each weight at the newest look of this process.
    """

    label: str
    prox: Prox24 | None
    weights: tuple[GroupedWeight, ...]
    history: SparsityHistory
    whole: SparsityStats | None = None
    layers: dict[str, SparsityStats] = field(default_factory=dict)
    seen: dict[str, SeenMask] = field(default_factory=dict)

    def look(self, steps: int) -> bool:
        """Measure and record; returns whether it is the first look after ``steps`` steps."""
        is_first = self.history.steps[-1:] != [steps]
        # A frozen weight has no strength: what is still stored there was used last, before the freeze.
        strengths = None if self.prox is None or self.prox.phase == "frozen" else self.prox.strengths
        looks = None if self.prox is None else self.prox.looks
        self.whole, self.layers = look(
            self.weights, scale_of=self._scale, strengths=strengths, seen=self.seen, looks=looks
        )
        self.history.add(steps, self.whole, self.layers)
        return is_first

    def begins_phase(self, steps: int) -> bool:
        """Whether a phase of the Prox24 is seen for the first time."""
        return self.prox is not None and self.history.mark(steps, self.prox.phase)

    def metrics(self, prefix: str, layer_prefix: str | None) -> Iterator[tuple[str, float]]:
        """Tag and value of the newest look; layers only with a ``layer_prefix``."""
        if self.whole is None:
            return
        yield from _scalars(self.whole, prefix)
        for count, share in enumerate(self.whole.zeros):
            yield f"{prefix}groups_with_{count}_zeros", share
        if self.prox is not None:
            yield f"{prefix}phase", float(PHASES.index(self.prox.phase))
            yield f"{prefix}step", float(self.prox.step)
        if layer_prefix is not None:
            for name, layer in self.layers.items():
                yield from _scalars(layer, f"{layer_prefix}{name.removesuffix('.weight')}/")

    def pictures(self, count: int) -> list[tuple[str, Tensor]]:
        """Corners of at most ``count`` weights, evenly spread over the model, on the CPU."""
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
        """The newest look in one line."""
        fractions = self.history.fractions[-1]
        done = sum(fraction == 1 for fraction in fractions)
        return (
            f"{self.label}: {percent(self.history.groups_24[-1])} of the groups, {done} of {len(fractions)} weights "
            f"are 2:4 after {self.history.steps[-1]} steps"
        )

    def _scale(self, name: str) -> Tensor | None:
        return None if self.prox is None else self.prox.metric_scale(name)


def _scalars(stats: SparsityStats, prefix: str) -> Iterator[tuple[str, float]]:
    for name in METRICS:
        value = getattr(stats, name)
        if value is not None:
            yield f"{prefix}{name}", value
