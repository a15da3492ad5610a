"""One-shot 2:4 pruning, layer after layer, on a few batches of calibration data and without training."""

from prox24_lightning.layerwise.report import LayerRecord, LayerwiseReport
from prox24_lightning.layerwise.solve import Method, Refine, Solution, solve_layer
from prox24_lightning.layerwise.walk import prune_layerwise

__all__ = ["LayerRecord", "LayerwiseReport", "Method", "Refine", "Solution", "prune_layerwise", "solve_layer"]
