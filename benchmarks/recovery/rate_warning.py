"""Whether the warning of a learning rate that is too high comes in recorded runs of Prox24, and when.

python -m benchmarks.recovery.rate_warning
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.recovery.protocol import Results
from benchmarks.result_files import write_result
from prox24_lightning.monitoring.loss_rise import LossRise, LossWindow
from prox24_lightning.sparsify.phases import resolve_plan

START, PHASES = 0.02, (0.02, 0.3)
"""The default start, and the default start and freeze."""
KEPT = ("slow 1e-3", "kept, default solves", "kept, default solves 7e-4", "kept, default solves 2e-3")
"""Rows that differ in nothing but the learning rate."""
SOLVES = ("prox24 embeddings kept", "prox24 causal_lm", "kept, longer solves", "kept, generated text")
"""Rows with more careful solves."""
SECOND = (
    "prox24, embeddings kept",
    "prox24 careful",
    "prox24 causal_lm, 4 pauses, 192 steps",
    "prox24 causal_lm, 192 steps",
    "one pause, embeddings kept",
)
"""Rows of the converged second model."""
ONE_PAUSE = ("one_pause", "one_pause_rates", "second_model_converged", "second_model_rates")
"""Files in which ``prox24 causal_lm`` solves all blocks in one pause."""
FREEZES = {
    **dict.fromkeys(("slow anchored", *KEPT, *SOLVES, *SECOND[1:]), 0.1),
    **{"early": 0.06, "kept, longer solves": 0.15},
}
"""Rows whose ``freeze`` is not the default."""
ROWS = (
    *("prox24", "prox24 reordered", "prox24 streamed", "prox24 by magnitude", "prox24 post_step"),
    *("restart", "slow embeddings", "early", "slow anchored", *KEPT, *SOLVES, *SECOND),
)
"""Runs of Prox24; those with distillation, under which there is no warning, are left out."""


def risen_at(run: Mapping[str, Any], start: float, freeze: float) -> str:
    """Return the steps at whose end the warning comes, and its figures; empty without one.

    The recorded losses are means over fiftieths of the run, without the deviation of single losses, which is estimated
    from how far neighbouring means differ, and without the decay of the rate, which can only keep the warning back.
    """
    steps, points = run["steps"], run["train_losses"]
    plan, rise = resolve_plan(start, freeze, steps), LossRise()
    count = max(1, steps // len(points))
    deviation = deviation_of_means(points) * math.sqrt(count)
    for number, mean in enumerate(points):
        first, last = (round(part * steps / len(points)) for part in (number, number + 1))
        risen = rise.add(
            LossWindow(first + 1, last, mean, deviation, count, (run["lr"],)), plan.phase(first + 1 if first else first)
        )
        if risen is not None:
            return f"step {last}: {risen.now.mean:.2f}, lowest {risen.lowest.mean:.2f}, start {risen.start.mean:.2f}"
    return ""


def deviation_of_means(points: Sequence[float]) -> float:
    """Return the standard deviation of means of a curve around its course, by the median difference of neighbours."""
    differences = [abs(after - before) for before, after in itertools.pairwise(points)]
    return statistics.median(differences) / (statistics.NormalDist().inv_cdf(0.75) * math.sqrt(2))


def lines(
    runs: Sequence[Mapping[str, Any]], phases: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return a line for each run in :data:`ROWS`, by its key: how far it is above the best rate, and the warning.

    Args:
        phases: ``start`` and ``freeze`` of rows that have neither the defaults nor those of :data:`FREEZES`.
    """
    phases = {**{row: (START, freeze) for row, freeze in FREEZES.items()}, **(phases or {})}
    held_out = {id(run): statistics.fmean(run["losses"].values()) for run in runs}
    row_of = {id(run): "embeddings kept" if run["row"] in KEPT else run["row"] for run in runs}
    dense: dict[Any, float] = {}
    best: dict[Any, float] = {}
    for run in runs:
        loss = held_out[id(run)]
        of_row = row_of[id(run)], run["seed"], run["steps"]
        best[of_row] = min(loss, best.get(of_row, loss))
        if run["row"] == "dense":
            dense[of_row[1:]] = min(loss, dense.get(of_row[1:], loss))
    found = {}
    for run in runs:
        of_row = row_of[id(run)], run["seed"], run["steps"]
        if not run.get("train_losses") or of_row[1:] not in dense or run["row"] not in ROWS:
            continue
        excess, least = (loss - dense[of_row[1:]] for loss in (held_out[id(run)], best[of_row]))
        found[run["key"]] = {
            "row": of_row[0],
            "seed": run["seed"],
            "steps": run["steps"],
            "learning rate": f"{run['lr']:g}",
            "excess": round(excess, 4),
            "above the best rate": f"{excess / least - 1:+.0%}",
            "warning": risen_at(run, *phases.get(run["row"], PHASES)) or "none",
        }
    return found


def main(
    folder: Path = Path("benchmarks/results/recovery"),
    output: Path = Path("benchmarks/results"),
    name: str = "recovery/rate_warning",
) -> None:
    """Write the table of the recorded runs.

    Args:
        folder: holds the files of finished runs, as ``benchmarks.recovery`` writes them.
        output: folder for the result file.
        name: of it.
    """
    found: dict[str, dict[str, Any]] = {}  # by the key of the run: a run may be in several files
    for path in sorted(folder.glob("*.runs.jsonl")):
        source = path.name.removesuffix(".runs.jsonl")
        phases = dict.fromkeys(("prox24 causal_lm", *SECOND[-2:]), (0.05, 0.05)) if source in ONE_PAUSE else None
        found |= {key: {"file": source, **line} for key, line in lines(Results(path).all(), phases).items()}
    note = (
        "Each recorded run of Prox24 without distillation, and the warning that the present rule would give at the end "
        "of a window of a fiftieth of the run. Above the best rate: excess over dense training, relative to that of "
        "the best rate tried for the row in the same file; rates below the best are not the warning's business. "
        "Records hold neither the deviation of single losses, which is estimated from how far neighbouring windows "
        "differ, nor the decay of the rate, which can only keep the warning back."
    )
    write_result(output, name, "The warning of a learning rate that is too high", list(found.values()), note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
