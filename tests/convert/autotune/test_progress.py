"""The progress bar."""

from __future__ import annotations

import io

from rich.console import Console
from rich.progress import Progress

from prox24_lightning.convert.autotune.progress import TuningProgress


def test_a_bar_shows_how_far_the_search_is_and_leaves_other_bars_alone():
    console = Console(file=io.StringIO(), force_terminal=True)
    with TuningProgress(console) as bar:
        bar.begin("kernels timed", 12)()
    assert "kernels timed" in console.file.getvalue()
    assert "1/12" in console.file.getvalue()
    with Progress(console=console), TuningProgress(console) as bar:
        bar.begin("kernels timed", 12)()
