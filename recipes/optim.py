"""The optimizer that the recipes share: AdamW without decay on vectors, and a cosine counted in optimizer steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
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
    before_restart: float | None = None,
    embedding_lr: float = 1.0,
    fused: bool = False,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: linear warm-up, then a cosine down to ``final * lr`` at the last step.

    Biases and normalisation weights (fewer than two dimensions) get no weight decay.

    Args:
        lr: the peak.
        restart: fraction of the run at which a first cosine ends and a second one begins, with a warm-up of its own
            (warm restarts, arXiv 1608.03983): at the freeze of ``Prox24``, so that recovery has a whole schedule.
        before_restart: rate up to ``restart``, relative to the peak, held after the warm-up instead of the first
            cosine: a dense model is harmed by a rate that a sparse one needs to recover.
        embedding_lr: rate of embeddings, and of heads that share their weight, relative to that of the rest: 2:4 leaves
            them as they are, so that they have nothing to recover.
        fused: take AdamW's fused kernels, which are faster on a GPU.

    Raises:
        ValueError: if the length of the run is unknown, ``restart`` lies outside of it, or a relative rate is negative.
    """
    if restart is not None and not 0 < restart < 1:
        raise ValueError(f"restart={restart} must lie between 0 and 1: a fraction of the run")
    if before_restart is not None and restart is None:
        raise ValueError(f"before_restart={before_restart} needs restart, the fraction of the run where it ends")
    for name, relative in (("before_restart", before_restart or 0.0), ("embedding_lr", embedding_lr)):
        if not relative >= 0:
            raise ValueError(f"{name}={relative} must not be negative: it is relative to the peak rate")
    total = module.trainer.estimated_stepping_batches
    if not 0 < total < float("inf"):
        raise ValueError("the learning rate schedule needs the length of the run: set trainer.max_steps")
    embeddings = {p for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    apart = embeddings if embedding_lr != 1 else set()
    parameters = [p for p in module.parameters() if p.requires_grad and p not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if slow := [p for p in module.parameters() if p.requires_grad and p in apart]:
        groups.append({"params": slow, "weight_decay": weight_decay, "lr": embedding_lr * lr})
    optimizer = AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused or None)

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
