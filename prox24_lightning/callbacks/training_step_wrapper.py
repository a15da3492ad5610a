"""Wrap a LightningModule's ``training_step``, and unwrap it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _WrappedStep:
    """Calls ``around(step, args, kwargs)``. Copies and pickles of the module get the step of its class instead."""

    def __init__(self, pl_module: LightningModule, around: Around) -> None:
        step = pl_module.training_step
        functools.update_wrapper(self, step)
        # Lightning reads from the innermost function which arguments the step takes.
        self.__wrapped__ = getattr(step, "__wrapped__", step)
        self._module, self._step, self._around = pl_module, step, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._step, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(type(self._module).training_step, memo.get(id(self._module), self._module))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "training_step")  # of a module that is being read: its class's


def wrap_training_step(pl_module: LightningModule, around: Around) -> Callable[[], None]:
    """Make ``pl_module.training_step(...)`` call ``around(step, args, kwargs)`` with the former step; return the undo.

    Only the instance gets the new step. The undo leaves a step alone that somebody else has set since then.
    """
    own = vars(pl_module).get("training_step")  # of a LightningModule that was compiled, or is wrapped already
    wrapped = _WrappedStep(pl_module, around)
    pl_module.training_step = wrapped  # type: ignore[method-assign]

    def undo() -> None:
        if vars(pl_module).get("training_step") is not wrapped:
            return
        if own is None:
            del pl_module.training_step
        else:
            pl_module.training_step = own  # type: ignore[method-assign]

    return undo
