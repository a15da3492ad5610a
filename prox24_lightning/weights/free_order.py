"""An order of a layer's inputs that is free: who else moves with them, and the move itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_lightning.weights.layer_matrix import matrix_columns


@dataclass(frozen=True)
class MovedTensor:
    """A parameter or buffer whose entries move along one dimension.

    Attributes:
        module, name: where it lives.
        dim: along which its entries move.
        places: (units, copies), long, on the CPU: the entries of each unit along ``dim``.
    """

    module: nn.Module
    name: str
    dim: int
    places: Tensor

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    def index(self, order: Tensor) -> Tensor:
        """Return the entry along :attr:`dim` that comes to each place, long, on the CPU, in an order of units."""
        index = torch.arange(self.tensor.shape[self.dim])
        index[self.places] = self.places[order.cpu()]
        return index


@dataclass(frozen=True, eq=False)
class FreeOrder:
    """Inputs of layers that may change places among themselves, since what computes them moves along.

    Attributes:
        consumers: the layers whose inputs these are.
        columns: (units, copies), long, on the CPU: the inputs of each unit. A unit has several where query heads share
            a key-value head.
        runs: number of consecutive runs of ``units / runs`` units, inside of which units may change places (heads).
        tensors: what moves: columns of the consumers, rows of the producers and whatever lies between them.
    """

    consumers: tuple[nn.Module, ...]
    columns: Tensor
    runs: int
    tensors: tuple[MovedTensor, ...]

    @property
    def units(self) -> int:
        return len(self.columns)

    def matrix_columns(self, consumer: nn.Module) -> Tensor:
        """Return (units, copies): the columns of each unit in the consumer's weight as a matrix; of a convolution one
        for each kernel position."""
        inputs = self.columns.numel()
        positions = torch.arange(matrix_columns(consumer) // inputs) * inputs
        return (positions[:, None] + self.columns[:, None]).flatten(1)

    def move(self, order: Tensor) -> None:
        """Bring unit ``order[p]`` to place ``p``, in all tensors.

        Args:
            order: (units,), a permutation that stays inside of the runs.
        """
        for moved in self.tensors:
            reorder(moved.tensor, moved.dim, moved.index(order))

    def random_order(self, seed: int = 0) -> Tensor:
        """Return a random order that keeps to the runs."""
        generator = torch.Generator().manual_seed(seed)
        size = self.units // self.runs
        return torch.cat([torch.randperm(size, generator=generator) + run * size for run in range(self.runs)])

    @contextmanager
    def tried(self, seed: int = 0) -> Iterator[None]:
        """Move into a random order for as long as the context lasts."""
        order = self.random_order(seed)
        try:
            self.move(order)
            yield
        finally:
            self.move(inverse_order(order))


@torch.no_grad()
def reorder(tensor: Tensor, dim: int, index: Tensor) -> None:
    """Bring the entries ``index`` along ``dim`` to the places 0, 1, 2, ..., in place."""
    tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))


def inverse_order(order: Tensor) -> Tensor:
    """Return the order that undoes ``order``."""
    return order.argsort()
