"""Scalars of callbacks through the Trainer's own ``log``, so that every integration reports them."""

from __future__ import annotations

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback


def log_scalars(trainer: Trainer, values: dict[str, float], *, console: bool = True) -> None:
    """Log ``values`` at the present step: to ``log_history``, TensorBoard, Weights & Biases, and whatever listens.

    Args:
        trainer: whose ``log`` reports them.
        values: by tag.
        console: print them too, as the Trainer prints its own.
    """
    wanted, handler = trainer.control.should_log, trainer.callback_handler
    everyone = handler.callbacks
    if not console:
        handler.callbacks = [one for one in everyone if not isinstance(one, (PrinterCallback, ProgressCallback))]
    try:
        trainer.log(values)
    finally:
        handler.callbacks = everyone
    trainer.control.should_log = wanted  # the Trainer's own log of this step is still to come
