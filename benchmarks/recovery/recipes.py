"""The same comparison on a recipe that trains from scratch, on the CPU in minutes.

python -m benchmarks.recovery.recipes --recipe configs/bytelm.yaml
python -m benchmarks.recovery.recipes --recipe configs/digits.yaml --seeds '[0,1,2,3,4]'
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.recovery.protocol import Results, compare, runs_path, settings_line
from benchmarks.recovery.rows import SCRATCH, chosen_rows, further_rows
from benchmarks.recovery.scratch import Recipe
from benchmarks.recovery.summary import finish


def main(
    recipe: Path,
    output: Path = Path("benchmarks/results"),
    runs: Path | None = None,
    rows: list[str] | None = None,
    variants: dict[str, dict[str, Any]] | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    jobs: int = 1,
) -> None:
    """Run what is missing, then write the table and the plot.

    Args:
        recipe: the config of a recipe; its Prox24 arguments are those of the row "prox24".
        output: folder for the results.
        runs: file of finished runs; null is ``output/recovery/RECIPE.runs.jsonl``.
        rows: names of rows; null for all.
        variants: further rows of Prox24: name -> its arguments, and ``distillation``, the share of it.
        seeds: of weights and data order.
        jobs: runs at a time, each in a process of its own.
    """
    chosen = chosen_rows(rows, {**SCRATCH, **further_rows(variants)})
    task = Recipe.of(recipe)
    name = f"recovery/{recipe.stem}"
    results = Results(runs or runs_path(output, name))
    apart = task.check_texts()
    if apart is not None:
        print(apart)
    found, _, failed = compare(task, chosen, seeds, None, None, 0, jobs, results)
    title = f"Recovery: {recipe.stem} from scratch"
    note = "; ".join(filter(None, (settings_line(task), f"{jobs} at a time", apart))) + ". "
    finish(found, list(chosen), task.plain, output, name, title, note)
    if failed:
        raise SystemExit(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
