"""One-shot 2:4 pruning of a whole model, layer by layer, on a few calibration batches and without training."""

from prox24_lightning.oneshot.prune import prune_layerwise
from prox24_lightning.oneshot.pruning_report import LayerRecord, LayerwiseReport
from prox24_lightning.oneshot.rounding.round_model import RoundingReport, round_model
from prox24_lightning.oneshot.rounding.smooth_inputs import SmoothedInputs, smooth_inputs

__all__ = [
    "LayerRecord",
    "LayerwiseReport",
    "RoundingReport",
    "SmoothedInputs",
    "prune_layerwise",
    "round_model",
    "smooth_inputs",
]
