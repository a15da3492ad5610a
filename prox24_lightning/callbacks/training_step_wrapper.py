"""Wrap a LightningModule's ``training_step``, and unwrap it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def wrap_training_step(pl_module: LightningModule, around: Around) -> Callable[[], None]:
    """Make ``pl_module.training_step(...)`` call ``around(step, args, kwargs)`` with the former step; return the undo.

    Only the instance gets the new step. The undo leaves a step alone that somebody else has set since then.
    """
    step = pl_module.training_step
    own = vars(pl_module).get("training_step")  # of a LightningModule that was compiled, or is wrapped already

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        return around(step, args, kwargs)

    # Lightning reads from the innermost function which arguments the step takes.
    training_step.__wrapped__ = getattr(step, "__wrapped__", step)
    pl_module.training_step = training_step  # type: ignore[method-assign]

    def undo() -> None:
        if vars(pl_module).get("training_step") is not training_step:
            return
        if own is None:
            del pl_module.training_step
        else:
            pl_module.training_step = own  # type: ignore[method-assign]

    return undo
