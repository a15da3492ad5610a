"""The statistics of a run, step by step, small enough for every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prox24_lightning.monitoring.statistics import SparsityStats

STATE_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Version 2 has no losses and metrics, and its norms are those of all layers."""
SERIES = (
    *(f"zeros_{count}" for count in range(5)),
    "retained_squared_norm",
    "lowest_retained_squared_norm",
    "mask_flips",
    "strength",
    "loss",
)
"""Statistics kept of each step besides the 2:4 fraction of every layer; NaN where there is none.

The retained squared norms are those of the layers that are not 2:4 yet: of the others they are one by construction.
"""


class SparsityHistory:
    """Statistics in the order of their steps, and the steps at which a phase began.

    At most ``limit`` steps are kept, spread evenly over the run, the first and the newest among them.

    Args:
        layers: names of the weights, in the model's order.
        limit: steps to keep, at least 4.
    """

    def __init__(self, layers: Sequence[str], limit: int = 2000) -> None:
        if limit < 4:
            raise ValueError(f"limit={limit} is too small for the history of a run; keep at least 4 steps")
        self.layers = tuple(layers)
        self.limit = limit
        self.steps: list[int] = []
        self.series: dict[str, list[float]] = {name: [] for name in SERIES}
        self.fractions: list[list[float]] = []
        self.phases: list[tuple[int, str]] = []
        self.metric_name: str | None = None
        self.metrics: list[tuple[int, float]] = []

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def groups_24(self) -> list[float]:
        """Share of 2:4 groups in the whole model, one value a recorded step."""
        return [1 - (none + one) for none, one in zip(self.series["zeros_0"], self.series["zeros_1"], strict=True)]

    def record(
        self, step: int, whole: SparsityStats, layers: Mapping[str, SparsityStats], loss: float = math.nan
    ) -> None:
        """Record the statistics after ``step`` finished steps; they replace those of the same step.

        Args:
            step: number of finished optimizer steps.
            whole: statistics of all layers together.
            layers: statistics of each layer.
            loss: mean training loss since the last record; NaN if it is not known.

        Raises:
            ValueError: if ``step`` lies before the newest one, or ``layers`` are not those of this history.
        """
        if tuple(layers) != self.layers:
            raise ValueError(f"statistics of {list(layers)} do not fit a history of {list(self.layers)}")
        row = {f"zeros_{count}": share for count, share in enumerate(whole.zeros)}
        row["retained_squared_norm"], row["lowest_retained_squared_norm"] = _retained_by_unpruned(layers)
        row["mask_flips"] = math.nan if whole.mask_flips is None else whole.mask_flips
        row["strength"] = math.nan if whole.strength is None else whole.strength
        row["loss"] = loss
        if self.steps and step < self.steps[-1]:
            raise ValueError(
                f"step {step} lies before the newest recorded step {self.steps[-1]}; rewind the history first"
            )
        if self.steps and step == self.steps[-1]:
            # Flips are counted since the measurement before, so a second one at this step counts none of the first's.
            row["mask_flips"] = self.series["mask_flips"][-1]
            if math.isnan(loss):
                row["loss"] = self.series["loss"][-1]
            self._keep(slice(None, -1))
        self.steps.append(step)
        for name in SERIES:
            self.series[name].append(row[name])
        self.fractions.append([layer.groups_24 for layer in layers.values()])
        if len(self) > self.limit:
            # Drop the inner step that has the closest neighbours, so that the others stay spread evenly.
            at = self.steps
            crowded = min(range(1, len(at) - 1), key=lambda i: at[i + 1] - at[i - 1])
            self._keep([i for i in range(len(at)) if i != crowded])

    def record_phase(self, step: int, phase: str) -> bool:
        """Record the phase after ``step`` finished steps; return whether it is a new one."""
        if self.phases and self.phases[-1][1] == phase:
            return False
        self.phases.append((step, phase))
        return True

    def record_metric(self, step: int, name: str, value: float) -> None:
        """Record what a validation after ``step`` finished steps gave; another ``name`` starts the record anew."""
        if name != self.metric_name:
            self.metric_name, self.metrics = name, []
        self.metrics = [*(entry for entry in self.metrics[-self.limit :] if entry[0] != step), (step, value)]

    def rewind(self, step: int) -> None:
        """Drop all that lies after ``step``, from which the run continues; 0 starts it anew."""
        self._keep([i for i, at in enumerate(self.steps) if at <= step])
        self.phases = [(at, phase) for at, phase in self.phases if at <= step]
        self.metrics = [(at, value) for at, value in self.metrics if at <= step]

    def _keep(self, which: slice | list[int]) -> None:
        def kept(values: list) -> list:
            return values[which] if isinstance(which, slice) else [values[i] for i in which]

        self.steps = kept(self.steps)
        self.series = {name: kept(values) for name, values in self.series.items()}
        self.fractions = kept(self.fractions)

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors, which ``torch.load(weights_only=True)`` reads."""
        return {
            "version": STATE_VERSION,
            "layers": list(self.layers),
            "steps": list(self.steps),
            "series": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.series.items()},
            "fractions": torch.tensor(self.fractions, dtype=torch.float64).reshape(len(self), len(self.layers)),
            "phases": [list(entry) for entry in self.phases],
            "metric_name": self.metric_name,
            "metrics": [list(entry) for entry in self.metrics],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], limit: int = 2000) -> SparsityHistory:
        """Return the history that :meth:`state_dict` has saved.

        Raises:
            ValueError: if the state's version is unknown.
        """
        if state.get("version") not in READABLE_VERSIONS:
            raise ValueError(
                f"a sparsity history of version {state.get('version')} cannot be read; expected {STATE_VERSION}"
            )
        history = cls(state["layers"], limit)
        history.steps = list(state["steps"])
        unknown = torch.full((len(history),), math.nan, dtype=torch.float64)
        history.series = {name: state["series"].get(name, unknown).tolist() for name in SERIES}
        history.fractions = state["fractions"].tolist()
        history.phases = [(step, phase) for step, phase in state["phases"]]
        history.metric_name = state.get("metric_name")
        history.metrics = [(step, value) for step, value in state.get("metrics", ())]
        return history


def _retained_by_unpruned(layers: Mapping[str, SparsityStats]) -> tuple[float, float]:
    """Return the retained squared norm of the layers that are not 2:4, all together and in the worst; NaN if all are.

    Layers count by their squared norm, as in a statistic of the whole model.
    """
    unpruned = [layer for layer in layers.values() if layer.groups_24 < 1]
    norms = [layer.groups * layer.rms**2 for layer in unpruned]
    if not sum(norms):
        return math.nan, math.nan
    retained = sum(norm * layer.retained_squared_norm for norm, layer in zip(norms, unpruned, strict=True))
    return retained / sum(norms), min(layer.retained_squared_norm for layer in unpruned)
