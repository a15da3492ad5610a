"""``prox24 fit | validate | test``: LightningCLI for any LightningModule and LightningDataModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

_NAMED_CHECKPOINTS = ("best", "last", "hpc", "registry")


class Prox24CLI(LightningCLI):
    """LightningCLI whose model and data are named by class path, and whose words may come from a program."""

    def __init__(self, words: list[str], *, name: str, run: bool = True, **options: Any) -> None:
        super().__init__(
            LightningModule,
            subclass_mode_model=True,  # `data` is any LightningDataModule, or none where the module has its loaders
            # A second run into the same folder replaces the saved config instead of refusing to start.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": name},
            args=words,
            run=run,
            **options,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        skipped = LightningCLI.subcommands()
        return {name: skipped[name] for name in ("fit", "validate", "test")}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # The words are handed over by our own dispatcher; LightningCLI would warn that sys.argv holds some too.
        if not isinstance(args, list):
            raise TypeError(f"expected a list of command line words, got {type(args).__name__}")
        self.config = parser.parse_args(args)

    @override
    def before_instantiate_classes(self) -> None:
        """Say that a checkpoint is missing before the model is made."""
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path is None or "://" in str(path) or str(path).split(":")[0] in _NAMED_CHECKPOINTS:
            return
        if not Path(path).exists():
            self.parser.error(f"--ckpt_path: there is no {path}")


def fit(words: list[str]) -> None:
    """Train."""
    Prox24CLI(["fit", *words], name="prox24")


def validate(words: list[str]) -> None:
    """Score on the validation data."""
    Prox24CLI(["validate", *words], name="prox24")


def test(words: list[str]) -> None:
    """Score on the test data."""
    Prox24CLI(["test", *words], name="prox24")
