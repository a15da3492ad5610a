"""One layer at a time: masks and values that minimise the local squared loss."""

from prox24_lightning.solvers.config import Method, Refine, SolverConfig
from prox24_lightning.solvers.layer import Solution, solve_layer

__all__ = ["Method", "Refine", "Solution", "SolverConfig", "solve_layer"]
