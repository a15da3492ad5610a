"""The table and the plot of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.result_files import write_result

DENSE = "dense"


def excesses(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """For each row and seed the loss above dense training of the same seed, in nats, mean over the texts."""
    dense = {run["seed"]: run["losses"] for run in runs if run["row"] == DENSE}
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        base = dense.get(run["seed"])
        if base is not None:
            above = statistics.fmean(loss - base[text] for text, loss in run["losses"].items())
            found.setdefault(run["row"], {})[run["seed"]] = above
    return found


def with_averages(runs: Sequence[dict[str, Any]], rows: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return runs and rows with the averages of each run as rows of their own, behind the row of its last weights."""
    more, names = list(runs), []
    for row in rows:
        names.append(row)
        for run in (run for run in runs if run["row"] == row):
            for average, scored in run.get("averages", {}).items():
                more.append({**run, **scored, "row": f"{row}: {average}"})
                names.append(f"{row}: {average}")
    return more, list(dict.fromkeys(names))


def table(runs: Sequence[dict[str, Any]], rows: Sequence[str], plain: Sequence[str]) -> list[dict[str, Any]]:
    """One row a way, mean and spread (sample standard deviation) over its seeds; rows without a run are left out.

    Args:
        plain: rows whose fits, pruning left out, are the unit of wall time: their median, among runs of one start,
            for how long a run takes depends on what shares the machine with it.
    """
    excess = excesses(runs)
    units = _units(runs, plain)
    lines = []
    for name in rows:
        mine = sorted((run for run in runs if run["row"] == name), key=lambda run: run["seed"])
        if not mine:
            continue
        line: dict[str, Any] = {"row": name}
        for text in mine[0]["losses"]:
            losses = [run["losses"][text] for run in mine]
            line[f"loss {text}"] = _spread(losses)
            line[f"ppl {text}"] = f"{math.exp(statistics.fmean(losses)):.4g}"
        line["excess, nats"] = _spread(list(excess.get(name, {}).values()))
        whole = statistics.median(_seconds(run) for run in mine)
        times = [_seconds(run) / units[at] for run in mine if (at := _start(run)) in units]
        line["wall time"] = f"{statistics.median(times):.2f}" if times else ""
        line["seconds"] = f"{whole:.1f}"
        line["of it pruning"] = f"{statistics.median(run['pruning_seconds'] for run in mine):.1f}"
        teachers = [run["teacher_seconds"] for run in mine if "teacher_seconds" in run]
        line["of it teacher"] = f"{statistics.median(teachers):.1f}" if teachers else ""
        for column, key in (("step ms", "step_ms"), ("longest step ms", "longest_step_ms"), ("peak GiB", "peak_gib")):
            values = [run[key] for run in mine if run[key] is not None]
            line[column] = f"{statistics.median(values):.4g}" if values else ""
        line["groups 2:4"] = f"{statistics.fmean(run['share_24'] for run in mine):.2%}"
        line["calibration"] = ", ".join(sorted({run.get("calibration") or "" for run in mine}))
        line["lr"] = ", ".join(str(lr) for lr in sorted({run["lr"] for run in mine}, key=str))
        line["seeds"] = ", ".join(str(run["seed"]) for run in mine)
        lines.append(line)
    return lines


def _seconds(run: dict[str, Any]) -> float:
    return run["seconds"] + run["pruning_seconds"] + run.get("teacher_seconds", 0.0)


def _start(run: dict[str, Any]) -> tuple[Any, Any]:
    return run.get("machine"), run.get("start")


def _units(runs: Sequence[dict[str, Any]], plain: Sequence[str]) -> dict[tuple[Any, Any], float]:
    fits: dict[tuple[Any, Any], list[float]] = {}
    for run in runs:
        if run["row"] in plain:
            fits.setdefault(_start(run), []).append(run["seconds"])
    return {start: statistics.median(seconds) for start, seconds in fits.items()}


def warnings(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What would make the comparison unfair."""
    found = []
    for seed in sorted({run["seed"] for run in runs}):
        mine = [run for run in runs if run["seed"] == seed]
        for key, what in (("batches", "see the same training batches"), ("steps", "take the same number of steps")):
            if len({run[key] for run in mine}) > 1:
                found.append(f"seed {seed}: the rows did not {what}")
    return found


def plot(runs: Sequence[dict[str, Any]], rows: Sequence[str], title: str, path: Path) -> None:
    """Excess of every row as a PNG: a dot a seed, a bar at the mean, the smallest mean on top."""
    excess = {name: list(seeds.values()) for name, seeds in excesses(runs).items() if name in rows and name != DENSE}
    names = sorted(excess, key=lambda name: -statistics.fmean(excess[name]))
    if not names:
        return
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(names):
        ours = name.startswith("prox24")
        colour = "tab:red" if ours else "tab:gray"
        axes.plot(excess[name], [height] * len(excess[name]), "o", color=colour, alpha=0.7, markersize=5)
        axes.plot([statistics.fmean(excess[name])], [height], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("loss above dense fine-tuning, nats (a dot a seed, a bar at the mean)")
    axes.set_title(title)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {statistics.stdev(values):.4f}"


def finish(
    runs: Sequence[dict[str, Any]],
    rows: Sequence[str],
    plain: Sequence[str],
    output: Path,
    name: str,
    title: str,
    note: str,
) -> None:
    """Write the table and the plot of what is there, and say what is unfair about it."""
    if not runs:
        return
    runs, rows = with_averages(runs, rows)
    note += (
        "Excess: loss above dense training of the same seed, mean over the texts; spread over seeds. Wall time: whole "
        "run with pruning and teacher, in units of plain masked fine-tuning of the same start "
        f"(the fits of {', '.join(plain)}). "
    )
    found = warnings(runs)
    note += " ".join(f"Warning: {warning}." for warning in found)
    path = write_result(output, name, title, table(runs, rows, plain), note=note)
    plot(runs, rows, title, path.with_suffix(".png"))
