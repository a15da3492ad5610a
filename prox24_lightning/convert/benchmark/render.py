"""Render a conversion report: Markdown for files and TensorBoard, rich tables for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from prox24_lightning.convert.benchmark.chip_limits import Limits
from prox24_lightning.convert.benchmark.recommend import compare_forms, form_us
from prox24_lightning.convert.benchmark.render_language import language_sections
from prox24_lightning.convert.benchmark.report import Pair, Report
from prox24_lightning.convert.eligibility import State
from prox24_lightning.convert.sections import Section, grouped, markdown_lines, print_tables
from prox24_lightning.utils.files import write_text

STATES: dict[State, str] = {"sparse": "sparse", "fits": "would be sparse on a GPU", "dense": "dense"}


def sections(report: Report) -> list[Section]:
    """Return the report as tables of text, the same for Markdown and the terminal."""
    tables: list[Section] = [("Layers", ("layers", "kind", "(out, in)", "state", "why"), _layer_rows(report))]
    if report.shapes:
        header = (
            "(out, in)",
            "layers",
            "tokens",
            "dense eager",
            "sparse eager",
            "x",
            "dense graph",
            "sparse graph",
            "x",
        )
        tables.append(("Per layer, microseconds a call", (*header, "error", "kernel"), _shape_rows(report)))
        tables.append(_forms_section(report))
    if report.model:
        columns = ("variant", "sparse layers", "eager", "x", "graph", "x", "peak MiB", "error")
        scope = f" ({report.model_scope})" if report.model_scope else ""
        tables.append((f"Whole model{scope}, microseconds a call", columns, _model_rows(report)))
    if report.limits is not None and report.shapes:
        limits = report.limits
        tables.append((_limits_title(limits), ("(out, in)", "tokens", "dense", "sparse"), _share_rows(report, limits)))
    if report.language is not None:
        tables += language_sections(report.language, report.limits)
    return tables


def _forms_section(report: Report) -> Section:
    """Return the times of every form of the weights side by side: dense float8 has a column of its own."""
    forms = compare_forms(report.shapes, report.weights)
    names = [form.name for form in forms]
    rows: list[tuple[str, ...]] = []
    for shape in report.shapes:
        for result in shape.tokens:
            us = form_us(result, report.weights)
            cells = (_measured(us[name], "{:.1f}") for name in names)
            rows.append((shape.title, str(len(shape.layers)), str(result.tokens), *cells))
    rows.append(("all, x dense", "", "", *(_measured(form.speedup, "{:.2f}") for form in forms)))
    rows.append(("largest error", "", "", *(f"{form.error:.1e}" for form in forms)))
    return "Forms of the weights, microseconds a call", ("(out, in)", "layers", "tokens", *names), rows


def _measured(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


def _limits_title(limits: Limits) -> str:
    return (
        f"Per layer, share of what the chip can do ({limits.bytes_per_second / 1e12:.2f} TB/s, dense "
        f"{limits.operations_per_second / 1e12:.0f} TFLOP/s, both measured)"
    )


def _share_rows(report: Report, limits: Limits) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for shape in report.shapes:
        for result in shape.tokens:
            shares = shape.limit_shares(result, limits, 2)
            rows.append((shape.title, str(result.tokens), *(f"{share:.0%}" for share in shares)))
    return rows


def _layer_rows(report: Report) -> list[tuple[str, ...]]:
    """Return the rows of layers; those that differ only in their names share a row."""
    return grouped([(x.name, (x.kind, str(x.shape), STATES[x.state], x.why)) for x in report.layers])


def _shape_rows(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for shape in report.shapes:
        about = (shape.title, str(len(shape.layers)))
        for result in shape.tokens:
            rows.append(
                (
                    *about,
                    str(result.tokens),
                    *_pair(result.eager),
                    *(_pair(result.graph) if result.graph else ("-", "-", "-")),
                    f"{result.output_error:.1e}",
                    result.kernel,
                )
            )
        if not shape.tokens:
            rows.append((*about, *("-",) * 9))
    return rows


def _pair(pair: Pair) -> tuple[str, str, str]:
    return f"{pair.dense.median_us:.1f}", f"{pair.sparse.median_us:.1f}", f"{pair.speedup:.2f}"


def _model_rows(report: Report) -> list[tuple[str, ...]]:
    rows = []
    dense = report.model[0]
    for variant in report.model:
        cells = [variant.name, str(variant.sparse_layers)]
        for mode in ("eager", "graph"):
            now, before = variant.median_us(mode), dense.median_us(mode)
            cells.append("-" if now is None else f"{now:.1f}")
            cells.append("-" if now is None or before is None else f"{before / now:.2f}")
        rows.append((*cells, f"{variant.peak_bytes / 2**20:.1f}", f"{variant.output_error:.1e}"))
    return rows


def to_markdown(report: Report) -> str:
    """Return the whole report, with the machine, as a Markdown page."""
    lines = ["# Dense against 2:4 semi-structured", ""]
    lines += [", ".join(f"{key} {value}" for key, value in report.machine.items()), ""]
    condition = "is as fast or faster" if report.only_if_faster else "can run sparse (only_if_faster=False)"
    counts = ", ".join(map(str, report.token_counts))
    lines += [
        f"{report.created}; {report.dtype}; a layer becomes sparse where it {condition} in {report.run_mode} mode at "
        f"{counts} tokens. x: time of dense over time of sparse, above 1 sparse is faster.",
        "",
    ]
    if report.error:
        lines += [f"**Failed:** {report.error}", ""]
    lines += markdown_lines(sections(report))
    lines += [f"- {note}" for note in report.notes]
    if report.recommendation:
        lines += ["", f"**{report.recommendation}**"]
    return "\n".join(lines).rstrip() + "\n"


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report's tables and notes."""
    console = console or Console()
    if report.error:
        console.print(f"conversion and benchmark failed: {report.error}", style="red", markup=False)
    print_tables(sections(report), [*report.notes, *filter(None, [report.recommendation])], console)


def write_report(report: Report, folder: Path, filename: str) -> tuple[Path, Path]:
    """Write ``filename.json`` and ``filename.md`` into ``folder``; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{filename}.json", folder / f"{filename}.md"
    for path, text in zip(paths, (report.to_json(), to_markdown(report)), strict=True):
        write_text(path, text)
    return paths
