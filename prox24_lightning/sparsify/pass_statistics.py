"""Statistics of weights from the very pass that changes them, so that to monitor a run costs no pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from prox24_lightning.prox.statistics import ProxStatistics


@dataclass(frozen=True)
class _Measured:
    statistics: ProxStatistics
    scale: Tensor | None
    version: int


class PassStatistics:
    """Collect the statistics that the prox computes of its results.

    Attributes:
        wanted: whether the next optimizer step collects them.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._measured: dict[str, _Measured] = {}
        self._codes: dict[tuple[str, bool], Tensor] = {}

    def previous_codes(self, names: Sequence[str], scales: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the mask codes that the prox counts flips from: those it recorded last, with or without a scale."""
        return [self._codes.get((name, scale is None)) for name, scale in zip(names, scales, strict=True)]

    def record(self, name: str, values: Tensor, scale: Tensor | None, statistics: ProxStatistics) -> None:
        """Keep the statistics of ``values`` as they are now, in the metric of ``scale``."""
        self._measured[name] = _Measured(statistics, scale, values._version)
        self._codes[name, scale is None] = statistics.code

    def current(self, name: str, values: Tensor, scale: Tensor | None) -> ProxStatistics | None:
        """Return the statistics of ``values`` in the metric of ``scale``.

        None if there are none, or something has written to the weight since.
        """
        found = self._measured.get(name)
        if found is None or found.version != values._version or found.scale is not scale:
            return None
        return found.statistics

    def forget(self) -> None:
        """Drop the statistics: the weights change. What flips are counted from stays."""
        self._measured.clear()

    def end(self) -> None:
        """Drop everything: the prox has changed these weights for the last time."""
        self.forget()
        self._codes.clear()
