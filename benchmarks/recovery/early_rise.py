"""How far the loss on new batches rises before anything is pruned, by learning rate: what Prox24 warns by.

    python -m benchmarks.recovery.early_rise --lrs '[5e-4,1e-3,2e-3]' --embedding_lr 0 --compile true

Each run stops as soon as that is known. Beside it stands how the whole run at this rate ends, if ``full`` holds one.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from benchmarks.recovery.language_model import LanguageModel, default_precision
from benchmarks.recovery.protocol import Results
from benchmarks.recovery.run import trainer_of
from benchmarks.result_files import write_result
from prox24_lightning import Prox24
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource
from recipes.causal_lm import SMOLLM2
from recipes.source_text import PythonSources


class _StopOnceKnown(Callback):
    """Ends the run when the rise is known; behind Prox24."""

    def __init__(self, prox24: Prox24) -> None:
        self._prox24 = prox24

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.should_stop = self._prox24.early_rise is not None


def measure(task: LanguageModel, lr: float, embedding_lr: float, seed: int) -> dict[str, Any]:
    """Train until the rise is known, and return it."""
    prox24 = Prox24(start=0.5, freeze=0.5, verbose=False)  # long after that
    seed_everything(seed, workers=True, verbose=False)
    trainer = trainer_of(task, [prox24, _StopOnceKnown(prox24)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the run ended at step")  # as it is meant to
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")
        warnings.filterwarnings("ignore", ".*has not trained on")  # that is in the table
        loader = task.data(seed).train_dataloader()  # nothing is scored
        trainer.fit(task.module(lr, {"embedding_lr": embedding_lr}), loader)
    rise = prox24.early_rise
    return {} if rise is None else {**asdict(rise), "share": rise.share, "warns": rise.is_too_high}


def lines(
    measured: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]], rows: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a line for each measured run, with the excess in which the whole run of the same seed and rate ends.

    Args:
        measured: of one model: embedding_lr, seed, lr, rise.
        full: finished runs of the same model, with those of the row "dense", whose lowest loss is that of the excess.
        rows: of these runs, with the ``embedding_lr`` of each.
    """
    loss = {(run["row"], run["seed"], run["lr"]): statistics.fmean(run["losses"].values()) for run in full}
    row_of = {embedding_lr: row for row, embedding_lr in rows.items()}
    found = []
    for one in measured:
        rise, row = one["rise"], row_of.get(one["embedding_lr"])
        end = loss.get((row, one["seed"], one["lr"]))
        dense = min((value for key, value in loss.items() if key[:2] == ("dense", one["seed"])), default=None)
        least = min((value for key, value in loss.items() if key[:2] == (row, one["seed"])), default=None)
        known = end is not None and least is not None and dense is not None
        found.append(
            {
                "embeddings": "kept" if one["embedding_lr"] == 0 else "trained",
                "seed": one["seed"],
                "learning rate": f"{one['lr']:g}",
                "loss before": round(rise["start"], 4),
                "loss after the steps": round(rise["now"], 4),
                "rise": f"{rise['share']:+.2%}",
                "± (standard error)": f"{rise['error'] / rise['start']:.2%}",
                "warning": "yes" if rise["warns"] else "no",
                "excess in the end": round(end - dense, 4) if known else "",
                "above the best rate": f"{(end - dense) / (least - dense) - 1:+.0%}" if known else "",
            }
        )
    return found


def main(
    output: Path = Path("benchmarks/results"),
    name: str = "recovery/early_rise",
    measured: Path = Path("benchmarks/results/recovery/early_rise.jsonl"),
    lrs: list[float] | None = None,
    embedding_lr: float = 0.0,
    seed: int = 0,
    full: Path | None = None,
    rows: dict[str, float] | None = None,
    steps: int = 400,
    batch_size: int = 16,
    length: int = 1024,
    compile: bool = False,
    model: Pretrained = SMOLLM2,
    training: TextSource = PythonSources(),  # noqa: B008
    cache: Path = Path("runs/tokens"),
    note: str = "",
) -> None:
    """Measure at each rate, add it to the file, and write the table of all that the file holds of this model.

    Args:
        output: folder of the result file.
        name: of it.
        measured: file of what was measured, one JSON line each.
        lrs: learning rates to measure now; null measures nothing.
        embedding_lr: rate of the embeddings, relative to it.
        seed: of the order of the training text.
        full: file of finished runs of the same model, as ``benchmarks.recovery`` writes it.
        rows: of these runs, with the ``embedding_lr`` of each.
        steps: optimizer steps of the schedule.
        batch_size: sequences a step.
        length: tokens a sequence.
        compile: compile blocks and loss; pays on a GPU.
        model: which causal language model.
        training: text to train on.
        cache: folder where tokens are kept.
        note: on the runs, for the result file.

    Raises:
        ValueError: if the file holds nothing of this model.
    """
    task = LanguageModel(
        model, training, {}, steps, batch_size, length, 0, 20, 0.01, 0, compile, default_precision(), cache
    )
    for lr in lrs or ():
        rise = measure(task, lr, embedding_lr, seed)
        line = {"model": model.describe(), "embedding_lr": embedding_lr, "seed": seed, "lr": lr, "rise": rise}
        measured.parent.mkdir(parents=True, exist_ok=True)
        with measured.open("a") as file:
            file.write(json.dumps(line) + "\n")
    text = measured.read_text() if measured.exists() else ""
    known = [one for one in map(json.loads, text.splitlines()) if one["model"] == model.describe() and one["rise"]]
    if not known:
        raise ValueError(f"{measured} holds nothing of {model.describe()}; name rates by lrs")
    table = lines(known, [] if full is None else Results(full).all(), rows or {})
    write_result(output, name, "The loss on new batches before anything is pruned", table, note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
