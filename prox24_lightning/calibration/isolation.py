"""Run a model beside its training: evaluation mode, no caches, no gradients, nothing compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """Turn key-value caches off through the model's own config, and dropout off; restore both."""
    config: Any = getattr(model, "config", None)
    old = getattr(config, "use_cache", None)
    training = {module: module.training for module in model.modules()}
    if old is not None:
        config.use_cache = False
    model.eval()
    try:
        yield
    finally:
        if old is not None:
            config.use_cache = old
        for module, flag in training.items():
            module.training = flag


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no caches, no gradients, nothing compiled and no fast path of torch's encoder layers (which
    hands on nested tensors), so that inner modules can be listened to."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), caches_off(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
