"""Write scalars to any logger, figures to the log folder, and everything to TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from prox24_lightning.utils.files import replacing
from prox24_lightning.utils.sampling import spread_sample
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

HISTOGRAM_SAMPLE = 1 << 16
"""Entries of a weight that go into its histogram; larger weights are sampled at an even stride."""


class MonitorOutput:
    """Write for a monitor; a failure becomes a warning, one for each kind.

    ``steps`` is always the number of finished steps. Values after step n are written at n - 1, where Lightning
    writes its own metrics of step n.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turn an exception into a warning, the first time only."""
        try:
            yield
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                rank_zero_warn(
                    f"SparsityMonitor: {what} failed, and the run continues without it: {type(error).__name__}: {error}"
                )

    def metrics(self, trainer: Trainer, metrics: Mapping[str, float], steps: int) -> None:
        """Write scalars to every logger."""
        for logger in trainer.loggers if metrics else ():
            with self.guarded(f"{type(logger).__name__}.log_metrics"):
                logger.log_metrics(dict(metrics), step=_x(steps))

    def text(self, trainer: Trainer, tag: str, text: str, steps: int) -> None:
        """Write a line of text to TensorBoard."""
        self._write(trainer, "text", lambda writer: writer.add_text(tag, text, _x(steps)))

    def image(self, trainer: Trainer, tag: str, image: np.ndarray, steps: int) -> None:
        """Show pixels ``(height, width, 3)`` in TensorBoard."""
        self._write(trainer, "images", lambda writer: writer.add_image(tag, image, _x(steps), dataformats="HWC"))

    def histograms(self, trainer: Trainer, prefix: str, weights: Sequence[GroupedWeight], steps: int) -> None:
        """Write one histogram a weight to TensorBoard; all are read from the device in one transfer."""
        if not tensorboard_loggers(trainer):
            return
        with self.guarded("reading weights for histograms"):
            samples = [_sample(local_part(weight.parameter)) for weight in weights]
            flat = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()
            parts = flat.split([sample.numel() for sample in samples])
            named = [
                (prefix + weight.name.removesuffix(".weight"), part)
                for weight, part in zip(weights, parts, strict=True)
            ]

            def write(writer: Any) -> None:
                for tag, part in named:
                    writer.add_histogram(tag, part, _x(steps))

            self._write(trainer, "histograms", write)

    def png(self, trainer: Trainer, stem: str, image: np.ndarray) -> None:
        """Write ``<stem>.png`` into the folder of every logger that has a local one; not in a ``fast_dev_run``."""
        with self.guarded(f"writing {stem}.png"):
            for folder in log_folders(trainer):
                write_png(folder / f"{stem}.png", image)

    def wants_images(self, trainer: Trainer) -> bool:
        """Return whether any logger keeps images."""
        return bool(tensorboard_loggers(trainer) or log_folders(trainer))

    def _write(self, trainer: Trainer, what: str, write: Callable[[Any], None]) -> None:
        for logger in tensorboard_loggers(trainer):
            with self.guarded(f"writing {what} to {type(logger).__name__}"):
                write(logger.experiment)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write pixels ``(height, width, 3)``, whole or not at all; the folder is made."""
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        imsave(temporary, image, format="png")


def tensorboard_loggers(trainer: Trainer) -> list[Any]:
    """Return the TensorBoard loggers, found by class name so that those of ``pytorch_lightning`` count too."""
    return [
        logger for logger in trainer.loggers if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__)
    ]


def log_folders(trainer: Trainer) -> list[Path]:
    """Return the local folders of the loggers, each once; ``trainer.log_dir`` is a collective call."""
    if getattr(trainer, "fast_dev_run", False):
        return []
    folders = []
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if folder is None and logger.save_dir is not None:
            folder = os.path.join(logger.save_dir, str(logger.name), str(logger.version))
        if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder):
            folders.append(Path(folder))
    return list(dict.fromkeys(folders))


def _x(steps: int) -> int:
    return max(steps - 1, 0)


def _sample(weight: Tensor) -> Tensor:
    return spread_sample(weight.detach(), HISTOGRAM_SAMPLE).float()
