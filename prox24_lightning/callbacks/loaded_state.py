"""A callback's state from a checkpoint, kept until the fit of the model whose run has read it."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import LightningModule


class LoadedState:
    """Keep a checkpoint's state until a fit takes it up.

    Lightning restores callbacks for a test, too, and a fit may fail in between: then a later fit of the same model,
    which has the checkpoint's weights by now, takes the state up, and a run of another model drops it. A state that is
    loaded outside of any run is for the next fit, whatever its model.

    Attributes:
        state: the state that no fit has taken up yet; empty if there is none.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self._model_of_run: weakref.ref[LightningModule] | None = None
        self._loaded_for: weakref.ref[LightningModule] | None = None

    def begin_run(self, pl_module: LightningModule) -> None:
        """Note that a run of this model begins, whose checkpoint has not been read yet."""
        if self._loaded_for is not None and self._loaded_for() is not pl_module:
            self.state, self._loaded_for = {}, None
        self._model_of_run = weakref.ref(pl_module)

    def end_run(self) -> None:
        """Note that the run has ended or failed."""
        self._model_of_run = None

    def load(self, state: dict[str, Any]) -> None:
        """Keep ``state`` for the next fit."""
        self.state, self._loaded_for = state, self._model_of_run

    def take(self) -> dict[str, Any]:
        """Return the state and forget it."""
        state, self.state = self.state, {}
        return state
