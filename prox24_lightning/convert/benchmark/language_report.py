"""Measurements of a language model, dense and converted, as plain data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from prox24_lightning.convert.benchmark.generation_report import Generation
from prox24_lightning.convert.measurement import Timing

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Workload:
    """A phase of generation with its sizes.

    Attributes:
        phase: "prefill" reads ``length`` tokens of each sequence at once; "decode" makes one more token for each, with
            the keys and values of ``length`` tokens in the cache.
        batch: number of sequences.
        length: tokens of each.
    """

    phase: Phase
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.batch * (self.length if self.phase == "prefill" else 1)

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.length}"


@dataclass(frozen=True)
class PhaseResult:
    """One workload on one variant of the model.

    Attributes:
        workload: the phase and its sizes.
        eager: time of a plain call.
        graph: time of the call replayed from a CUDA graph; None if it cannot be captured, for ``graph_problem``.
        peak_bytes: peak GPU memory, weights included.
        bytes_moved: the fewest bytes that a call reads: weights of linear layers as stored, and the key-value cache.
        operations: multiplications and additions of the linear layers, as if all were dense.
    """

    workload: Workload
    eager: Timing
    graph: Timing | None
    graph_problem: str | None
    peak_bytes: int
    bytes_moved: int
    operations: int

    @property
    def best(self) -> Timing:
        """The shorter of the two times."""
        return self.eager if self.graph is None else min(self.eager, self.graph, key=lambda timing: timing.median_us)

    def timing(self, mode: str) -> Timing | None:
        return self.eager if mode == "eager" else self.graph

    def tokens_per_second(self, mode: str) -> float | None:
        timing = self.timing(mode)
        return None if timing is None else 1e6 * self.workload.tokens / timing.median_us


@dataclass(frozen=True)
class LanguageVariant:
    """A language model with none or some of its layers sparse.

    Attributes:
        name: "dense" or "converted".
        sparse_layers: number of sparse layers.
        linear_bytes: bytes of the weights of all linear layers.
        sparse_bytes: bytes, in this variant, of the layers that are sparse in the converted model.
        phases: one result a workload.
        output_error: error of its logits, relative to the dense ones.
        perplexity: on the given text; None without one.
    """

    name: str
    sparse_layers: int
    linear_bytes: int
    sparse_bytes: int
    phases: tuple[PhaseResult, ...]
    output_error: float
    perplexity: float | None


@dataclass(frozen=True)
class LanguageReport:
    """Dense against converted.

    ``conversion_peak_bytes`` is the peak memory of the conversion, model included; ``timed_in_turn`` is False if dense
    and converted layers did not fit into memory together, and were timed one after the other. ``generation`` holds
    whole calls of ``generate``.
    """

    dense_bytes: int
    largest_layer_bytes: int
    conversion_peak_bytes: int
    conversion_seconds: float
    text: str | None
    variants: tuple[LanguageVariant, ...]
    timed_in_turn: bool = True
    generation: tuple[Generation, ...] = ()

    def speedups(self, mode: str) -> dict[Workload, float]:
        """Return dense time over converted time of each workload."""
        if len(self.variants) < 2:
            return {}
        dense, converted = self.variants
        pairs = [
            (was.workload, was.timing(mode), now.timing(mode))
            for was, now in zip(dense.phases, converted.phases, strict=True)
        ]
        return {workload: a.median_us / b.median_us for workload, a, b in pairs if a is not None and b is not None}

    def scalars(self) -> dict[str, float]:
        """Return figures for loggers, with keys under ``convert/``."""
        values: dict[str, float] = {}
        for mode in ("eager", "graph"):
            for workload, speedup in self.speedups(mode).items():
                label = f"{workload.phase}_{workload.batch}x{workload.length}"
                values[f"convert/{mode}_{label}_speedup"] = speedup
        for variant in self.variants:
            for result in variant.phases:
                label = f"{result.workload.phase}_{result.workload.batch}x{result.workload.length}"
                values[f"convert/{label}_tokens_per_second_{variant.name}"] = (
                    1e6 * result.workload.tokens / result.best.median_us
                )
            values[f"convert/linear_bytes_{variant.name}"] = float(variant.linear_bytes)
            values[f"convert/logits_error_{variant.name}"] = variant.output_error
            if variant.perplexity is not None:
                values[f"convert/perplexity_{variant.name}"] = variant.perplexity
        for row in self.generation:
            if row.speedup is not None:
                host = re.sub(r"\W+", "_", row.host).lower()
                values[f"convert/generate_{host}_{row.batch}x{row.new}_speedup"] = row.speedup
        return values
