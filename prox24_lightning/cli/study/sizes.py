"""How much each part of the study computes."""

from __future__ import annotations

from dataclasses import dataclass

from prox24_lightning.weights.groups import Geometry


@dataclass(frozen=True)
class Size:
    """Arguments of the functions of :mod:`prox24_lightning.study`, under their names there."""

    resolution: int
    weight: int
    correlations: tuple[float, ...]
    inputs: dict[Geometry, tuple[int, ...]]
    layers: int
    rows: int
    strengths: tuple[float, ...]
    splitting: tuple[float, ...]
    starts: int
    searched: int
    steps: tuple[int, ...]
    base: int
    sequences: int


SIZES = {
    "full": Size(
        resolution=300,
        weight=512,
        correlations=(0.0, 0.3, 0.6, 0.9, 0.97),
        inputs={"row": (8, 12, 16), "block": (8, 12)},
        layers=2,
        rows=64,
        strengths=tuple(0.02 * 1.35**i for i in range(21)),
        splitting=(0.05, 0.1, 0.2, 0.5, 1.0),
        starts=8,
        searched=16,
        steps=(25, 50, 100, 200, 400),
        base=100,
        sequences=48,
    ),
    "tiny": Size(
        resolution=60,
        weight=64,
        correlations=(0.9,),
        inputs={"row": (8,), "block": (4,)},
        layers=1,
        rows=8,
        strengths=(0.1, 1.0, 10.0),
        splitting=(0.3,),
        starts=1,
        searched=1,
        steps=(5,),
        base=5,
        sequences=8,
    ),
}
