"""``prox24 fit | validate | test``: LightningCLI for any LightningModule and LightningDataModule."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from prox24_lightning.cli.exit_codes import ERROR
from prox24_lightning.cli.parsers import TrainerParser, refuse
from prox24_lightning.cli.prox24_settings import apply_settings, settings_help, take_settings

_OF_LIGHTNING = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
"""A warning of Lightning 2.6 about torch 2.13, which no user can act on."""
_NAMED_CHECKPOINTS = ("best", "last", "hpc", "registry")


class Prox24CLI(LightningCLI):
    """LightningCLI whose model and data are class paths, and whose words a program may pass.

    Attributes:
        own_group: title of the group of options that ``--help`` shows first.
    """

    own_group = ""

    def __init__(self, words: list[str], *, name: str, trains: bool = False, run: bool = True, **options: Any) -> None:
        warnings.filterwarnings("ignore", message=_OF_LIGHTNING)
        self._trains = trains
        self._program = f"{name} {words[0]}" if run else name
        words, self._settings = take_settings(words, self._program) if trains else (words, {})
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
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = TrainerParser(**kwargs)
        parser.own_group = self.own_group
        if self._trains:
            parser.own_help = settings_help
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="path of a YAML file")
        return parser

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps every exception of a constructor; only these say that a value is refused.
            if not isinstance(error.__cause__, (ValueError, TypeError, MisconfigurationException)):
                raise
            refuse(self._program, str(error))

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # The words come from our own dispatcher; LightningCLI would warn that sys.argv holds some too.
        if not isinstance(args, list):
            raise TypeError(f"expected a list of command line words, got {type(args).__name__}")
        self.config = parser.parse_args(args)
        subcommand = self.config.get("subcommand")
        try:
            apply_settings(self.config[subcommand] if subcommand else self.config, self._settings)
        except ValueError as error:
            refuse(self._program, str(error))

    @override
    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that does not exist before the model is made."""
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path is None or "://" in str(path) or str(path).split(":")[0] in _NAMED_CHECKPOINTS:
            return
        if not Path(path).exists():
            self.parser.error(f"--ckpt_path: there is no {path}")


def fit(words: list[str]) -> None:
    """Train."""
    _run("fit", words)


def validate(words: list[str]) -> None:
    """Score on the validation data."""
    _run("validate", words)


def test(words: list[str]) -> None:
    """Score on the test data."""
    _run("test", words)


def _run(command: str, words: list[str]) -> None:
    if not words:
        refuse(f"prox24 {command}", "model is missing: name a config (--config X.yaml) or a class (--model my.Class)")
    try:
        Prox24CLI([command, *words], name="prox24", trains=command == "fit")
    except MisconfigurationException as error:  # settings that cannot work together
        print(f"prox24 {command}: {error}", file=sys.stderr)
        raise SystemExit(ERROR) from error
