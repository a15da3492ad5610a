"""One-shot 2:4 pruning of a whole model, layer by layer, on a few calibration batches and without training."""

from prox24_lightning.oneshot.prune import prune_layerwise
from prox24_lightning.oneshot.pruning_report import LayerRecord, LayerwiseReport

__all__ = ["LayerRecord", "LayerwiseReport", "prune_layerwise"]
