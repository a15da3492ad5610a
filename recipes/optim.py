"""The optimizer that the recipes share: AdamW without decay on vectors, and a cosine counted in optimizer steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw_with_cosine(
    module: LightningModule,
    *,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    final: float = 0.1,
    restart: float | None = None,
    fused: bool = False,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: linear warm-up, then a cosine down to ``final * lr`` at the last step.

    ``restart``, a fraction of the run, ends a first cosine there and begins a second one, with a warm-up of its own
    (warm restarts, arXiv 1608.03983): at the freeze of ``Prox24``, so that recovery has a whole schedule.

    Biases and normalisation weights (fewer than two dimensions) get no weight decay. ``fused`` takes AdamW's fused
    kernels, which are faster on a GPU.

    Raises:
        ValueError: if the length of the run is unknown, or ``restart`` lies outside of it.
    """
    if restart is not None and not 0 < restart < 1:
        raise ValueError(f"restart={restart} must lie between 0 and 1: a fraction of the run")
    total = module.trainer.estimated_stepping_batches
    if not 0 < total < float("inf"):
        raise ValueError("the learning rate schedule needs the length of the run: set trainer.max_steps")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused or None)

    middle = 0 if restart is None else round(restart * total)

    def scale(step: int) -> float:
        step, length = (step, middle) if step < middle else (step - middle, total - middle)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, length - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}}
