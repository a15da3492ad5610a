"""What a one-shot pruning run does, validated before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prox24_lightning.solvers.config import Method, SolverConfig
from prox24_lightning.solvers.input_order.choose import ReorderInputs
from prox24_lightning.weights.groups import Geometry


def own_or_dense_target(method: Method, dense_target: float | None) -> float:
    """Return ``dense_target``, or where it is None what is best for the method: 0 for ``"keep"``, else 0.5."""
    if dense_target is None:
        return 0.0 if method == "keep" else 0.5
    return dense_target


@dataclass(frozen=True)
class PruneConfig:
    """Settings of :func:`~prox24_lightning.oneshot.prune_layerwise`, which documents them.

    Raises:
        ValueError: for numbers out of range.
    """

    solver: SolverConfig = field(default_factory=SolverConfig)
    targets: Sequence[str] | None = None
    skip: Sequence[str] | None = None
    geometry: Geometry = "row"
    blocks: str | None = None
    budget: float = 0.0
    dense_target: float = 0.5
    reorder_inputs: ReorderInputs = False
    reconstruct_steps: int = 0
    offload: str = "device"
    work_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 1:
            raise ValueError(f"budget={self.budget} must lie in [0, 1)")
        if not 0 <= self.dense_target <= 1:
            raise ValueError(f"dense_target={self.dense_target} must lie in [0, 1]")
        steps = self.reconstruct_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"reconstruct_steps={steps!r} must be a whole number, not negative; 0 leaves them out")
        if self.reorder_inputs not in (False, True, "stream"):
            raise ValueError(f"reorder_inputs={self.reorder_inputs!r} is unknown; use True, False or 'stream'")
        if self.solver.method == "keep" and self.reorder_inputs:
            raise ValueError(
                f"method='keep' keeps the groups as they are: leave reorder_inputs={self.reorder_inputs!r} out"
            )
        if self.solver.method == "keep" and self.budget:
            raise ValueError(f"method='keep' leaves no layer dense: leave budget={self.budget} out")
        if self.solver.weights is not None and self.geometry == "column":
            raise ValueError(
                f"weights={self.solver.weights!r} with geometry='column': scales belong to outputs, and groups along "
                "them run on no kernel; use geometry='row' or 'block'"
            )

    def settings(self) -> dict[str, Any]:
        """Return what decides the result, as JSON values: limits of the solver only where they are not the default."""
        solver = asdict(self.solver)
        defaults = {one.name: one.default for one in fields(SolverConfig)}
        return {
            "method": solver.pop("method"),
            "refine": solver.pop("refine"),
            "targets": None if self.targets is None else list(self.targets),
            "skip": None if self.skip is None else list(self.skip),
            "geometry": self.geometry,
            "budget": self.budget,
            "dense_target": self.dense_target,
            **({"reorder_inputs": self.reorder_inputs} if self.reorder_inputs else {}),
            **({"reconstruct_steps": self.reconstruct_steps} if self.reconstruct_steps else {}),
            **{name: value for name, value in solver.items() if value != defaults[name]},
        }
