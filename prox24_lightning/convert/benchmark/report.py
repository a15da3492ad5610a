"""Results of a conversion benchmark as plain data: JSON for programs and a few scalars for loggers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from prox24_lightning.convert.benchmark.chip_limits import Limits
from prox24_lightning.convert.benchmark.language_report import LanguageReport
from prox24_lightning.convert.eligibility import State
from prox24_lightning.convert.measurement import Timing

RunMode = Literal["eager", "graph"]


@dataclass(frozen=True)
class Pair:
    """Dense against sparse, timed alternately; ``speedup`` above 1: sparse is faster."""

    dense: Timing
    sparse: Timing
    speedup: float

    @classmethod
    def of(cls, dense: Timing, sparse: Timing) -> Pair:
        return cls(dense, sparse, dense.median_us / sparse.median_us)


@dataclass(frozen=True)
class TokenResult:
    """One layer at one number of tokens; ``output_error`` is ||sparse - dense|| / ||dense||, ``kernel`` what ran."""

    tokens: int
    eager: Pair
    graph: Pair | None
    graph_problem: str | None
    output_error: float
    kernel: str = ""

    @property
    def best(self) -> Pair:
        """The times from a CUDA graph if it could be captured, without the host's time; else the eager ones."""
        return self.eager if self.graph is None else self.graph

    def speedup(self, mode: RunMode) -> float | None:
        pair = self.eager if mode == "eager" else self.graph
        return None if pair is None else pair.speedup


@dataclass(frozen=True)
class ShapeResult:
    """Layers of one shape, timed on the first of them: time depends on the shape, not on the values."""

    shape: tuple[int, ...]
    bias: bool
    layers: tuple[str, ...]
    dense_bytes: int
    packed_bytes: int
    tokens: tuple[TokenResult, ...]
    sparse: bool
    decision: str

    def limit_shares(self, result: TokenResult, limits: Limits, itemsize: int) -> tuple[float, float]:
        """Return the least possible time over the measured time, dense and sparse.

        The least time of sparse is that of its packed bytes, and of half the operations.
        """
        outputs, inputs = self.shape
        moved = itemsize * result.tokens * (inputs + outputs)
        work = 2.0 * result.tokens * inputs * outputs
        return (
            limits.floor_us(moved + self.dense_bytes, work) / result.best.dense.median_us,
            limits.floor_us(moved + self.packed_bytes, work / 2) / result.best.sparse.median_us,
        )


@dataclass(frozen=True)
class ModelVariant:
    """The whole model with none ("dense"), every possible ("all_sparse"), or the chosen layers sparse ("chosen")."""

    name: str
    sparse_layers: int
    eager: Timing
    graph: Timing | None
    graph_problem: str | None
    peak_bytes: int
    output_error: float

    def median_us(self, mode: RunMode) -> float | None:
        timing = self.eager if mode == "eager" else self.graph
        return None if timing is None else timing.median_us


@dataclass(frozen=True)
class LayerOutcome:
    """``state``: "sparse" (converted), "fits" (would be, on a GPU), "dense" (stays so, see ``why``)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    state: State
    why: str


@dataclass(frozen=True)
class Report:
    """Result of :func:`~prox24_lightning.convert.benchmark.run.run_benchmark`; times in microseconds."""

    created: str
    machine: dict[str, str]
    dtype: str
    run_mode: RunMode
    token_counts: tuple[int, ...]
    only_if_faster: bool
    layers: tuple[LayerOutcome, ...] = ()
    shapes: tuple[ShapeResult, ...] = ()
    model: tuple[ModelVariant, ...] = ()
    model_scope: str = ""
    limits: Limits | None = None
    language: LanguageReport | None = None
    notes: tuple[str, ...] = field(default=())
    error: str | None = None

    def names(self, state: State) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if layer.state == state)

    def with_note(self, note: str) -> Report:
        return replace(self, notes=(*self.notes, note))

    def scalars(self) -> dict[str, float]:
        """Return a few figures for loggers, with keys under ``convert/``."""
        values = {f"convert/layers_{state}": float(len(self.names(state))) for state in ("sparse", "fits", "dense")}
        values["convert/failed"] = float(self.error is not None)
        for mode in ("eager", "graph"):
            for tokens in self.token_counts:
                found = [
                    (math.log(speedup), len(shape.layers))
                    for shape in self.shapes
                    for result in shape.tokens
                    if result.tokens == tokens and (speedup := result.speedup(mode)) is not None
                ]
                if found:
                    mean = sum(log * layers for log, layers in found) / sum(layers for _, layers in found)
                    values[f"convert/{mode}_layer_speedup_{tokens}_tokens"] = math.exp(mean)
            for variant in self.model[1:]:
                dense, sparse = self.model[0].median_us(mode), variant.median_us(mode)
                if dense is not None and sparse is not None:
                    values[f"convert/{mode}_model_speedup_{variant.name}"] = dense / sparse
        for variant in self.model[1:]:
            values[f"convert/model_output_error_{variant.name}"] = variant.output_error
            values[f"convert/model_peak_memory_{variant.name}"] = variant.peak_bytes / self.model[0].peak_bytes
        if self.limits is not None:
            values["convert/limit_bytes_per_second"] = self.limits.bytes_per_second
            values["convert/limit_operations_per_second"] = self.limits.operations_per_second
            for tokens in self.token_counts:
                shares = [
                    (shape.limit_shares(result, self.limits, 2), len(shape.layers))
                    for shape in self.shapes
                    for result in shape.tokens
                    if result.tokens == tokens
                ]
                for column, name in enumerate(("dense", "sparse") if shares else ()):
                    mean = sum(pair[column] * layers for pair, layers in shares) / sum(layers for _, layers in shares)
                    values[f"convert/limit_share_{name}_{tokens}_tokens"] = mean
        return values | (self.language.scalars() if self.language is not None else {})

    def to_json(self) -> str:
        """Return everything, with the scalars, as strict JSON."""
        return json.dumps(_finite({**asdict(self), "scalars": self.scalars()}), indent=2) + "\n"


def _finite(value: Any) -> Any:
    """Return a value for strict JSON, which has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
