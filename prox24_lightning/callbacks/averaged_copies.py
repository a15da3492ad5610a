"""Averaged copies of the weights (EMA, SWA) become 2:4 with them: they remember what was there before the freeze."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prox24_lightning.weights.free_order import FreeOrder
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

_OF_MODULES = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")
_SAMPLE = 64
"""Values of a copy that show whether it moves."""


@dataclass(frozen=True)
class _Copy:
    owner: str
    weight: str
    tensor: Tensor
    before: Tensor
    is_average: bool

    def moves(self) -> bool:
        return self.is_average or not torch.equal(_sample(self.tensor), self.before)


class AveragedCopies:
    """Copies of weights that no optimizer trains, and that move all the same: averages.

    They are looked for in the callbacks of the trainer and in what the module keeps: submodules and buffers
    (``AveragedModel`` of ``torch.optim.swa_utils``, or an average of one's own), dicts of tensors by name, and lists of
    tensors in the order of the parameters. A copy has the shape of its weight and its name, or the end of it. One that
    does not move (a teacher, a reference) is left alone.

    Args:
        trainer: whose callbacks may hold averages.
        pl_module: may hold averages.

    Attributes:
        has_looked: whether :meth:`find` has been called.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._weights: dict[str, tuple[str, Tensor]] = {}
        self._trained: set[int] = set()
        self._own: set[int] = set()
        self._copies: dict[int, _Copy] = {}
        self._named: set[str] = set()
        self.has_looked = False

    def find(self, weights: Sequence[GroupedWeight]) -> None:
        """Look for copies of ``weights``; what is found first now is taken to move only from now on."""
        self.has_looked = True
        self._search({weight.name: weight.parameter for weight in weights})

    def companions(self, order: FreeOrder) -> dict[Tensor, list[Tensor]]:
        """Return the copies that move of each tensor of ``order``.

        Raises:
            ValueError: if an average holds some of these tensors, and others are not found in it.
        """
        wanted = {moved.tensor for moved in order.tensors}
        tensors = {clean_name(name): tensor for name, tensor in _tensors_of(self._pl_module) if tensor in wanted}
        self._search(tensors)
        owners: dict[str, dict[str, Tensor]] = {}
        for copy in self._copies.values():
            if copy.weight in tensors and copy.moves():
                owners.setdefault(copy.owner, {})[copy.weight] = local_part(copy.tensor)
        for owner, copies in owners.items():
            if missing := [name for name in tensors if name not in copies and isinstance(tensors[name], nn.Parameter)]:
                raise ValueError(f"{owner} averages {next(iter(copies))}, but {missing[0]} is not found in it")
        found: dict[Tensor, list[Tensor]] = {}
        for copies in owners.values():
            for name, part in copies.items():
                found.setdefault(tensors[name], []).append(part)
        return found

    def _search(self, tensors: Mapping[str, Tensor]) -> None:
        """Look for copies of ``tensors`` and of all that is trained, by name, known averages first."""
        trained = [parameter for group in self._groups() for parameter in group["params"]]
        self._trained = {id(parameter) for parameter in trained if parameter.requires_grad}
        averages = {id(tensor) for average in self._averages() for _, tensor in _tensors_of(average)}
        named: dict[str, Tensor] = dict(tensors)
        for name, parameter in self._pl_module.named_parameters():
            if id(parameter) in self._trained - averages:
                named.setdefault(clean_name(name), parameter)  # masks have names without torch.compile's wrappers
        self._weights = {clean_name(name): (name, tensor) for name, tensor in named.items()}
        self._own = {id(tensor) for tensor in named.values()}
        found: dict[int, _Copy] = {}
        for copy in self._find():
            found.setdefault(id(copy.tensor), copy)
        self._copies = {key: self._copies.get(key, copy) for key, copy in found.items()}

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def mask(self, weights: Sequence[GroupedWeight], masks: Mapping[str, Tensor]) -> None:
        """Zero the pruned entries of the copies that move, of the weights that have a mask."""
        self.find(weights)
        for copy in self._copies.values():
            mask, part = masks.get(copy.weight), local_part(copy.tensor)
            if mask is None or mask.shape != part.shape or not copy.moves():
                continue
            part.masked_fill_(~mask.to(part.device), 0.0)
            if copy.owner not in self._named:
                self._named.add(copy.owner)
                rank_zero_info(f"{copy.owner} averages the weights: what is pruned of them is zero there, too")

    def _averages(self) -> list[AveragedModel]:
        module = self._pl_module
        return [part for part in (*module.modules(), *vars(module).values()) if isinstance(part, AveragedModel)]

    def _find(self) -> Iterator[_Copy]:
        trainer, module = self._trainer, self._pl_module
        order = [(clean_name(name), parameter) for name, parameter in module.named_parameters()]
        for average in self._averages():
            yield from self._in_tensors(type(average).__name__, dict(_tensors_of(average)), is_average=True)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = type(callback).__name__
            held = getattr(callback, "_average_model", None)
            if isinstance(held, nn.Module):
                yield from self._in_tensors(name, dict(_tensors_of(held)), is_average=True)
            for value in vars(callback).values():
                yield from self._in_object(name, value, order)
        yield from self._in_tensors("", dict(_tensors_of(module)))
        for name, value in vars(module).items():
            if name in _OF_MODULES:
                continue
            yield from self._in_object(name, value, order)
            if type(value).__module__.split(".")[0] not in ("lightning", "pytorch_lightning", "torch", "builtins"):
                for part in vars(value).values() if hasattr(value, "__dict__") else ():
                    yield from self._in_object(name, part, order)

    def _in_object(self, owner: str, value: Any, order: Sequence[tuple[str, Tensor]]) -> Iterator[_Copy]:
        """Look into a module that is not registered, a dict of tensors by name, or a list in the parameters' order."""
        if isinstance(value, nn.Module) and not isinstance(value, LightningModule):
            yield from self._in_tensors(owner, dict(_tensors_of(value)))
        elif isinstance(value, Mapping):
            yield from self._in_tensors(owner, {str(k): v for k, v in value.items() if isinstance(v, Tensor)})
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
            trained = [pair for pair in order if id(pair[1]) in self._trained]
            for named in (order, trained):
                if [item.shape for item in value] == [parameter.shape for _, parameter in named]:
                    names = [name for name, _ in named]
                    yield from self._in_tensors(owner, dict(zip(names, value, strict=True)))
                    return

    def _in_tensors(self, owner: str, tensors: Mapping[str, Tensor], *, is_average: bool = False) -> Iterator[_Copy]:
        for name, tensor in tensors.items():
            # An AveragedModel may be among the parameters that an optimizer holds; it gets no gradients.
            if id(tensor) in self._own or (id(tensor) in self._trained and not is_average):
                continue
            if (weight := self._weight_of(clean_name(name), tensor)) is not None:
                yield _Copy(owner or name.partition(".")[0], weight, tensor, _sample(tensor), is_average)

    def _weight_of(self, name: str, tensor: Tensor) -> str | None:
        """Return the weight whose name shares the longest end with ``name``; None where two share as much."""
        lengths = {
            candidate: _common_end(name, candidate)
            for candidate, (_, weight) in self._weights.items()
            if weight.shape == tensor.shape
        }
        longest = max(lengths.values(), default=0)
        best = [candidate for candidate, length in lengths.items() if length == longest]
        return self._weights[best[0]][0] if longest and len(best) == 1 else None


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _common_end(first: str, second: str) -> int:
    """Return how many parts two dotted names share at their ends; names without their dots count as whole."""
    flat = second.replace(".", "")
    if first.rpartition(".")[2].endswith(flat):
        return second.count(".") + 1
    count = 0
    for one, other in zip(reversed(first.split(".")), reversed(second.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return count


def _sample(tensor: Tensor) -> Tensor:
    values = local_part(tensor.detach()).flatten()
    return values[:: max(values.numel() // _SAMPLE, 1)].clone()
