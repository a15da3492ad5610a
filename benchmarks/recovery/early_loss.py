"""Which learning rate the training loss would choose, early in the run or at its end, beside held-out text.

python -m benchmarks.recovery.early_loss
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.recovery.protocol import Results
from benchmarks.result_files import write_result

WINDOWS = {"16 to 30 %": (0.16, 0.3), "the last fifth": (0.8, 1.0)}


def training_loss(run: Mapping[str, Any], begin: float, end: float) -> float:
    """Return the mean training loss between two fractions of the run."""
    points = run["train_losses"]
    return statistics.fmean(points[round(begin * len(points)) : round(end * len(points))])


def choices(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one line a row with several rates: the best rate, and what choosing by training loss costs, in nats."""
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run.get("train_losses"):
            by_row.setdefault(run["row"], []).append(run)
    lines = []
    for name, tried in by_row.items():
        if len(tried) < 2:
            continue
        held_out = {run["lr"]: statistics.fmean(run["losses"].values()) for run in tried}
        best = min(held_out, key=lambda rate: held_out[rate])
        line: dict[str, Any] = {
            "row": name,
            "rates": ", ".join(f"{rate:g}" for rate in sorted(held_out)),
            "best on held-out text": f"{best:g}",
        }
        for window, (begin, end) in WINDOWS.items():
            rate = min(tried, key=lambda run: training_loss(run, begin, end))["lr"]
            line[f"by the training loss of {window}"] = f"{rate:g} (+{held_out[rate] - held_out[best]:.4f})"
        lines.append(line)
    return lines


def main(
    runs: Path = Path("benchmarks/results/recovery/recovery.runs.jsonl"),
    output: Path = Path("benchmarks/results"),
    name: str = "recovery/early_loss",
    seed: int = 1000,
) -> None:
    """Write the table of the recorded searches.

    Args:
        runs: file of finished runs, as ``benchmarks.recovery`` writes it.
        output: folder for the result file.
        name: of it.
        seed: of the runs that tried several rates.

    Raises:
        ValueError: if no row was run at several rates.
    """
    lines = choices([run for run in Results(runs).all() if run["seed"] == seed])
    if not lines:
        raise ValueError(f"{runs} holds no row with several learning rates and seed {seed}")
    note = (
        f"Recorded runs of seed {seed} ({runs.name}). In brackets: mean held-out loss above that of the best rate, in "
        "nats. Runs without a recorded training loss are left out."
    )
    write_result(output, name, "Learning rates that the training loss would choose", lines, note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
