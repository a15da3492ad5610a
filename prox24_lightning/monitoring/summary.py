"""The closing table of a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from prox24_lightning.monitoring.statistics import SparsityStats
from prox24_lightning.utils.names import numbers_as_wildcards

MAX_ROWS = 48
"""With more layers, those whose names differ in numbers only share a row."""
MAX_NAMED = 8


def summary_table(layers: Mapping[str, SparsityStats], shapes: Mapping[str, tuple[int, ...]], title: str) -> Table:
    """Return one row a layer: name, shape, groups, 2:4 fraction, retained squared norm, zeros; yellow where not 2:4."""
    table = Table(title=title, title_justify="left")
    for column, justify in (("weight", "left"), ("shape", "left"), ("groups", "right"), ("2:4", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for column in ("retained norm²", "zeros"):
        table.add_column(column, justify="right")
    for name, members in _rows(layers, shapes).items():
        groups = sum(layer.groups for layer in members)
        fraction = sum(layer.groups_24 * layer.groups for layer in members) / groups
        zeros = sum(layer.sparsity * layer.groups for layer in members) / groups
        done = all(layer.groups_24 == 1 for layer in members)
        table.add_row(
            name[0].removesuffix(".weight") + (f" ({len(members)} layers)" if len(members) > 1 else ""),
            " x ".join(map(str, name[1])),
            f"{groups:,}",
            percent(1.0 if done else fraction),
            percent(min(layer.retained_squared_norm for layer in members)),
            percent(zeros),
            style="green" if done else "yellow",
        )
    return table


def dense_warning(layers: Mapping[str, SparsityStats]) -> str | None:
    """Return one line that names the layers that are not 2:4, the densest first; None if all are."""
    dense = sorted((layer.groups_24, name) for name, layer in layers.items() if layer.groups_24 != 1)
    if not dense:
        return None
    named = ", ".join(f"{name} ({percent(fraction)})" for fraction, name in dense[:MAX_NAMED])
    more = f" and {len(dense) - MAX_NAMED} more" if len(dense) > MAX_NAMED else ""
    return f"{len(dense)} of {len(layers)} weights are not 2:4: {named}{more}"


def print_summary(layers: Mapping[str, SparsityStats], shapes: Mapping[str, tuple[int, ...]], title: str) -> None:
    """Print :func:`summary_table` and, where it applies, :func:`dense_warning`."""
    console = Console()
    console.print(summary_table(layers, shapes, title))
    if (warning := dense_warning(layers)) is not None:
        console.print(warning, style="bold yellow", highlight=False, markup=False)


def _rows(
    layers: Mapping[str, SparsityStats], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, tuple[int, ...]], list[SparsityStats]]:
    rows: dict[tuple[str, tuple[int, ...]], list[SparsityStats]] = {}
    for name, layer in layers.items():
        shown = numbers_as_wildcards(name) if len(layers) > MAX_ROWS else name
        rows.setdefault((shown, shapes[name]), []).append(layer)
    return rows


def percent(share: float) -> str:
    """Return a percentage, which reads 100 % only where the share is exactly one."""
    if share == 1:
        return "100 %"
    return f"{min(100 * share, 99.99):.2f} %"
