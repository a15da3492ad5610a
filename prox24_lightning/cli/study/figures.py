"""The figures of the study: tables in, ``matplotlib.figure.Figure`` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from prox24_lightning.study.failures import Failure
from prox24_lightning.study.plane import Path, Plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7eb"
COLORS = ("#1f6fb4", "#d9730d", "#2e8b57", "#b3261e", "#7a5195", "#6b7785", "#17a2b8", "#c49a00")
KEPT_COLORS = ("#2b7bba", "#9cc7e6", "#f2b179")
"""Two, three and four entries kept."""
METHOD_COLORS = {
    "prox": COLORS[0],
    "prox_gradient": COLORS[4],
    "sparsegpt": COLORS[1],
    "wanda": COLORS[2],
    "magnitude": COLORS[5],
}

Row = dict[str, Any]


def plane_figure(planes: Sequence[Plane], paths: Sequence[Path]) -> Figure:
    """Maps of how many entries the minimiser keeps with its jumps in black; paths of four weights below."""
    figure, axes = _panels(2, max(len(planes), len(paths)))
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    for axis, plane in zip(axes[0], planes, strict=False):
        extent = (0.0, float(plane.axis[-1]), 0.0, float(plane.axis[-1]))
        axis.imshow(plane.kept.numpy(), origin="lower", extent=extent, cmap=ListedColormap(KEPT_COLORS), vmin=2, vmax=4)
        shown = torch.where(plane.jump, 1.0, torch.nan).numpy()
        axis.imshow(shown, origin="lower", extent=extent, cmap=ListedColormap(["black"]), interpolation="nearest")
        axis.set(xlabel="y1", ylabel="y2", title=f"prox of (y1, y2, {plane.third:g}, {plane.fourth:g}), strength 1")
    names = ("2 kept (2:4)", "3 kept", "4 kept", "jump")
    handles = [Patch(color=color, label=name) for color, name in zip((*KEPT_COLORS, "black"), names, strict=True)]
    axes[0][0].legend(handles=handles, loc="upper right", fontsize=8)
    for axis, path in zip(axes[1], paths, strict=False):
        for entry in range(4):
            axis.plot(
                path.strengths.numpy(),
                path.values[:, entry].numpy(),
                color=COLORS[entry],
                label=f"y = {path.group[entry]:g}",
            )
        axis.axvline(path.critical, color=MUTED, linewidth=0.8, linestyle=":")
        axis.set(xlabel="strength", ylabel="entry of the minimiser", title=f"2:4 from strength {path.critical:.3f} on")
        axis.legend(fontsize=8)
    return figure


def gaps_figure(table: Sequence[Row]) -> Figure:
    """Gap to the best mask against correlation, mean over sizes: one panel a geometry; dashed without refinement."""
    geometries = list(dict.fromkeys(row["geometry"] for row in table))
    figure, axes = _panels(1, len(geometries))
    for axis, geometry in zip(axes[0], geometries, strict=True):
        for method, color in METHOD_COLORS.items():
            for column, style in (("gap_refined", "-"), ("gap", "--")):
                points: dict[float, list[float]] = {}
                for row in table:
                    if row["geometry"] == geometry and row["method"] == method:
                        points.setdefault(row["correlation"], []).append(row[column])
                mean = [sum(values) / len(values) for values in points.values()]
                label = method if style == "-" else None
                axis.plot(list(points), mean, style, color=color, label=label, marker="o", markersize=3, linewidth=1.2)
        axis.set(yscale="log", xlabel="correlation between inputs", ylabel="loss over that of the best mask, minus 1")
        axis.set_title(f"{geometry}: with masked gradient (dashed: without)")
        axis.legend(fontsize=8)
    return figure


def fractions_figure(shares: Sequence[Row], splitting: Sequence[Row]) -> Figure:
    """Share of 2:4 groups or blocks against strength, a panel a geometry; and the gap of each splitting."""
    figure, axes = _panels(2, 2)
    panels = [axes[0][0], axes[0][1], axes[1][0]]
    for axis, geometry in zip(panels, ("row", "column", "block"), strict=True):
        for number, name in enumerate(dict.fromkeys(row["weight"] for row in shares)):
            rows = [row for row in shares if row["weight"] == name]
            axis.plot(
                [row["strength"] for row in rows],
                [row[geometry] for row in rows],
                color=COLORS[number % len(COLORS)],
                label=name,
                linewidth=1.3,
            )
        what = "blocks" if geometry == "block" else "groups"
        axis.set(xscale="log", xlabel="strength x rms of the weight", ylabel=f"share of {what} that are 2:4")
        axis.set_title(geometry)
    axes[0][0].legend(fontsize=7)
    for number, way in enumerate(dict.fromkeys(row["way"] for row in splitting)):
        rows = [row for row in splitting if row["way"] == way]
        gaps = [max(row["gap"], 1e-9) for row in rows]
        axes[1][1].plot(
            [row["strength"] for row in rows],
            gaps,
            color=COLORS[number % len(COLORS)],
            label=way,
            marker="o",
            markersize=3,
        )
    axes[1][1].set(xscale="log", yscale="log", xlabel="strength x rms", ylabel="objective over the best known, minus 1")
    axes[1][1].set_title("block prox, what each way reaches (1e-9: best)")
    axes[1][1].legend(fontsize=7)
    return figure


def failures_figure(worst: Sequence[Failure]) -> Figure:
    """Losses of all methods on the rows where the prox loses most."""
    figure, axes = _panels(1, len(worst))
    for axis, failure in zip(axes[0], worst, strict=True):
        names = [name for name in failure.losses if name != "prox_long"]
        values = [failure.losses[name] / failure.losses["best"] for name in names]
        axis.bar(names, values, color=[METHOD_COLORS.get(name, MUTED) for name in names])
        for place, name in enumerate(names):
            label = ",".join(map(str, failure.masks[name]))
            axis.annotate(label, (place, values[place]), ha="center", va="bottom", fontsize=7, color=INK)
        axis.set(ylabel="loss over that of the best mask", title=f"worst row against {failure.rival} (entries kept)")
    return figure


def ablations_figure(table: Sequence[Row]) -> Figure:
    """Error of the model's output for every variant, before and after masked gradient."""
    figure, axes = _panels(1, 1, width=9, height=max(3.0, 0.34 * len(table)))
    axis = axes[0][0]
    names = [row["variant"] for row in table]
    places = list(range(len(names)))
    axis.barh(places, [row["output_error"] for row in table], color="#c6dcec", label="without refinement")
    axis.barh(
        places,
        [row["output_error_refined"] for row in table],
        height=0.45,
        color=COLORS[0],
        label="with masked gradient",
    )
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set(xlabel="relative squared error of the model's output on held-out text")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def _panels(rows: int, columns: int, width: float = 5.4, height: float = 4.2) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).tolist()
    for axis in (axis for line in axes for axis in line):
        axis.grid(True, color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.title.set_fontsize(10)
    return figure, axes
