"""Give parameters the values back that they had before an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prox24_lightning.weights.sharded import local_part


class SavedValues:
    """The values of parameters, kept on the CPU."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._values = {parameter: local_part(parameter).to("cpu", copy=True) for parameter in parameters}

    @torch.no_grad()
    def restore(self, parameters: Collection[Tensor] | None = None) -> None:
        """Write the values back, into those of ``parameters`` that were saved; None: into all."""
        for parameter, values in self._values.items():
            if parameters is None or parameter in parameters:
                local_part(parameter).copy_(values)


@contextmanager
def undone_on_error(parameters: Iterable[Tensor]) -> Iterator[SavedValues]:
    """Give parameters their values back when an error or an interrupt leaves the context."""
    saved = SavedValues(parameters)
    try:
        yield saved
    except BaseException:
        saved.restore()
        raise
