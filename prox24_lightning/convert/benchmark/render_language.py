"""Render the measurements of a language model as tables of text and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prox24_lightning.convert.benchmark.chip_limits import Limits
from prox24_lightning.convert.benchmark.generation_report import generation_section
from prox24_lightning.convert.benchmark.language_report import LanguageReport, PhaseResult
from prox24_lightning.convert.sections import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE_COLOR, SPARSE_COLOR = "#6b7785", "#1f6fb4"


def language_sections(report: LanguageReport, limits: Limits | None) -> list[Section]:
    """Return tables: time, whole calls of generate() if any were timed, use of the chip, and memory with quality."""
    return [
        (
            "Language model, milliseconds a call"
            + ("" if report.timed_in_turn else " (one after the other: both did not fit into memory together)"),
            (
                "phase",
                "batch x length",
                "mode",
                "dense ms",
                "converted ms",
                "x",
                "dense tokens/s",
                "converted tokens/s",
            ),
            _time_rows(report),
        ),
        *([generation_section(report.generation)] if report.generation else []),
        (
            "Language model, use of the chip",
            ("phase", "batch x length", "variant", "TB/s", "of limit", "TFLOP/s", "of dense limit"),
            [row for variant in report.variants for row in _use_rows(variant.name, variant.phases, limits)],
        ),
        (
            "Language model, memory and quality",
            (
                "variant",
                "sparse layers",
                "weights of linear layers, MiB",
                "of those, sparse ones",
                "peak MiB",
                "logits error",
                f"perplexity ({report.text})" if report.text else "perplexity",
            ),
            _memory_rows(report),
        ),
    ]


def _time_rows(report: LanguageReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for mode in ("eager", "graph"):
        for workload, speedup in report.speedups(mode).items():
            pair = [
                next(result for result in variant.phases if result.workload == workload) for variant in report.variants
            ]
            times = [timing.median_us / 1000 for result in pair if (timing := result.timing(mode)) is not None]
            rates = [rate for result in pair if (rate := result.tokens_per_second(mode)) is not None]
            sizes = f"{workload.batch} x {workload.length}"
            rows.append(
                (
                    workload.phase,
                    sizes,
                    mode,
                    *(f"{time:.3f}" for time in times),
                    f"{speedup:.2f}",
                    *(f"{rate:,.0f}" for rate in rates),
                )
            )
    return rows


def _use_rows(name: str, phases: tuple[PhaseResult, ...], limits: Limits | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in phases:
        seconds = result.best.median_us / 1e6
        moved, work = result.bytes_moved / seconds, result.operations / seconds
        rows.append(
            (
                result.workload.phase,
                f"{result.workload.batch} x {result.workload.length}",
                name,
                f"{moved / 1e12:.2f}",
                "-" if limits is None else f"{moved / limits.bytes_per_second:.0%}",
                f"{work / 1e12:.1f}",
                "-" if limits is None else f"{work / limits.operations_per_second:.0%}",
            )
        )
    return rows


def _memory_rows(report: LanguageReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for variant in report.variants:
        peak = max(result.peak_bytes for result in variant.phases)
        rows.append(
            (
                variant.name,
                str(variant.sparse_layers),
                f"{variant.linear_bytes / 2**20:,.1f}",
                f"{variant.sparse_bytes / 2**20:,.1f} ({variant.sparse_bytes / report.variants[0].sparse_bytes:.2f} x)",
                f"{peak / 2**20:,.1f}",
                f"{variant.output_error:.1e}",
                "-" if variant.perplexity is None else f"{variant.perplexity:.4f}",
            )
        )
    converting = f"converting, {report.conversion_seconds:.1f} s"
    rows.insert(1, (converting, "", "", "", f"{report.conversion_peak_bytes / 2**20:,.1f}", "", ""))
    return rows


def language_figure(report: LanguageReport, title: str) -> Figure:
    """Draw tokens a second of every workload, dense beside converted, from a CUDA graph where it could be captured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 2.2 * len(report.variants[0].phases)), 4.2), layout="constrained")
    axes = figure.subplots(1, len(report.variants[0].phases), squeeze=False)[0]
    for column, axis in enumerate(axes):
        results = [variant.phases[column] for variant in report.variants]
        rates = [result.workload.tokens / result.best.median_us * 1e6 for result in results]
        bars = axis.bar(
            [variant.name for variant in report.variants], rates, color=[DENSE_COLOR, SPARSE_COLOR], width=0.6
        )
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=8)
        speedup = results[0].best.median_us / results[-1].best.median_us
        axis.set_title(f"{results[0].workload}: {speedup:.2f} x", fontsize=9)
        axis.set_ylim(0, 1.15 * max(rates))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("tokens a second")
    figure.suptitle(title, fontsize=10)
    return figure
