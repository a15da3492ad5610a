"""Twenty thousand steps with everything on: do memory or the time of a step grow?

    python -m benchmarks.long_run --output benchmarks/results

A small model is trained with Prox24, SparsityMonitor, ConvertAndBenchmark, two loggers and a checkpoint every 500
steps. Every 500 steps the resident memory of the process, its live Python objects and the median time of a step are
noted. Time is processor time, and beside every tenth step a bare one of the same model is timed, so that what else the
machine does differs from growth. Writes the table, the same as JSON, and a figure.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.result_files import result_path, write_result
from prox24_lightning import ConvertAndBenchmark, Prox24, SparsityMonitor
from prox24_lightning.utils.files import replacing

EVERY = 500


class Regression(LightningModule):
    """Four linear layers, AdamW."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, width) for _ in range(4)]
        self.model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())), nn.Linear(width, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(Callback):
    """Notes a row every ``EVERY`` steps; ``bare`` is trained beside, without trainer and callbacks."""

    def __init__(self, prox: Prox24, bare: Regression, batch: list[Tensor]) -> None:
        self.prox = prox
        self.bare = bare
        self.batch = batch
        self.optimizer = bare.configure_optimizers()
        self.rows: list[dict[str, Any]] = []
        self._times: list[float] = []
        self._bare_times: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = time.process_time()
        if self._last:
            self._times.append(now - self._last)
        if trainer.global_step % 10 == 0:
            self._bare_step()
        if trainer.global_step % EVERY == 0:
            gc.collect()
            self.rows.append(
                {
                    "step": trainer.global_step,
                    "phase": self.prox.phase,
                    "processor ms a step": 1e3 * statistics.median(self._times),
                    "bare step": 1e3 * statistics.median(self._bare_times),
                    "ratio": statistics.median(self._times) / statistics.median(self._bare_times),
                    "resident MiB": _resident_bytes() / 2**20,
                    "Python objects": len(gc.get_objects()),
                }
            )
            self._times.clear()
            self._bare_times.clear()
        self._last = time.process_time()

    def _bare_step(self) -> None:
        begin = time.process_time()
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.bare.model(self.batch[0]), self.batch[1]).backward()
        self.optimizer.step()
        self._bare_times.append(time.process_time() - begin)


def main(
    output: Path = Path("benchmarks/results"),
    steps: int = 20_000,
    width: int = 64,
    batch_size: int = 16,
    threads: int = 1,
) -> None:
    """Train, measure, write.

    Args:
        output: folder for the results.
        steps: optimizer steps.
        width: of the model.
        batch_size: samples a step.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(4096, width)
    data = DataLoader(TensorDataset(x, x[:, :8].sin()), batch_size=batch_size, shuffle=True)
    prox = Prox24(0.3, 0.6, verbose=False)
    watch = Watch(prox, Regression(width), [x[:batch_size], x[:batch_size, :8].sin()])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            logger=[TensorBoardLogger(folder), CSVLogger(folder)],
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                prox,
                SparsityMonitor(every_n_steps=100),
                ConvertAndBenchmark(verbose=False, dirpath=folder),
                ModelCheckpoint(folder, every_n_train_steps=500),
                watch,
            ],
        )
        trainer.fit(Regression(width), data)
    rows = watch.rows
    plot = result_path(output, "long_run", ".png")
    write_result(
        output,
        "long_run",
        f"{steps:,} steps with everything on",
        rows[3::4] or rows,
        note=f"Five linear layers, width {width}, batch {batch_size}, AdamW, {threads} threads. The ratio is that "
        "of a step to a bare one of the same model, timed in turns. Growth from the first to the second half of each "
        f"phase, medians over windows of {EVERY} steps:\n\n{_growth(rows)}\n\n"
        f"![Memory and step time]({plot.name})",
    )
    _draw(rows, plot)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _growth(rows: list[dict[str, Any]]) -> str:
    """One line a phase: what each quantity did between its halves."""
    lines = []
    for phase in ("dense", "sparsify", "frozen"):
        inside = [row for row in rows if row["phase"] == phase]
        halves = inside[: len(inside) // 2], inside[len(inside) // 2 :]
        if not halves[0]:
            continue
        changes = []
        for key in ("ratio", "resident MiB", "Python objects"):
            first, second = (statistics.median(row[key] for row in half) for half in halves)
            changes.append(f"{key} {first:.4g} -> {second:.4g} ({100 * (second / first - 1):+.1f} %)")
        lines.append(f"- {phase}: " + ", ".join(changes))
    return "\n".join(lines)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    for axes, key in zip(figure.subplots(2, sharex=True), ("resident MiB", "ratio"), strict=True):
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], color="#1f6fb4")
        axes.set_ylabel("step / bare step" if key == "ratio" else key)
        axes.set_ylim(bottom=0)
        for before, after in pairwise(rows):
            if before["phase"] != after["phase"]:
                axes.axvline(before["step"], color="#6b7785", linestyle=":")
                axes.text(after["step"], axes.get_ylim()[1] * 0.05, after["phase"], color="#6b7785")
    axes.set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
