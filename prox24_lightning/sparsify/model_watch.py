"""Notice that a model changes while it trains: a layer is exchanged for another, or begins to train."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from prox24_lightning.sparsify.checks import check_followed
from prox24_lightning.weights.selection import GroupedWeight, Selection


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


@dataclass(frozen=True)
class ModelChange:
    """What has become of the weights of a run in a model that has changed.

    Attributes:
        weights: all that become or stay 2:4 from now on.
        joined: names of those in layers that are new, or that have begun to train.
        lost: name and reason of those in whose place a layer stands that stays dense.
    """

    weights: tuple[GroupedWeight, ...]
    joined: tuple[str, ...]
    lost: dict[str, str]

    @classmethod
    def between(
        cls, before: Sequence[GroupedWeight], model: nn.Module, selection: Selection, taken: Collection[str]
    ) -> ModelChange:
        """Compare the weights of a run with the model as it is now.

        Args:
            before: weights of the run.
            model: as it is now.
            selection: of the model as it is now.
            taken: names of weights that belong to others, or were left dense.

        Raises:
            RuntimeError: if a layer was exchanged and no optimizer trains the new one.
        """
        now = {weight.name: weight for weight in selection.chosen if weight.name not in taken}
        known = {weight.name: weight for weight in before}
        held = set(model.modules())
        gone = [weight for weight in before if weight.name not in now and weight.module not in held]
        check_followed(gone, selection)
        exchanged = [name for name, weight in now.items() if name in known and weight.module is not known[name].module]
        new = [name for name in now if name not in known]
        # A weight that does not train just now is kept: another optimizer may be toggled on.
        followed = [now.get(weight.name, weight) for weight in before if weight not in gone]
        reasons = {weight.name: weight.reason for weight in selection.skipped}
        return cls(
            (*followed, *(now[name] for name in new)),
            (*exchanged, *new),
            {weight.name: reasons.get(weight.name, "no longer in the model") for weight in gone},
        )

    def __bool__(self) -> bool:
        return bool(self.joined or self.lost)
