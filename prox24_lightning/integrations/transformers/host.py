"""What every callback for ``transformers.Trainer`` of this package is."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerState


class TransformersCallback(TrainerCallback):
    """A callback for ``transformers.Trainer``, which says so where Lightning calls it.

    Attributes:
        in_lightning: the class that does the same there.
    """

    in_lightning = ""

    @property
    def state_key(self) -> str:
        """What Lightning asks for with every call."""
        return type(self).__name__

    def setup(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse Lightning's ``Trainer``, whose first call of a callback this is."""
        name = type(self).__name__
        raise TypeError(f"{name} is for transformers.Trainer; Lightning's Trainer takes {self.in_lightning}")

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Let Lightning, which calls this next, raise that error."""


def mark_changed_loss(state: TrainerState) -> None:
    """Note that a callback of this run changes the training loss along the way: a rise is no sign of a high rate."""
    state.__dict__["_changes_loss"] = True


def has_changed_loss(state: TrainerState) -> bool:
    """Return whether :func:`mark_changed_loss` was called in this run."""
    return "_changes_loss" in state.__dict__
