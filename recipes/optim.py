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
    restart: float | None = None,
    before_restart: float | None = None,
    embedding_lr: float = 1.0,
    fused: bool = False,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: linear warm-up, then a cosine down to ``final * lr`` at the last step.

    Args:
        lr: the peak.
        weight_decay: of matrices; biases and normalisation weights get none.
        warmup_steps: optimizer steps of the warm-up.
        final: rate at the last step, relative to the peak.
        restart: fraction of the run at which a first cosine ends and a second one begins, with a warm-up of its own
            (warm restarts, arXiv 1608.03983): at the freeze of ``Prox24``, so that recovery has a whole schedule.
        before_restart: rate up to ``restart``, relative to the peak, held after the warm-up instead of the first
            cosine: a dense model is harmed by a rate that a sparse one needs to recover.
        embedding_lr: rate of embeddings, relative to that of the rest; see ``parameter_groups``.
        fused: take AdamW's fused kernels, which are faster on a GPU.

    Raises:
        ValueError: if the length of the run is unknown, ``restart`` lies outside of it, or a relative rate is negative.
    """
    if restart is not None and not 0 < restart < 1:
        raise ValueError(f"restart={restart} must lie between 0 and 1: a fraction of the run")
    if before_restart is not None and restart is None:
        raise ValueError(f"before_restart={before_restart} needs restart, the fraction of the run where it ends")
    if before_restart is not None and not before_restart >= 0:
        raise ValueError(f"before_restart={before_restart} must not be negative: it is relative to the peak rate")
    total = module.trainer.estimated_stepping_batches
    if not 0 < total < float("inf"):
        raise ValueError("the learning rate schedule needs the length of the run: set trainer.max_steps")
    groups = parameter_groups(module, lr=lr, weight_decay=weight_decay, embedding_lr=embedding_lr)
    optimizer = AdamW(groups, betas=(0.9, 0.95), fused=fused or None)

    middle = 0 if restart is None else round(restart * total)

    def scale(step: int) -> float:
        if before_restart is not None:
            if step < middle:
                return before_restart * min(1.0, (step + 1) / max(1, warmup_steps))
            if step - middle < warmup_steps:
                return before_restart + (1 - before_restart) * (step - middle + 1) / warmup_steps
        step, length = (step, middle) if step < middle else (step - middle, total - middle)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, length - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}}
