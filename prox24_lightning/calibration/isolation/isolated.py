"""Run a module beside its training: nothing of the module, nor of the random state, is changed by it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from prox24_lightning.calibration.calls.hooks import silent_hooks
from prox24_lightning.calibration.calls.module_call import device_of
from prox24_lightning.calibration.calls.random_state import RandomState
from prox24_lightning.calibration.isolation.module_state import kept

_RANDOM = ("drop", "jitter", "noise", "stochastic")
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


@contextmanager
def isolated(
    model: nn.Module, *, as_trained: bool = False, gradients: bool = False, hooks: bool = True
) -> Iterator[None]:
    """Let ``model`` run so that afterwards it and the random state are as they were, also after an error.

    There are no key-value caches, nothing is compiled, and torch's encoder layers do not take their fast path (which
    hands on nested tensors), so that inner modules can be hooked. Buffers that a forward pass writes to are copies.

    Args:
        as_trained: keep the modes of training, but for modules that then work at random or with statistics of the
            batch (:func:`trains_otherwise`); False: evaluation mode.
        gradients: record them: the model's forward differentiates.
        hooks: run the forward hooks that others have registered.
    """
    device = device_of(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    random = RandomState.now(device)
    with ExitStack() as stack:
        stack.callback(random.restore, device)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(silent_hooks())
        stack.enter_context(kept(model))
        stack.enter_context(caches_off(model))
        if not hooks:
            stack.enter_context(hooks_off(model))
        set_modes(model, as_trained=as_trained)
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """Turn key-value caches off through the model's own config."""
    config: Any = getattr(model, "config", None)
    old = getattr(config, "use_cache", None)
    if old is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if old is not None:
            config.use_cache = old


@contextmanager
def hooks_off(model: nn.Module) -> Iterator[None]:
    """Take the forward hooks of ``model`` and of all modules inside off, and put them on again."""
    held = [(vars(each), name, vars(each)[name]) for each in model.modules() for name in _HOOKS if vars(each).get(name)]
    for state, name, _ in held:
        state[name] = OrderedDict()
    try:
        yield
    finally:
        for state, name, hooks in held:
            state[name] = hooks


def has_hooks(model: nn.Module) -> bool:
    """Whether there are forward hooks on ``model`` or a module inside."""
    return any(vars(each).get(name) for each in model.modules() for name in _HOOKS)


def set_modes(model: nn.Module, *, as_trained: bool) -> None:
    """Put ``model`` into evaluation mode; ``as_trained``: only the modules inside that train otherwise."""
    for module in model.modules():
        if not as_trained or trains_otherwise(module):
            module.training = False


def trains_otherwise(module: nn.Module) -> bool:
    """Whether training mode makes a module draw random numbers, use statistics of the batch, or compute twice.

    Known by its class, and by what its settings are called.
    """
    if isinstance(module, nn.modules.batchnorm._NormBase) or getattr(module, "gradient_checkpointing", False):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RReLU) or any(word in type(module).__name__.lower() for word in _RANDOM):
        return True
    settings = {**getattr(getattr(module, "config", None), "__dict__", {}), **vars(module)}
    return any(
        isinstance(value, (int, float)) and value > 0 and any(word in name for word in _RANDOM)
        for name, value in settings.items()
    )
