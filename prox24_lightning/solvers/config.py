"""How one layer is solved: the method, its refinement and their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from prox24_lightning.solvers.admm import PATHS
from prox24_lightning.weights.rounding import RoundedForm

Method = Literal["magnitude", "wanda", "sparsegpt", "prox", "prox_gradient", "keep"]
Refine = Literal["masked_gradient"]

PathName = Literal["full", "short"]

DEFAULT_STEPS = {"prox": PATHS["full"].steps, "prox_gradient": 400}
SPARSEGPT_DAMPING = 0.01
"""Relative to the mean diagonal, as published."""
DAMPING = 1e-3
"""Of all other solvers, relative to each diagonal entry."""
ROUNDING_DAMPING = 0.5
"""Of rounding, relative to each diagonal entry. What a rounded entry can make up for is little, so that its values fit
the calibration tokens alone long before those of a refinement do: on held-out tokens of SmolLM2's layers 0.3 to 1 is
best, from fewer tokens than inputs to eight times as many, and 0.001 may be worse than plain rounding."""


@dataclass(frozen=True)
class SolverConfig:
    """Settings of :func:`~prox24_lightning.solvers.layer.solve_layer`, which documents them.

    ``path`` is for ``prox`` alone: ``"full"`` lets strength and rho grow from where no group is 2:4 to where all are;
    ``"short"`` leaves out both ends, and fits rho and the number of steps to the layer's inputs.

    Raises:
        ValueError: for an unknown method or refinement, and for numbers out of range.
    """

    method: Method = "prox"
    refine: Refine | None = "masked_gradient"
    steps: int | None = None
    momentum: float = 0.0
    damping: float | None = None
    refine_steps: int = 300
    tolerance: float = 1e-4
    weights: RoundedForm | None = None
    path: PathName = "full"

    def __post_init__(self) -> None:
        known: dict[str, tuple[Any, ...]] = {
            "method": get_args(Method),
            "refine": (*get_args(Refine), None),
            "weights": (*get_args(RoundedForm), None),
            "path": get_args(PathName),
        }
        if self.path == "short" and self.method != "prox":
            raise ValueError(f"path='short' belongs to method='prox', not to {self.method!r}; leave it out")
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(str, values))}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.refine_steps < 1:
            raise ValueError(f"refine_steps={self.refine_steps} must be at least 1; refine=None leaves them out")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")
        for name in ("damping", "tolerance"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")

    @property
    def method_steps(self) -> int:
        """Steps of the prox methods, on the short path the most of them; 0 for the others."""
        default = PATHS["short"].steps if self.path == "short" else DEFAULT_STEPS.get(self.method, 0)
        return self.steps or default

    @property
    def method_damping(self) -> float:
        """Damping of the method, in its own units."""
        default = SPARSEGPT_DAMPING if self.method == "sparsegpt" else DAMPING
        return default if self.damping is None else self.damping

    @property
    def refine_damping(self) -> float:
        """Damping of the refinement."""
        return DAMPING if self.damping is None else self.damping

    @property
    def rounding_damping(self) -> float:
        """Damping of rounding."""
        return ROUNDING_DAMPING if self.damping is None else self.damping
