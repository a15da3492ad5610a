"""``from prox24_lightning.layerwise import prune_layerwise``: the import that README has always given."""

from prox24_lightning.oneshot import LayerRecord, LayerwiseReport, prune_layerwise
from prox24_lightning.solvers import Solution, solve_layer

__all__ = ["LayerRecord", "LayerwiseReport", "Solution", "prune_layerwise", "solve_layer"]
