"""Notice that a model changes while it trains: a layer is exchanged for another, or begins to train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from prox24_lightning.weights.selection import GroupedWeight


class ModelWatch:
    """Compare a model with what it was, at the cost of a few look-ups a batch.

    Args:
        model: holds the weights.
        weights: whose modules are watched.
        optimizers: whose parameters are counted.
    """

    def __init__(self, model: nn.Module, weights: Sequence[GroupedWeight], optimizers: Sequence[Optimizer]) -> None:
        names = {module: name for name, module in model.named_modules()}
        places: dict[tuple[nn.Module, str], nn.Module | None] = {}
        for weight in weights:
            parent = model
            for part in names[weight.module].split(".") if names.get(weight.module) else ():
                child = parent._modules[part]
                places[parent, part] = child
                parent = child if child is not None else parent
        self._places = [(parent, part, child) for (parent, part), child in places.items()]
        self._parameters = list(model.parameters())
        self._training, self._held = self._count(optimizers)

    def has_changed(self, optimizers: Sequence[Optimizer]) -> bool:
        """Return whether a watched module is another one, or more parameters train than ever before.

        Fewer train while an optimizer steps alone (``toggle_optimizer``), which changes nothing.
        """
        training, held = self._count(optimizers)
        grown = training > self._training or held > self._held
        self._training, self._held = max(training, self._training), max(held, self._held)
        return grown or any(parent._modules.get(part) is not child for parent, part, child in self._places)

    def _count(self, optimizers: Sequence[Optimizer]) -> tuple[int, int]:
        training = sum(parameter.requires_grad for parameter in self._parameters)
        return training, sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
