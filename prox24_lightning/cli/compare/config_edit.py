"""Edit one parsed config, in place, into the config of each variant of a comparison."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.callbacks.round_weights import RoundWeights
from prox24_lightning.cli.callback_entries import callback_entries, entries, loaded_class

_RATE_PARTS = ("optimizer.init_args.", "model.init_args.", "model.")
_KEPT_BY_ASP = ("targets", "skip", "geometry", "name", "verbose")


def without_pruning(config: Namespace) -> None:
    """Drop every Prox24, and RoundWeights, which trains what Prox24 has pruned.

    A SparsityMonitor stays: it costs every variant the same, and its curves compare.
    """
    config.trainer.callbacks = [
        entry for entry in callback_entries(config) if not issubclass(loaded_class(entry), (Prox24, RoundWeights))
    ]


def with_one_shot_magnitude(config: Namespace, at: float) -> None:
    """Let each Prox24 prune the same weights by magnitude, all at once, ``at`` of the run (the ASP recipe)."""
    edited = []
    for entry in callback_entries(config):
        if issubclass(loaded_class(entry), Prox24):
            given = entry.get("init_args", Namespace())
            kept = {key: given[key] for key in _KEPT_BY_ASP if given.get(key) is not None}
            arguments = Namespace(**kept, start=at, freeze=at, strategy="post_step", metric="weight")
            entry = Namespace(class_path="prox24_lightning.callbacks.prox24.Prox24", init_args=arguments)
        edited.append(entry)
    config.trainer.callbacks = edited


def without_conversion(config: Namespace) -> None:
    """Drop ConvertAndBenchmark, since a comparison times training."""
    config.trainer.callbacks = [
        entry for entry in callback_entries(config) if loaded_class(entry).__name__ != "ConvertAndBenchmark"
    ]


def rate_key(config: Namespace, named: str | None) -> str:
    """Return where the config holds the learning rate: as named, else ``lr`` or ``learning_rate`` of the optimizer or
    the model.

    Raises:
        ValueError: if there is none, with the option that names it.
    """
    keys = [f"{part}{name}" for part in _RATE_PARTS for name in ("lr", "learning_rate")]
    for key in [named] if named else keys:
        if isinstance(config.get(key), (int, float)):
            return key
    place = f"{named!r} is no number of the config" if named else f"the config has none of {', '.join(keys)}"
    raise ValueError(f"rates are to be searched, but {place}; name the learning rate by --lr_key")


def separate_outputs(config: Namespace, output: Path, variant: str, seed: int) -> None:
    """Give the run its own logs, checkpoints and mask files: ``output/variant/seedN``.

    TensorBoard and CSV loggers are redirected, and TensorBoard is what a config without a choice gets. Other loggers
    keep their settings, as they name runs in their own ways.
    """
    place = {"save_dir": str(output), "name": variant, "version": f"seed{seed}"}
    folder = output / variant / f"seed{seed}"
    config.trainer.default_root_dir = str(folder)
    if config.trainer.logger in (None, True):
        path = f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__name__}"
        config.trainer.logger = Namespace(class_path=path, init_args=Namespace(**place))
    elif config.trainer.logger is not False:
        for entry in entries(config.trainer.logger):
            if issubclass(loaded_class(entry), (TensorBoardLogger, CSVLogger)):
                entry.init_args = Namespace({**vars(entry.get("init_args", Namespace())), **place})
    for entry in callback_entries(config):
        arguments = entry.get("init_args", Namespace())
        if issubclass(loaded_class(entry), ModelCheckpoint) and arguments.get("dirpath"):
            arguments.dirpath = str(folder / "checkpoints")
        if issubclass(loaded_class(entry), Prox24) and arguments.get("masks_file"):
            arguments.masks_file = str(folder / Path(arguments.masks_file).name)
