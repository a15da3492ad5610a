"""Pauses for solving in a ``transformers.Trainer``: a bar as the Trainer shows its own, or lines."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerState, TrainingArguments

from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.sparsify.solve_watch import LogLines, SolveState


class SolveProgress:
    """Shows pauses on the first process: a bar on a terminal, lines elsewhere (none if ``verbose`` is off)."""

    def __init__(self, args: TrainingArguments, state: TrainerState, config: SparsifyConfig) -> None:
        self._enabled = state.is_world_process_zero
        self._wants_bar = not args.disable_tqdm and sys.stderr.isatty()
        self._bar: Any = None
        self._name = config.name
        self._lines = LogLines(print, config.name) if config.verbose else None

    def show(self, state: SolveState) -> None:
        if not self._enabled:
            return
        if self._wants_bar:
            if self._bar is None:
                layout = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
                self._bar = tqdm(total=state.blocks, leave=False, dynamic_ncols=True, bar_format=layout)
            self._bar.n = state.block - 1
            self._bar.set_description_str(f"Solving {state}")
        elif self._lines is not None:
            self._lines.show(state)

    def end(self, state: SolveState, *, stopped: bool) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._enabled and self._lines is not None:
            self._lines.end(state, stopped=stopped)
        if stopped and self._enabled:
            print(
                f"{self._name}: stopped while it solved {state}: weights are as before; go on from the newest "
                "checkpoint with trainer.train(resume_from_checkpoint=True)"
            )
