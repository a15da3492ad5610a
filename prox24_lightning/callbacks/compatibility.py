"""Checks that a Lightning trainer suits :class:`~prox24_lightning.Prox24`, before the first batch."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_REFUSED_STRATEGIES = {
    "FSDPStrategy": "FSDP1 flattens parameters and cuts groups of four apart; "
    "use ModelParallelStrategy (FSDP2) or DDPStrategy",
    "DeepSpeedStrategy": "DeepSpeed keeps the weights that count inside its own optimizer; use DDPStrategy",
    "XLAStrategy": "XLA steps its optimizers outside of Python's reach; use a CPU or CUDA accelerator",
    "XLAFSDPStrategy": "XLA steps its optimizers outside of Python's reach; use a CPU or CUDA accelerator",
}
_CLASHING_CALLBACKS = ("ModelPruning",)


def check_trainer(trainer: Trainer) -> None:
    """Refuse parallel strategies that hide or cut parameters, and callbacks that prune as well.

    Raises:
        MisconfigurationException: with the name and the remedy.
    """
    for cls in type(trainer.strategy).__mro__:
        if cls.__name__ in _REFUSED_STRATEGIES:
            raise MisconfigurationException(
                f"Prox24 cannot work with strategy={cls.__name__}: {_REFUSED_STRATEGIES[cls.__name__]}"
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(cls.__name__ in _CLASHING_CALLBACKS for cls in type(callback).__mro__):
            raise MisconfigurationException(
                f"Prox24 and {type(callback).__name__} would both prune the model; remove one of the two callbacks"
            )
