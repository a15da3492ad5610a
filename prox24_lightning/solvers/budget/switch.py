"""Weights that are switched between two sets of values, to measure the model with any mix of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class SwitchedWeights:
    """Weights that hold one of two values each, kept on the CPU.

    Args:
        parameters: by name; they hold the values of ``first`` now.
        first, second: values by the same names.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], first: Mapping[str, Tensor], second: Mapping[str, Tensor]
    ) -> None:
        self._parameters = dict(parameters)
        self._first, self._second = first, second
        self._now: set[str] = set()

    @torch.no_grad()
    def take_second(self, names: Iterable[str]) -> None:
        """Put the second values into the weights of ``names``, and the first into all others."""
        names = set(names)
        for name in names ^ self._now:
            self._parameters[name].copy_((self._second if name in names else self._first)[name])
        self._now = names
