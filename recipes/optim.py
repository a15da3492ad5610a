"""The optimizer that the recipes share: AdamW without decay on vectors, and a cosine counted in optimizer steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from prox24_lightning.finetune import parameter_groups


def adamw_with_cosine(
    module: LightningModule,
    *,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    final: float = 0.1,
    embedding_lr: float = 1.0,
    fused: bool = False,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: linear warm-up, then a cosine down to ``final * lr`` at the last step.

    Args:
        lr: the peak.
        weight_decay: of matrices; biases and normalisation weights get none.
        warmup_steps: optimizer steps of the warm-up.
        final: rate at the last step, relative to the peak.
        embedding_lr: rate of embeddings, relative to that of the rest; see ``parameter_groups``.
        fused: take AdamW's fused kernels, which are faster on a GPU.

    Raises:
        ValueError: if the length of the run is unknown, or ``embedding_lr`` is negative or not finite.
    """
    total = module.trainer.estimated_stepping_batches
    if not 0 < total < float("inf"):
        raise ValueError("the learning rate schedule needs the length of the run: set trainer.max_steps")
    groups = parameter_groups(module, lr=lr, weight_decay=weight_decay, embedding_lr=embedding_lr)
    optimizer = AdamW(groups, betas=(0.9, 0.95), fused=fused or None)

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}}
