"""The states of the random number generators that a forward pass may draw from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """States of torch's generators (CPU and one device), Python's and NumPy's.

    Attributes:
        cpu: of torch's CPU generator.
        device: of torch's generator on an accelerator; None on a CPU.
        python: of the module ``random``.
        numpy: of ``numpy.random``.
    """

    cpu: Tensor
    device: Tensor | None
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Return the present states."""
        return cls(
            torch.get_rng_state(),
            torch.get_device_module(device).get_rng_state(device) if _draws_itself(device) else None,
            random.getstate(),
            np.random.get_state(),
        )

    def restore(self, device: torch.device) -> None:
        """Make these the present states."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing has been drawn between the two."""
        mine, theirs = self.state_dict(), other.state_dict()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only."""
        _, words, spare = self.python
        name, keys, place, has_spare, gauss = self.numpy
        if name != "MT19937":
            raise ValueError(f"the state of NumPy's bit generator {name!r} cannot be saved; use the default, MT19937")
        state = {
            "cpu": self.cpu,
            "python": torch.tensor(words, dtype=torch.int64),
            "numpy": torch.tensor([*map(int, keys), place, has_spare], dtype=torch.int64),
            "spares": torch.tensor([spare is not None, spare or 0.0, gauss], dtype=torch.float64),
        }
        return state if self.device is None else {**state, "device": self.device}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> RandomState:
        """Undo :meth:`state_dict`."""
        *keys, place, has_spare = state["numpy"].tolist()
        has_spare_gauss, spare, gauss = state["spares"].tolist()
        return cls(
            state["cpu"].cpu(),
            state["device"].cpu() if "device" in state else None,
            (random.getstate()[0], tuple(state["python"].tolist()), spare if has_spare_gauss else None),
            ("MT19937", np.array(keys, dtype=np.uint32), place, has_spare, gauss),
        )


def _draws_itself(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta") and hasattr(torch.get_device_module(device), "get_rng_state")
