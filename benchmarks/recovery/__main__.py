"""Ways to a 2:4 language model at equal steps: one-shot pruning and fine-tuning, sparse training, Prox24.

    python -m benchmarks.recovery --jobs 3 --compile true

Every run goes through Lightning's Trainer on the same text in the same order; only callbacks differ. A run that is
finished is a line in the runs file, and the same command goes on with what is missing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.recovery.language_model import LanguageModel, default_precision
from benchmarks.recovery.protocol import Results, compare, runs_path, settings_line
from benchmarks.recovery.rows import FINETUNING, chosen_rows, further_rows
from benchmarks.recovery.summary import finish
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource
from recipes.calibration_text import PythonDocs
from recipes.causal_lm import SMOLLM2
from recipes.source_text import PythonSources


def main(
    output: Path = Path("benchmarks/results"),
    name: str = "recovery",
    runs: Path | None = None,
    rows: list[str] | None = None,
    variants: dict[str, dict[str, Any]] | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    steps: int = 400,
    long: bool = False,
    batch_size: int = 16,
    length: int = 1024,
    eval_sequences: int = 64,
    calibration_sequences: int = 128,
    lr: float = 1e-4,
    rates: dict[str, float] | None = None,
    lrs: list[float] | None = None,
    search_seed: int = 1000,
    warmup_steps: int = 20,
    weight_decay: float = 0.01,
    compile: bool = False,
    precision: str | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    model: Pretrained = SMOLLM2,
    training: TextSource = PythonSources(),  # noqa: B008
    evaluation: dict[str, TextSource] | None = None,
    cache: Path = Path("runs/tokens"),
    keep: Path | None = None,
) -> None:
    """Run what is missing, then write the table and the plot.

    Args:
        output: folder for the result file, the plot and (unless ``runs`` names another place) the runs file.
        name: of these files: "recovery" or "recovery/VARIANT".
        runs: file of finished runs, one JSON line each; null is ``output/recovery/VARIANT.runs.jsonl``.
        rows: names of rows; null for all.
        variants: further rows of Prox24: name -> its arguments, and ``distillation``, ``teacher``, ``module``,
            ``rounding`` and ``averages`` as in ``benchmarks.recovery.rows.Row`` (``module: {embedding_lr: 0.0}``).
            ``prune``, arguments of ``prune_layerwise``, replaces Prox24; ``prox24: false`` leaves it out.
        seeds: of the order of the training text, one run of every row each.
        steps: optimizer steps of a run.
        long: four times the steps, into files of their own.
        batch_size: sequences a step.
        length: tokens a sequence.
        eval_sequences: sequences scored of each held-out text.
        calibration_sequences: sequences for pruning before the first step; the first that are trained on.
        lr: peak learning rate where no search says otherwise.
        rates: learning rates of single rows: name -> peak.
        lrs: learning rates to try for every row, on ``search_seed``; chosen by the loss on the sequences of the last
            held-out text that follow the reported ones.
        search_seed: order of the training text in the search; not one of ``seeds``.
        warmup_steps: linear warm-up before the cosine.
        weight_decay: of matrices.
        compile: compile blocks and loss; pays on a GPU.
        precision: of the Trainer; null is bf16-mixed with a GPU, else 32-true.
        jobs: runs that share the GPU at a time, each in a process of its own.
        minutes: after so many no further run begins; the same command goes on another time. null: no limit.
        model: which causal language model.
        training: text to train on.
        evaluation: held-out texts by name; null is docs (docstrings and reference) and libraries (source files).
        cache: folder where tokens are kept.
        keep: folder for the model of the last run that ends, say of one row and one seed, for ``benchmarks.rounding
            --checkpoint``; null keeps none.
    """
    table = {**FINETUNING, **further_rows(variants)}
    chosen = chosen_rows(rows, table)
    task = LanguageModel(
        model=model,
        training=training,
        evaluation=evaluation or {"docs": PythonDocs(), "libraries": PythonSources()},
        steps=4 * steps if long else steps,
        batch_size=batch_size,
        length=length,
        eval_sequences=eval_sequences,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        calibration_sequences=calibration_sequences,
        compile=compile,
        precision=precision or default_precision(),
        cache=cache,
        keep=keep,
    )
    until = None if minutes is None else time.time() + 60 * minutes
    if long:
        name += "_long" if "/" in name else "/long"
    results = Results(runs or runs_path(output, name))
    apart = task.check_texts()
    print(apart)
    task.data(0).prepare_data()  # once, before several processes ask for it
    found, rates, failed = compare(
        task,
        chosen,
        seeds,
        {name: (rates or {}).get(name, lr) for name in chosen},
        lrs,
        search_seed,
        jobs,
        results,
        until,
    )
    note = f"{settings_line(task)}; AdamW, cosine; {jobs} at a time; {apart}. "
    if lrs:
        note += (
            f"Learning rate of each row: the best of {lrs} on seed {search_seed} by the loss on the text `search` "
            f"(the sequences of the last held-out text after the reported ones): {rates}. "
        )
    finish(found, list(chosen), task.plain, output, name, "Recovery: ways to a 2:4 language model at equal steps", note)
    if failed:
        raise SystemExit(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
