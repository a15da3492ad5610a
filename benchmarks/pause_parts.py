"""Where the time of a pause goes in which a block is solved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

_PROGRESSIVE = "prox24_lightning.sparsify.strategies.progressive"
PARTS = {
    "values kept for an undo": (f"{_PROGRESSIVE}.undo", "SavedValues"),
    "trial of cut batches": (f"{_PROGRESSIVE}.rerun_calibration", "find_cutter"),
    "reruns up to the block": (f"{_PROGRESSIVE}.rerun_calibration", "BlockReruns"),
    "orders of inputs": (f"{_PROGRESSIVE}.rerun_calibration", "choose_orders"),
    "block of the dense reference": (f"{_PROGRESSIVE}.solve_block", "run_dense_block"),
    "outputs of the block": (f"{_PROGRESSIVE}.solve_block", "_targets"),
    "order of the layers": (f"{_PROGRESSIVE}.solve_block", "find_input_groups"),
    "Hessians": (f"{_PROGRESSIVE}.solve_block", "input_group_hessian"),
    "solution": (f"{_PROGRESSIVE}.solve_block", "solve_input_group"),
    "of it target": ("prox24_lightning.solvers.input_group", "output_target"),
    "of it ADMM": ("prox24_lightning.solvers.layer", "admm"),
    "of it masked CG": ("prox24_lightning.solvers.layer", "masked_cg"),
    "of it exchange": ("prox24_lightning.solvers.parallel", "exchanged"),
    "reconstruction": (f"{_PROGRESSIVE}.solve_block", "reconstruct"),
}
"""What is timed -> module and name of the function; "of it" belongs to the one before."""


class PauseParts:
    """Seconds of every part; the device is waited for before and after each.

    Attributes:
        seconds: by part, since the last :meth:`taken`.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def taken(self) -> dict[str, float]:
        """Return the seconds so far, and begin anew."""
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time the parts in this context."""
        with ExitStack() as stack:
            for part, (module, name) in PARTS.items():
                function = getattr(import_module(module), name)
                stack.enter_context(patch(f"{module}.{name}", self._timing(part, function)))
            yield

    def _timing(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            _wait()
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _wait()
                self.seconds[part] += time.perf_counter() - begin

        return timing


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
