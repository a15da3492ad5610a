"""Figures of a run on its way to 2:4; nothing is shown or saved here.

Matplotlib is imported when a figure is drawn, without pyplot, so no window system and no global state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from prox24_lightning.monitoring.history import SparsityHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7eb"
BLUE, ORANGE, RED = "#1f6fb4", "#d9730d", "#b3261e"
ZEROS_COLORS = ("#f2b179", "#f8d9b8", "#2b7bba", "#7fb3d9", "#c6dcec")
"""Groups with 0 and 1 zeros (not 2:4) in orange, with 2 to 4 (2:4) in blue; two zeros, the aim, is the strongest."""
PHASE_COLORS = {"dense": "#f4f5f7", "sparsify": "#fdf3e3", "frozen": "#e6f1fa"}
PICTURE_COLORS = ("#ffffff", "#b9c0c8", "#111820")
"""Zero, not zero but outside of the mask, kept."""
MAX_LABELS = 32


def overview_figure(history: SparsityHistory, title: str = "2:4 sparsity") -> Figure:
    """Draw the whole run in one figure.

    Top: training loss by step, the phases shaded, and the metric of validation on a second axis; the share of 2:4
    groups where neither is known. Middle: that share for every layer. Bottom, up to the freeze, as what follows is
    constant by construction: groups by their number of zeros, with the strength of the prox on a second, logarithmic
    axis; and the retained squared norm (the share of the two largest of every four) of the layers that are not 2:4 yet,
    with mask flips. Values hold from one measurement to the next.

    Raises:
        ValueError: if ``history`` is empty.
    """
    if not len(history):
        raise ValueError("the history is empty, so there is nothing to draw")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    map_height = min(max(0.2 * min(len(history.layers), MAX_LABELS), 1.6), 5.2)
    figure = Figure(figsize=(11, 6.4 + map_height), dpi=100, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.09, w_pad=0.08)
    rows = figure.add_gridspec(3, 2, height_ratios=[2.6, map_height, 2.3])
    top = figure.add_subplot(rows[0, :])
    layers = figure.add_subplot(rows[1, :], sharex=top)
    zeros = figure.add_subplot(rows[2, 0])
    retained = figure.add_subplot(rows[2, 1], sharex=zeros)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    for axes in (top, zeros, retained):
        _style(axes)
    _draw_phases(top, history)
    _draw_progress(top, history)
    _draw_layers(layers, history)
    _draw_zeros(zeros, history)
    _draw_retained_norm(retained, history)
    top.set_xlim(*_span(history))
    zeros.set_xlim(*_span_to_freeze(history))
    for axes in (top, zeros):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def mask_figure(pictures: Sequence[tuple[str, Any]], title: str = "corners of the weights") -> Figure:
    """Draw corners of a few weights side by side: kept in black, pruned next in grey, zero in white.

    Args:
        pictures: layer name and array ``(rows, columns)`` of 0, 1, 2 as
            :func:`~prox24_lightning.mask.codes.mask_picture` gives it.
        title: above all of them.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(3.7 * len(pictures), 4.5), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    colors = ListedColormap(PICTURE_COLORS)
    for index, (name, picture) in enumerate(pictures):
        axes = figure.add_subplot(1, len(pictures), index + 1)
        picture = np.asarray(picture)
        axes.imshow(picture, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
        axes.set_title(_shorten(name, 36), fontsize=9, color=INK)
        axes.set_xticks(np.arange(0, picture.shape[1] + 1, 4) - 0.5, labels=[])
        axes.set_yticks([])
        axes.grid(axis="x", color="#8fb8de", linewidth=0.5)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_color(GRID)
    labels = ("zero", "not zero, outside of the mask", "kept by the mask")
    handles = [
        Patch(facecolor=color, edgecolor=MUTED, linewidth=0.6, label=label)
        for color, label in zip(PICTURE_COLORS, labels, strict=True)
    ]
    figure.legend(handles=handles[::-1], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def rendered(figure: Figure) -> np.ndarray:
    """Return pixels ``(height, width, 3)``, uint8. Drawing takes a second: do it once for file and log together."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_phases(axes: Axes, history: SparsityHistory) -> None:
    first, last = _span(history)
    bounds = [max(step, first) for step, _ in history.phases] + [last]
    for (begin, end), (_, phase) in zip(pairwise(bounds), history.phases, strict=True):
        axes.axvspan(begin, end, color=PHASE_COLORS.get(phase, "white"), linewidth=0, zorder=0)
        if end - begin > 0.06 * (last - first):
            axes.text(
                (begin + end) / 2,
                1.015,
                phase,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=10,
                color=MUTED,
            )


def _draw_progress(axes: Axes, history: SparsityHistory) -> None:
    """Draw the loss and the metric; the share of 2:4 groups where there is neither."""
    losses = np.asarray(history.series["loss"])
    metric = np.asarray(history.metrics, dtype=float).reshape(-1, 2)
    axes.set_xlabel("optimizer step", color=MUTED, fontsize=9)
    known = np.isfinite(losses) & _after_a_whole_interval(history)
    if known.any():
        axes.plot(np.asarray(history.steps)[known], losses[known], color=INK, linewidth=1.8, marker=_marker(history))
        axes.set_ylim(*_without_first_descent(losses[known]))
        axes.set_ylabel("training loss", color=INK)
    if len(metric):
        if known.any():
            axes = axes.twinx()
            _style_second(axes, ORANGE)
        axes.plot(metric[:, 0], metric[:, 1], color=ORANGE, linewidth=1.2, marker="o", markersize=5, clip_on=False)
        axes.set_ylabel(f"{history.metric_name} (validation)", color=ORANGE)
    elif not known.any():
        _draw_share(axes, history)


def _draw_share(axes: Axes, history: SparsityHistory) -> None:
    line: dict[str, Any] = {"color": BLUE, "linewidth": 2.2, "drawstyle": "steps-post", "marker": _marker(history)}
    axes.plot(history.steps, history.groups_24, **line, zorder=4)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_ylabel("groups that are 2:4", color=BLUE)


def _draw_strength(axes: Axes, history: SparsityHistory) -> None:
    strength = np.asarray(history.series["strength"])
    strength = np.where(strength > 0, strength, np.nan)
    if np.isfinite(strength).any():
        second = axes.twinx()
        second.plot(history.steps, strength, color=INK, linewidth=1.4, linestyle=(0, (4, 2)), drawstyle="steps-post")
        second.set_yscale("log")
        second.margins(y=0.15)
        second.set_ylabel("strength (median of layers)", color=INK, fontsize=9)
        _style_second(second, INK)


def _draw_layers(axes: Axes, history: SparsityHistory) -> None:
    steps = np.asarray(history.steps, dtype=float)
    edges = np.concatenate([steps, [_span(history)[1]]])
    values = np.asarray(history.fractions).T
    count = len(history.layers)
    mesh = axes.pcolormesh(
        edges, np.arange(count + 1), values, cmap="Blues", vmin=0, vmax=1, shading="flat", rasterized=True
    )
    axes.set_ylim(count, 0)
    prefix, names = _without_common_prefix(history.layers)
    every = -(-count // MAX_LABELS)
    axes.set_yticks(np.arange(0, count, every) + 0.5, labels=[_shorten(name, 30) for name in names[::every]])
    axes.tick_params(length=0, labelsize=8 if count > 12 else 9, labelcolor=INK)
    axes.set_title(
        "groups that are 2:4, layer by layer" + (f"  ({prefix}*)" if prefix else ""), loc="left", fontsize=10, color=INK
    )
    # In the margin that the second axis of the panel above needs.
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.012, 0, 0.012, 1)), ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", "50 %", "100 %"], fontsize=9, color=INK)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def _draw_zeros(axes: Axes, history: SparsityHistory) -> None:
    shares = np.asarray([history.series[f"zeros_{count}"] for count in range(5)])
    order = [2, 3, 4, 1, 0]  # 2:4 groups at the bottom, so that the border of blue and orange is the 2:4 fraction
    axes.stackplot(
        _at_least_two(history.steps),
        _at_least_two(shares[order]),
        colors=[ZEROS_COLORS[count] for count in order],
        labels=[str(count) for count in order],
        linewidth=0,
        step="post",
    )
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], labels=["0", "50 %", "100 %"])
    axes.set_title("groups of four by their number of zeros", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("optimizer step", color=MUTED, fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    by_zeros = sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0])
    axes.legend(
        [handle for _, handle in by_zeros],
        [label for label, _ in by_zeros],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=5,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )
    _draw_strength(axes, history)


def _draw_retained_norm(axes: Axes, history: SparsityHistory) -> None:
    whole, lowest = history.series["retained_squared_norm"], history.series["lowest_retained_squared_norm"]
    step: dict[str, Any] = {"color": BLUE, "drawstyle": "steps-post", "marker": _marker(history)}
    lines = axes.plot(history.steps, whole, linewidth=1.8, label="retained squared norm", **step)
    lines += axes.plot(history.steps, lowest, linewidth=1.1, linestyle=":", label="in the worst layer", **step)
    bottom = min(0.9, *(value for value in lowest if math.isfinite(value)), 1.0)
    axes.set_ylim(bottom - 0.05, 1.01)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_title("norm² in the two largest of four, layers not 2:4 yet", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("optimizer step", color=MUTED, fontsize=9)
    flips = np.asarray(history.series["mask_flips"])
    known = np.isfinite(flips) & _after_a_whole_interval(history)
    if known.any():
        second = axes.twinx()
        lines += second.plot(
            np.asarray(history.steps)[known], flips[known], color=RED, linewidth=1.2, label="mask flips"
        )
        second.set_ylim(0, max(1.1 * np.nanmax(flips), 0.01))
        second.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        _style_second(second, RED)
    axes.legend(
        handles=lines,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=len(lines),
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=GRID, labelcolor=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def _style_second(axes: Axes, color: str) -> None:
    axes.tick_params(labelcolor=color, color=GRID, which="both", labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _marker(history: SparsityHistory) -> str:
    """Return a dot as marker where the history holds one step, as a line through it has no length."""
    return "o" if len(history) == 1 else ""


def _span(history: SparsityHistory) -> tuple[float, float]:
    """Return the first and last step drawn, which differ even where the history holds one step."""
    return history.steps[0], max(history.steps[-1], history.steps[0] + 1)


def _span_to_freeze(history: SparsityHistory) -> tuple[float, float]:
    """Return the first step drawn and the freeze; the whole span where nothing is frozen, or all was at once."""
    first, last = _span(history)
    freeze = next((step for step, phase in history.phases if phase == "frozen"), last)
    return first, freeze if freeze > first else last


def _after_a_whole_interval(history: SparsityHistory) -> np.ndarray:
    """Return which steps follow their predecessor by half the usual distance or more.

    A change of phase is measured besides, and a mean over one or two batches tells little.
    """
    gaps = np.diff(history.steps)
    return np.concatenate([[True], gaps >= np.median(gaps) / 2 if len(gaps) else []]).astype(bool)


def _without_first_descent(losses: np.ndarray) -> tuple[float, float]:
    """Return limits that show the later run: a first loss from scratch would press the rest into a line."""
    low, high = losses.min(), losses.max()
    if len(losses) > 10:
        high = min(high, np.quantile(losses[len(losses) // 10 :], 0.98))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _at_least_two(values: Any) -> np.ndarray:
    """Repeat a single value one step later, since an area needs two points."""
    values = np.asarray(values, dtype=float)
    if values.shape[-1] > 1:
        return values
    return np.concatenate([values, values + (1 if values.ndim == 1 else 0)], axis=-1)


def _without_common_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """Split off the dotted prefix that all names share, and ``.weight`` at their end."""
    names = [name.removesuffix(".weight") for name in names]
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    prefix = "".join(f"{part}." for part in parts[0][:shared])
    return prefix, [name.removeprefix(prefix) for name in names]


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length // 3]}…{name[-(length - length // 3 - 1) :]}"
