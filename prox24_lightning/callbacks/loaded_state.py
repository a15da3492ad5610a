"""A state that was loaded belongs to the model whose run has read it."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import LightningModule


class LoadedState:
    """Mixin of callbacks that keep a checkpoint's state until a fit takes it up.

    Lightning restores callbacks for a test, too, and a fit may fail in between: then a later fit of the same model,
    which has the checkpoint's weights by now, takes the state up, and a run of another model drops it. A state that is
    loaded outside of any run is for the next fit, whatever its model.
    """

    _loaded: dict[str, Any]
    _model_of_run: weakref.ref[LightningModule] | None = None
    _loaded_for: weakref.ref[LightningModule] | None = None

    def begin_run(self, pl_module: LightningModule) -> None:
        """A run of this model begins; its checkpoint has not been read yet."""
        if self._loaded_for is not None and self._loaded_for() is not pl_module:
            self._loaded, self._loaded_for = {}, None
        self._model_of_run = weakref.ref(pl_module)

    def end_run(self) -> None:
        """The run has ended or failed."""
        self._model_of_run = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the next fit."""
        self._loaded, self._loaded_for = state_dict, self._model_of_run
