"""``prox24 study``: what the prox does, how close local comes to global, and where it fails, in minutes on a CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.cli.study.output import Part, write_study
from prox24_lightning.cli.study.parts import PARTS, PartName
from prox24_lightning.cli.study.sizes import SIZES
from prox24_lightning.utils.files import check_output


def study(
    output: Path = Path("runs/study"),
    overwrite: bool = False,
    parts: list[PartName] | None = None,
    size: Literal["full", "tiny"] = "full",
    seed: int = 0,
) -> None:
    """Run the study and write its report, figures (PNG and SVG) and tables (CSV).

    Args:
        output: folder of the report.
        overwrite: write into a folder that holds files already.
        parts: which parts; null for all: plane, gaps, fractions, failures, ablations.
        size: full takes some minutes on two cores; tiny only shows that everything runs.
        seed: of random weights, inputs and searches.
    """
    chosen = list(parts or get_args(PartName))
    path = output
    with errors_as_exit("study"):
        check_output(output, overwrite=overwrite)
        output.mkdir(parents=True, exist_ok=True)  # fails before minutes of work where the folder cannot be made
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

            part = PARTS[name](SIZES[size], seed, tick)
            part.seconds = time.perf_counter() - begin
            done.append(part)
            # After every part, so that a run that is stopped keeps the parts it has finished.
            path = write_study(output, done, {"command": command})
            bar.advance(task)
    console.print(f"report: {path}", "next: prox24 recipes DIR lays down runs to try it on", sep="\n")
