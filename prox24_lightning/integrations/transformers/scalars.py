"""Scalars of callbacks through the Trainer's own ``log``, so that every integration reports them."""

from __future__ import annotations

from transformers import Trainer


def log_scalars(trainer: Trainer, values: dict[str, float]) -> None:
    """Log ``values`` at the present step: to ``log_history``, TensorBoard, Weights & Biases, and whatever listens."""
    wanted = trainer.control.should_log
    trainer.log(values)
    trainer.control.should_log = wanted  # the Trainer's own log of this step is still to come
