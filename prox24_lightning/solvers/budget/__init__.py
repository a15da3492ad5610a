"""Which layers stay dense when a share of the speed-up is given back."""

from prox24_lightning.solvers.budget.choose import LayerPrice, choose_dense, predicted_speedup

__all__ = ["LayerPrice", "choose_dense", "predicted_speedup"]
