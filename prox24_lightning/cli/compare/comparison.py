"""The rows of a comparison, as a table and as files."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table

from prox24_lightning.utils.environment import describe_environment
from prox24_lightning.utils.files import write_text
from prox24_lightning.utils.markdown import markdown_table

Variant = Literal["dense", "asp", "prox24"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

LABELS: dict[Variant, str] = {
    "dense": "dense",
    "asp": "one-shot magnitude (ASP)",
    "prox24": "Prox24",
}


@dataclass(frozen=True)
class Run:
    """One finished or failed run. ``sparse`` of ``groups`` groups are 2:4; ``batches`` is a checksum.

    ``lr`` is the learning rate where rates are searched, and ``search`` tells the runs that only choose it.
    """

    variant: Variant
    seed: int
    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    sparse: int = 0
    groups: int = 0
    seconds: float = 0.0
    steps: int = 0
    batches: str = ""
    error: str | None = None
    lr: float | None = None
    search: bool = False


@dataclass
class Comparison:
    """Rows of a comparison by one metric, with the command, config and machine."""

    metric: str
    mode: Literal["min", "max"]
    command: str
    config: str
    facts: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    search_part: float | None = None
    """Part of a run after which search runs end, whose score is then a training loss; None: whole runs."""

    @classmethod
    def begin(
        cls,
        *,
        metric: str,
        mode: Literal["min", "max"],
        command: str,
        config: str,
        search_part: float | None = None,
    ) -> Comparison:
        return cls(metric, mode, command, config, describe_environment(), search_part=search_part)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return one row a variant: label, metric, 2:4 groups, seconds, seeds. Spread: sample standard deviation."""
        rows = []
        for variant in VARIANTS:
            runs = [run for run in self.runs if run.variant == variant and not run.search]
            rate = next((f", rate {run.lr:g}" for run in runs if run.lr is not None), "")
            done = [run for run in runs if run.error is None]
            failed = f" ({len(runs) - len(done)} failed)" if len(done) < len(runs) else ""
            if done:
                sparse, groups = sum(run.sparse for run in done), sum(run.groups for run in done)
                rows.append(
                    (
                        LABELS[variant] + rate,
                        _mean_and_spread([run.score for run in done if run.score is not None], digits=4),
                        f"{sparse / max(groups, 1):.2%}",
                        _mean_and_spread([run.seconds for run in done], digits=1),
                        ", ".join(str(run.seed) for run in done) + failed,
                    )
                )
            elif runs:
                rows.append((LABELS[variant], "failed", "-", "-", ", ".join(str(run.seed) for run in runs)))
        return rows

    def best_rate(self, variant: Variant) -> float | None:
        """Return the learning rate of the best search run of a variant; None if none has a finite score."""
        found = [run for run in self.runs if run.search and run.variant == variant and _finite(run.score) is not None]
        better = min if self.mode == "min" or self.search_part else max
        return better(found, key=lambda run: run.score or 0.0).lr if found else None

    @property
    def headings(self) -> tuple[str, str, str, str, str]:
        better = "lower" if self.mode == "min" else "higher"
        return "variant", f"{self.metric} ({better} is better)", "groups that are 2:4", "training, s", "seeds"

    def table(self) -> Table:
        steps = sorted({run.steps for run in self.runs if run.error is None and not run.search})
        table = Table(title=f"{' or '.join(map(str, steps)) or 'no'} optimizer steps a run")
        for heading in self.headings:
            table.add_column(heading)
        for row in self.rows():
            table.add_row(*row)
        return table

    def warnings(self) -> list[str]:
        """Return what makes the comparison unfair or incomplete."""
        found = [f"{run.variant}, seed {run.seed} failed: {run.error}" for run in self.runs if run.error]
        for variant in VARIANTS:
            rates = sorted({run.lr for run in self.runs if run.search and run.variant == variant and run.lr})
            if len(rates) > 1 and (best := self.best_rate(variant)) in (rates[0], rates[-1]):
                end, more = ("smallest", "smaller") if best == rates[0] else ("largest", "larger")
                found.append(f"{variant}: the best rate, {best:g}, is the {end} that was tried; add {more} ones")
        reported = [run for run in self.runs if not run.search]
        for seed in sorted({run.seed for run in reported}):
            done = [run for run in reported if run.seed == seed and run.error is None]
            found += [
                f"{run.variant}, seed {seed} ended with {self.metric} = {run.score}: it diverged"
                for run in done
                if run.score is not None and not math.isfinite(run.score)
            ]
            if len({run.batches for run in done}) > 1:
                found.append(f"seed {seed}: the variants did not see the same training batches")
            if len({run.steps for run in done}) > 1:
                found.append(f"seed {seed}: the variants took {', '.join(str(run.steps) for run in done)} steps")
        return found

    def write(self, folder: Path) -> None:
        """Write ``comparison.json`` and ``comparison.md``; each is replaced whole, so a crash leaves the old one.

        A score that is NaN or infinite, which JSON cannot express, is null there.
        """
        found = asdict(self)
        for run in found["runs"]:
            run["score"] = _finite(run["score"])
            run["scores"] = {name: _finite(score) for name, score in run["scores"].items()}
        write_text(folder / "comparison.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
        write_text(folder / "comparison.md", self.markdown())

    def markdown(self) -> str:
        lines = [f"# {self.command}", "", markdown_table(self.headings, self.rows())]
        lines += ["", *(f"Warning: {warning}" for warning in self.warnings()), ""]
        lines += [f"- {key}: {value}" for key, value in self.facts.items()]
        return "\n".join([*lines, "", "```yaml", self.config.rstrip(), "```", ""])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _mean_and_spread(values: list[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return str(sum(values))  # nan or inf, and so is the mean; the functions of statistics raise on some of them
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
