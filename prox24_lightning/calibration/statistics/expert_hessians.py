"""The Hessian of each expert's inputs, where the matrices of all experts are one 3-D parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.calibration.statistics.hessian import HessianAccumulator


class ExpertHessians:
    """A :class:`~prox24_lightning.calibration.statistics.hessian.HessianAccumulator` for each of some experts.

    Args:
        experts: their numbers; the inputs of others are left out.

    Attributes:
        by_expert: number -> its accumulator.
    """

    def __init__(self, experts: Iterable[int]) -> None:
        self.by_expert = {expert: HessianAccumulator() for expert in experts}

    @property
    def tokens(self) -> int:
        """How many tokens have been counted, of all experts together."""
        return sum(hessian.tokens for hessian in self.by_expert.values())

    def add(self, inputs: Mapping[int, Tensor]) -> None:
        """Count a batch: expert -> (tokens, in_features), any floating dtype."""
        for expert, rows in inputs.items():
            if expert in self.by_expert:
                self.by_expert[expert].add(rows)

    def all_reduce(self, columns: int, device: torch.device) -> None:
        """Add up the sums of all ranks; see :meth:`HessianAccumulator.all_reduce`."""
        for hessian in self.by_expert.values():
            hessian.all_reduce(columns, device)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of this rank, on the CPU."""
        return {str(expert): hessian.state_dict() for expert, hessian in self.by_expert.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Take over the sums that :meth:`state_dict` gave on one or more ranks."""
        for expert, hessian in self.by_expert.items():
            hessian.load_state_dict([state[str(expert)] for state in states], device)
