"""The table and the plot of runs that are finished, wherever they ran: needs neither model nor text.

python -m benchmarks.recovery.table --lr 3e-4 --rates '{"dense": 1e-4}'
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.recovery.language_model import LanguageModel
from benchmarks.recovery.protocol import Results
from benchmarks.recovery.rows import FINETUNING
from benchmarks.recovery.summary import finish


def main(
    runs: Path = Path("benchmarks/results/recovery/recovery.runs.jsonl"),
    output: Path = Path("benchmarks/results"),
    name: str = "recovery",
    rows: list[str] | None = None,
    seeds: list[int] | None = None,
    lr: float = 1e-4,
    rates: dict[str, float] | None = None,
    note: str = "",
) -> None:
    """Write the result file and the plot of the runs with these learning rates.

    Args:
        runs: file of finished runs, as ``benchmarks.recovery`` writes it.
        output: folder for result file and plot.
        name: of these files: "recovery" or "recovery/VARIANT".
        rows: names of rows; null for all.
        seeds: null for all.
        lr: peak learning rate of the rows that ``rates`` does not name.
        rates: learning rates of single rows.
        note: on the runs, for the result file.

    Raises:
        ValueError: if no run fits.
    """
    chosen = rows or list(FINETUNING)
    wanted = {row: (rates or {}).get(row, lr) for row in chosen}
    found = [
        run
        for run in Results(runs).all()
        if run["purpose"] == "report"
        and run["lr"] == wanted.get(run["row"])
        and (seeds is None or run["seed"] in seeds)
    ]
    if not found:
        raise ValueError(f"{runs} holds no run of the rows {chosen} at these learning rates and seeds")
    machines = sorted({run.get("machine", "not recorded") for run in found})
    note = f"{note} Learning rates: {wanted}. Runs on: {'; '.join(machines)}. ".lstrip()
    finish(found, chosen, LanguageModel.plain, output, name, "Recovery: ways to a 2:4 language model", note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
