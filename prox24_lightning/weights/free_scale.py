"""A scale of a layer's inputs that is free: who else is scaled with them, and the scaling itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prox24_lightning.weights.free_order import MovedTensor

_OCTAVES = 3
"""Random factors lie between 2^-3 and 2^3."""


@dataclass(frozen=True, eq=False)
class FreeScale:
    """Inputs of layers that may be divided by a factor each, since what computes them is divided by it.

    Columns of the consumers are multiplied by the factors, and rows of one producer (a norm's weight, or a linear layer
    between which and the consumers everything is linear in each channel) are divided by them.

    Attributes:
        consumers: the layers whose inputs these are.
        columns: (units, copies), long, on the CPU: the inputs of each unit. A unit has several where query heads share
            a key-value head.
        multiplied: the columns of the consumers.
        divided: the rows of the producer.
    """

    consumers: tuple[nn.Module, ...]
    columns: Tensor
    multiplied: tuple[MovedTensor, ...]
    divided: tuple[MovedTensor, ...]

    @property
    def units(self) -> int:
        return len(self.columns)

    @property
    def tensors(self) -> tuple[MovedTensor, ...]:
        """Everything that changes."""
        return self.multiplied + self.divided

    def in_region(self, source: nn.Module, target: nn.Module) -> FreeScale:
        """Return the same scale in another module of the same structure.

        Args:
            source: holds what this scale changes.
            target: has modules of the same names, types and sizes.

        Raises:
            LookupError: if it has not.
        """
        names = {module: name for name, module in source.named_modules()}
        others = dict(target.named_modules())

        def moved(part: MovedTensor) -> MovedTensor:
            other = others[names[part.module]]
            if type(other) is not type(part.module) or getattr(other, part.name).shape != part.tensor.shape:
                raise LookupError(f"{names[part.module]} is another module there")
            return replace(part, module=other)

        consumers = tuple(others[names[consumer]] for consumer in self.consumers)
        multiplied, divided = (tuple(map(moved, parts)) for parts in (self.multiplied, self.divided))
        return FreeScale(consumers, self.columns, multiplied, divided)

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Divide the inputs by factors, in place; powers of two change no output by a bit.

        Args:
            factors: (units,), positive.
        """
        for part in self.multiplied:
            _multiply(part, factors)
        for part in self.divided:
            _multiply(part, 1 / factors)

    @contextmanager
    def tried(self, seed: int = 0) -> Iterator[None]:
        """Scale by random powers of two for as long as the context lasts."""
        generator = torch.Generator().manual_seed(seed)
        octaves = torch.randint(-_OCTAVES, _OCTAVES + 1, (self.units,), generator=generator)
        before = [part.tensor.detach().clone() for part in self.tensors]
        try:
            self.scale(octaves.float().exp2())
            yield
        finally:
            with torch.no_grad():
                for part, values in zip(self.tensors, before, strict=True):
                    part.tensor.copy_(values)


def _multiply(part: MovedTensor, factors: Tensor) -> None:
    tensor = part.tensor
    each = torch.ones(tensor.shape[part.dim])
    each[part.places] = factors.detach().float().cpu().unsqueeze(1)
    shape = [1] * tensor.dim()
    shape[part.dim] = -1
    tensor.mul_(each.to(tensor).view(shape))
