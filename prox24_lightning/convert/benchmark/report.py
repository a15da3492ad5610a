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
from prox24_lightning.weights.rounding import RoundedForm

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
    """One layer at one number of tokens.

    Attributes:
        tokens: rows of its input.
        eager, graph: times; ``graph`` is None where the call could not be captured, for ``graph_problem``.
        output_error: ||sparse - dense|| / ||dense||.
        kernel: what ran.
        fp8_eager, fp8_graph: times of the layer dense in float8, None where they were not measured.
        fp8_error: error of its output.
        packed_16_us: of a layer of 8 bits: microseconds of the same layer packed in 16 bits, from a CUDA graph.
    """

    tokens: int
    eager: Pair
    graph: Pair | None
    graph_problem: str | None
    output_error: float
    kernel: str = ""
    fp8_eager: Timing | None = None
    fp8_graph: Timing | None = None
    fp8_error: float | None = None
    packed_16_us: float | None = None

    @property
    def best(self) -> Pair:
        """The times from a CUDA graph if it could be captured, without the host's time; else the eager ones."""
        return self.eager if self.graph is None else self.graph

    def speedup(self, mode: RunMode) -> float | None:
        pair = self.eager if mode == "eager" else self.graph
        return None if pair is None else pair.speedup

    def speedup_over_fp8(self, mode: RunMode) -> float | None:
        """Return the time dense in float8 over the sparse one."""
        pair, fp8 = (self.eager, self.fp8_eager) if mode == "eager" else (self.graph, self.fp8_graph)
        return None if pair is None or fp8 is None else fp8.median_us / pair.sparse.median_us

    def fp8_speedup(self, mode: RunMode) -> float | None:
        """Return the dense time over that of dense in float8."""
        pair, fp8 = (self.eager, self.fp8_eager) if mode == "eager" else (self.graph, self.fp8_graph)
        return None if pair is None or fp8 is None else pair.dense.median_us / fp8.median_us


@dataclass(frozen=True)
class ShapeResult:
    """Layers of one shape, timed on the first of them: time depends on the shape, not on the values.

    ``sparse``: they become sparse; ``dense_fp8``: they stay dense, in float8. ``joined`` names the layers that decoding
    runs as one product of this shape, and which are timed as one; ``layers`` holds them block after block.
    """

    shape: tuple[int, ...]
    bias: bool
    layers: tuple[str, ...]
    dense_bytes: int
    packed_bytes: int
    tokens: tuple[TokenResult, ...]
    sparse: bool
    decision: str
    dense_fp8: bool = False
    joined: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The shape, and of which layers if they are joined."""
        return f"{self.shape} as one: {' + '.join(self.joined)}" if self.joined else str(self.shape)

    @property
    def products(self) -> int:
        """How many products of this shape the model makes for a call."""
        return len(self.layers) // (len(self.joined) or 1)

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
    weights: RoundedForm | None = None
    max_error: float = 0.0
    recommendation: str | None = None

    def names(self, state: State) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if layer.state == state)

    @property
    def dense_fp8_names(self) -> tuple[str, ...]:
        """The layers that stay dense, in float8."""
        return tuple(name for shape in self.shapes if shape.dense_fp8 for name in shape.layers)

    def with_note(self, note: str) -> Report:
        return replace(self, notes=(*self.notes, note))

    def scalars(self) -> dict[str, float]:
        """Return a few figures for loggers, with keys under ``convert/``."""
        values = {f"convert/layers_{state}": float(len(self.names(state))) for state in ("sparse", "fits", "dense")}
        values["convert/failed"] = float(self.error is not None)
        for mode in ("eager", "graph"):
            for tokens in self.token_counts:
                found = [
                    (math.log(speedup), shape.products)
                    for shape in self.shapes
                    for result in shape.tokens
                    if result.tokens == tokens and (speedup := result.speedup(mode)) is not None
                ]
                over_fp8 = [
                    (math.log(speedup), shape.products)
                    for shape in self.shapes
                    for result in shape.tokens
                    if result.tokens == tokens and (speedup := result.speedup_over_fp8(mode)) is not None
                ]
                for logs, name in ((found, "speedup"), (over_fp8, "speedup_over_fp8")):
                    if logs:
                        mean = sum(log * layers for log, layers in logs) / sum(layers for _, layers in logs)
                        values[f"convert/{mode}_layer_{name}_{tokens}_tokens"] = math.exp(mean)
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
                    (shape.limit_shares(result, self.limits, 2), shape.products)
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
