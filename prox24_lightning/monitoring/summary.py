"""The closing table of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from prox24_lightning.monitoring.statistics import SparsityStats
from prox24_lightning.utils.names import common_start, numbers_as_wildcards, shorten_all

MAX_ROWS = 48
"""With more layers, those whose names differ in numbers only share a row."""
MAX_NAMED = 8
_OTHERS, _COUNT = 52, 12
"""Characters of a row beside the name: shape, groups and three shares; and how many layers share the row."""


def summary_table(
    layers: Mapping[str, SparsityStats], shapes: Mapping[str, tuple[int, ...]], title: str, width: int = 80
) -> Table:
    """Return one row a layer: name, shape, groups, 2:4 fraction, retained squared norm, zeros; yellow where not 2:4.

    The table is ``width`` characters wide at most: names are cut in the middle.
    """
    rows = _rows(layers, shapes)
    names = [name.removesuffix(".weight") for name, _ in rows]
    start = common_start(names)
    title += f"\nnames begin with {start}" if start else ""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for column, justify in (("weight", "left"), ("shape", "left"), ("groups", "right"), ("2:4", "right")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for column in ("retained\nnorm²", "zeros"):
        table.add_column(column, justify="right", no_wrap=True)
    room = width - _OTHERS - (_COUNT if len(rows) < len(layers) else 0)
    short = shorten_all((name.removeprefix(start) for name in names), max(16, room))
    for shown, (name, members) in zip(names, rows.items(), strict=True):
        groups = sum(layer.groups for layer in members)
        fraction = sum(layer.groups_24 * layer.groups for layer in members) / groups
        zeros = sum(layer.sparsity * layer.groups for layer in members) / groups
        done = all(layer.groups_24 == 1 for layer in members)
        table.add_row(
            short[shown.removeprefix(start)] + (f" ({len(members)} layers)" if len(members) > 1 else ""),
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


def print_summary(
    layers: Mapping[str, SparsityStats],
    shapes: Mapping[str, tuple[int, ...]],
    title: str,
) -> None:
    """Print :func:`summary_table` and, where it applies, :func:`dense_warning`; arguments as there."""
    console = Console()
    console.print(summary_table(layers, shapes, title, console.width))
    if (warning := dense_warning(layers)) is not None:
        console.print(warning, style="bold yellow", highlight=False, markup=False)


def print_next(checkpoint: str | Path) -> None:
    """Print the command that goes on from a run's last checkpoint, a file or a folder."""
    Console().print(f"next: prox24 doctor {checkpoint}", highlight=False, markup=False, soft_wrap=True)


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
