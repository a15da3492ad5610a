"""What ``prox24 bench`` has measured so far: kept while it goes on, printed however it ends."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from rich.console import Console
from typing_extensions import Self

from prox24_lightning.convert.benchmark.render import print_report, write_report
from prox24_lightning.convert.benchmark.render_language import language_figure
from prox24_lightning.convert.benchmark.report import Report
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.files import replacing
from prox24_lightning.utils.long_work import Watch


class Measured:
    """``with Measured(output) as measured:``: what is kept inside is written at once, and printed at the end.

    An exception (Ctrl-C and SIGTERM among them) becomes a note of the report, and goes on.

    Args:
        output: folder for the files; None writes none.
    """

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self._report: Report | None = None

    @property
    def report(self) -> Report:
        """What has been kept last."""
        if self._report is None:
            raise RuntimeError("nothing has been measured yet")
        return self._report

    def keep(self, report: Report) -> None:
        """Take the place of what has been kept before."""
        self._report = report
        if self._output is not None:
            write_report(report, self._output, "bench")

    def note(self, text: str) -> None:
        """Add a note to what has been kept."""
        self.keep(self.report.with_note(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._report is None:
            return
        if error is not None:
            why = describe(error) if isinstance(error, Exception) else "interrupted"
            self.note(f"Stopped before everything was measured: {why}")
        console = Console()
        print_report(self._report, console)
        for path in self._files():
            console.print(str(path), markup=False, highlight=False)

    def _files(self) -> list[Path]:
        if self._output is None or self._report is None:
            return []
        paths: list[Any] = [*write_report(self._report, self._output, "bench")]
        if self._report.language is not None:
            machine = self._report.machine
            about = f"{machine['model']}\n{machine['GPU']}, {self._report.dtype}, {date.today().isoformat()}"
            paths.append(self._output / "bench.png")
            with replacing(paths[-1]) as temporary:
                language_figure(self._report.language, about).savefig(temporary, dpi=150)
        return paths


def say_what_comes() -> Watch:
    """Return what prints, on stderr, each part of a long measurement before it begins, with the seconds so far."""
    console, begin = Console(stderr=True), perf_counter()

    def say(name: str) -> None:
        if name:
            console.print(f"{perf_counter() - begin:6.0f} s  {name}", markup=False, highlight=False, soft_wrap=True)

    return say
