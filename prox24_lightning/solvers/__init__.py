"""One layer at a time: masks and values that minimise the local squared loss."""

from prox24_lightning.solvers.layer import Method, Refine, Solution, solve_layer

__all__ = ["Method", "Refine", "Solution", "solve_layer"]
